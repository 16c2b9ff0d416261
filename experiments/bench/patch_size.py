"""What a patch size costs and saves: Patch Diffusion's U-Net in operations, memory and time, at several patch sizes.

    python -m experiments.bench.patch_size --plot=patch_size.png            minutes on two CPU cores
    python -m experiments.bench.patch_size --peer=PatchDiffusion-Pytorch    and the published program beside it
    python -m experiments.bench.patch_size --num_channels=256 --batch_size=32 --dtype=bfloat16 --steps=20 \\
        --sample_steps=20                                                   on a GPU

A picture of n x n pixels in patches of P x P gives the network (n / P)^2 positions, of which its cost is made:

    cost(n, P) = cost(n / P, 1)    "P=4 at 256x256 costs only as much as 64x64 at P=1"                     (1)
    cost(n, P) = cost(n, 1) / P^2                                                                          (2)

after Luhman & Luhman 2022 (2207.04316). Only the first and the last convolution see the patch itself. All cases take
turns (`timing`): one picture size at every P, and every P at the number of positions that the largest picture has in
(1). Operations are counted twice, by hand (`unet_flops`; three times the forward pass for a training step) and by XLA;
memory is what XLA allocates for arguments, results and temporary arrays. A training step is noising, forward, backward,
AdamW and the average of the parameters; a sampling step one of DDIM, the drawing of the first noise included.

PyTorch is an extra, pip install -e '.[torch]', for --peer alone (`torch_unet`).
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from diffusion import loss, optimize, process, sample, train
from diffusion.models import Model
from diffusion.models.unet import unet
from diffusion.models.unet_flops import unet_flops
from experiments import session
from experiments.bench import timing
from experiments.bench.patch_size_report import KINDS, draw, report

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
CHANNELS = 3
RATE, EMA = 1e-4, 0.999


class Case(NamedTuple):
    """Pictures of size x size in patches of patch x patch."""

    size: int
    patch: int

    @property
    def name(self) -> str:
        return f"{self.size} px, P = {self.patch}"


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    given = flags.FLAGS
    timing.check_json(given.json)
    if given.plot and not Path(given.plot).parent.is_dir():
        raise ValueError(f"--plot={given.plot}: there is no folder {Path(given.plot).parent}")
    session.start()
    result = run(
        size=given.size,
        patch_sizes=numbers("patch_sizes", int),
        grid=given.grid,
        fields={
            "num_channels": given.num_channels,
            "channel_mult": numbers("channel_mult", float),
            "num_res_blocks": given.num_res_blocks,
            "attention_resolutions": numbers("attention_resolutions", int),
        },
        dtype=given.dtype,
        batch_size=given.batch_size,
        rounds=given.rounds,
        steps=given.steps,
        sample_steps=given.sample_steps,
        peer=given.peer,
        peer_compile=given.peer_compile,
    )
    print(report(result))
    timing.write_json(given.json, result)
    if given.plot:
        draw(result, Path(given.plot))


def define_flags(argv: list[str]) -> None:
    """Defines the flags of all benchmarks, with defaults for steps that take seconds, and those of this one."""
    timing.define_flags(argv)
    for name, value in {"rounds": 5, "steps": 1, "sample_steps": 1}.items():
        flags.FLAGS.set_default(name, value)
    flags.DEFINE_integer("size", 256, "Side of the picture that is cut into patches of every size.", lower_bound=1)
    flags.DEFINE_list("patch_sizes", ["1", "2", "4", "8"], "Patch sizes P.")
    flags.DEFINE_integer("grid", 64, "Side, in patches, at which every P is measured too.", lower_bound=1)
    flags.DEFINE_integer("num_channels", 64, "Width of the U-Net at multiplier 1.", lower_bound=1)
    flags.DEFINE_list("channel_mult", ["1", "1", "2", "2"], "Widths of its levels.")
    flags.DEFINE_integer("num_res_blocks", 2, "Blocks of a level.", lower_bound=1)
    flags.DEFINE_list("attention_resolutions", ["16", "8"], "Sides, in patches, of the levels that attend.")
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Of the computation; bfloat16 is for accelerators.")
    flags.DEFINE_integer("batch_size", 2, "Pictures at a time.", lower_bound=1)
    flags.DEFINE_string("peer", None, "A checkout of the published program, PatchDiffusion-Pytorch, to race.")
    flags.DEFINE_bool("peer_compile", False, "Race it under torch.compile too, which takes minutes to compile.")
    flags.DEFINE_string("plot", None, "Also draw the result to this PNG.")


def numbers(name: str, kind: type) -> list[Any]:
    """The value of a flag that is a list of numbers.

    Raises:
      ValueError: it is none, or empty.
    """
    given = flags.FLAGS[name].value
    try:
        values = [kind(text) for text in given]
    except ValueError:
        values = []
    if not values:
        raise ValueError(f"--{name}={','.join(given)} must be numbers ({kind.__name__}) with commas between them")
    return values


def run(
    *,
    size: int,
    patch_sizes: Sequence[int],
    grid: int,
    fields: dict[str, Any],
    dtype: str = "float32",
    batch_size: int = 1,
    rounds: int = 3,
    steps: int = 1,
    sample_steps: int = 1,
    peer: str | None = None,
    peer_compile: bool = False,
) -> dict[str, Any]:
    """All measurements, ready for JSON; `fields` are those of `unet` that all cases share.

    Raises:
      ValueError: a patch size does not divide the picture; the published program is not at `peer`, or cannot be run.
      AssertionError: its network and ours are not the same.
    """
    if bad := [p for p in patch_sizes if p < 1 or size % p]:
        raise ValueError(f"--patch_sizes={bad} do not divide --size={size}")
    torch_unet = peer_module(peer) if peer is not None else None
    same_picture = [Case(size, p) for p in patch_sizes]
    same_grid = [Case(grid * p, p) for p in patch_sizes if grid * p <= size]
    amounts = {"batch_size": batch_size, "steps": steps, "sample_steps": sample_steps}
    if torch_unet is not None:
        beside = (same_grid or same_picture)[-1]
        modes = ("eager", "compile") if peer_compile else ("eager",)
        agreement, contenders = versus(torch_unet, peer, beside, fields, dtype, modes, **amounts)
    costs, racing = {}, {kind: {} for kind in KINDS}
    for case in dict.fromkeys(same_picture + same_grid):
        costs[case.name], both = measured(case, fields, dtype, **amounts)
        for kind in KINDS:
            racing[kind][case.name] = both[kind]
    units = {"train": batch_size * steps, "sample": batch_size * sample_steps}
    result = {
        "machine": timing.machine(),
        "fields": fields,
        "dtype": dtype,
        **amounts,
        "same_picture": [case.name for case in same_picture],
        "same_grid": [case.name for case in same_grid],
        "cases": costs,
        **{kind: race(racing[kind], units[kind], rounds) for kind in KINDS},
        "peer": None,
    }
    if torch_unet is not None:
        result["peer"] = {"case": beside.name, "parity": agreement, "torch": torch_unet.torch.__version__}
        result["peer"] |= {kind: race(contenders[kind], units[kind], rounds) for kind in KINDS}
    return result


def race(contenders: dict[str, Callable[[], Any]], units: int, rounds: int) -> dict[str, Any]:
    """`timing.summary` of contenders that do `units` of work a call."""
    return timing.summary(timing.interleave(contenders, rounds), dict.fromkeys(contenders, units))


def network(case: Case, fields: dict[str, Any], dtype: str) -> tuple[Model, Any]:
    """The U-Net of a case, and the shapes of its parameters."""
    model = unet(patch_size=case.patch, dtype=DTYPES[dtype], **fields)
    picture = jax.ShapeDtypeStruct((1, case.size, case.size, CHANNELS), jnp.float32)
    return model, jax.eval_shape(model.init, jax.random.key(0), picture, jax.ShapeDtypeStruct((1,), jnp.float32))


def random_params(like: Any) -> Any:
    """Parameters of these shapes, none at its initial zero, of a size that keeps activations near one."""
    rng = np.random.default_rng(0)

    def value(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        fan = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
        return (rng.standard_normal(leaf.shape) / np.sqrt(fan)).astype(np.float32)

    return jax.tree.map(value, like)


def measured(
    case: Case, fields: dict[str, Any], dtype: str, *, batch_size: int, steps: int, sample_steps: int
) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    """What a case costs, time excepted, and {kind: a contender}."""
    model, like = network(case, fields, dtype)
    shape = (batch_size, case.size, case.size, CHANNELS)
    training = lowered_train(model, like, shape)
    step, drawing = training.compile(), lowered_draw(model, like, shape, sample_steps).compile()
    cost = {
        "size": case.size,
        "patch_size": case.patch,
        "positions": (case.size // case.patch) ** 2,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(like)),
        **operations(case, fields, dtype, training, batch_size),
        "bytes": {"train": peak_bytes(step), "sample": peak_bytes(drawing)},
    }
    params = random_params(like)
    return cost, {"train": trainer(step, params, shape, steps), "sample": drawer(drawing, params)}


def operations(
    case: Case, fields: dict[str, Any], dtype: str, training: jax.stages.Lowered, batch_size: int
) -> dict[str, dict[str, float]]:
    """Operations of a picture's forward pass and training step, by hand and as XLA counts them."""
    model, like = network(case, fields, dtype)
    shape = (batch_size, case.size, case.size, CHANNELS)
    xt, t = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    programs = {"forward": jax.jit(model.apply).lower(like, xt, t), "train": training}
    by_hand = unet_flops(shape[1:-1], CHANNELS, patch_size=case.patch, **fields)
    return {
        "flops": {"forward": by_hand, "train": 3 * by_hand},
        "xla_flops": {kind: program.cost_analysis()["flops"] / batch_size for kind, program in programs.items()},
    }


def optimizer() -> optax.GradientTransformation:
    """AdamW."""
    return optimize.adamw(RATE, 1, schedule="constant")


def lowered_train(model: Model, like: Any, shape: Sequence[int]) -> jax.stages.Lowered:
    """(key, state, pictures of `shape`) -> (state, metrics), the training step, not yet compiled."""

    def mean_loss(params: Any, key: jax.Array, x0: jax.Array) -> tuple[jax.Array, dict]:
        return loss.loss(key, partial(model.apply, params), process.Linear(), x0, prediction="x0")[0].mean(), {}

    step = jax.jit(train.make_step(mean_loss, optimizer(), ema_decay=EMA), donate_argnums=1)
    state = jax.eval_shape(lambda params: train.init_state(params, optimizer()), like)
    return step.lower(jax.random.key(0), state, jax.ShapeDtypeStruct(shape, jnp.float32))


def lowered_draw(model: Model, like: Any, shape: Sequence[int], sample_steps: int) -> jax.stages.Lowered:
    """(params, key) -> pictures of `shape` in so many steps of DDIM, not yet compiled."""
    path, times = process.Linear(), sample.uniform_grid(sample_steps)

    def drawn(params: Any, key: jax.Array) -> jax.Array:
        x1 = jax.random.normal(key, shape)
        return sample.sample(key, partial(model.apply, params), path, x1, times, prediction="x0")

    return jax.jit(drawn).lower(like, jax.random.key(0))


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program holds at a time: arguments, results and temporary arrays; results that replace arguments once."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


def trainer(step: jax.stages.Compiled, params: Any, shape: Sequence[int], steps: int) -> Callable[[], None]:
    """Runs `steps` training steps."""
    key, x0 = jax.random.key(0), pictures(shape)
    state = train.init_state(jax.tree.map(jnp.asarray, params), optimizer())

    def run() -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = step(key, state, jax.device_put(x0))
        jax.block_until_ready(state)

    return run


def pictures(shape: Sequence[int]) -> np.ndarray:
    """Something to train on."""
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def drawer(drawing: jax.stages.Compiled, params: Any) -> Callable[[], np.ndarray]:
    """Draws pictures."""
    params, key = jax.tree.map(jnp.asarray, params), jax.random.key(0)
    return lambda: np.asarray(drawing(params, key))


def peer_module(path: str) -> Any:
    """The module `torch_unet`.

    Raises:
      ValueError: PyTorch is missing or cannot use our device, or the published program is not in the folder `path`.
    """
    if not (Path(path) / "patch_diffusion" / "unet.py").is_file():
        raise ValueError(f"--peer={path} is no checkout of PatchDiffusion-Pytorch: it has no patch_diffusion/unet.py")
    try:
        import torch
    except ImportError:
        raise ValueError("--peer needs PyTorch: pip install -e '.[torch]'") from None
    from experiments.bench import torch_unet

    # Two frameworks share the GPU: JAX must not take three quarters of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise ValueError("JAX uses a GPU and this PyTorch has none: install its CUDA build, or leave out --peer")
    torch.set_num_threads(timing.cores())
    return torch_unet


def versus(
    torch_unet: Any,
    path: str,
    case: Case,
    fields: dict[str, Any],
    dtype: str,
    modes: Sequence[str],
    *,
    batch_size: int,
    steps: int,
    sample_steps: int,
) -> tuple[dict[str, float], dict[str, dict[str, Callable[[], Any]]]]:
    """How well the published network and ours agree, and {kind: {name: contender}}, ours with its parameters.

    Raises:
      AssertionError: they are not the same network.
    """
    make = partial(torch_unet.network, path, size=case.size, patch_size=case.patch, channels=CHANNELS, fields=fields)
    plain, like = network(case, fields, "float32")
    params, errors = torch_unet.parity(make(), plain, like, case.size, CHANNELS)
    model, _ = network(case, fields, dtype)
    shape = (batch_size, case.size, case.size, CHANNELS)
    step = lowered_train(model, like, shape).compile()
    drawing = lowered_draw(model, like, shape, sample_steps).compile()
    contenders = {"train": {"ours": trainer(step, params, shape, steps)}, "sample": {"ours": drawer(drawing, params)}}
    for mode in modes:
        settings = {"mode": mode, "bfloat16": dtype == "bfloat16"}
        trained = torch_unet.trainer(make(), pictures(shape), steps, rate=RATE, ema=EMA, **settings)
        contenders["train"][f"PyTorch {mode}"] = trained
        contenders["sample"][f"PyTorch {mode}"] = torch_unet.drawer(make(), shape, sample_steps, **settings)
    return errors, contenders


if __name__ == "__main__":
    session.run(main, define_flags)
