"""Training step and sampling of a config's vision transformer, against the same network in PyTorch.

    python -m experiments.bench.vit                                     the digits' network, on the cores of this CPU
    python -m experiments.bench.vit --config=experiments/configs/jit_b16.py --config.train.batch_size=256 \\
        --attention=xla,cudnn --peer=compile --peak_tflops=989          JiT-B/16, on one H100 or H200

A training step is noising, forward, backward, clipping, AdamW and the average of the parameters. First both networks
are shown to be the same one: with our parameters copied, outputs and gradients must agree. Then everybody takes turns
in one process on the same cores or GPU (`timing`). bfloat16 configs run under autocast in PyTorch. Beside
PyTorch a config with another optimiser is timed with AdamW, for it is the network that is compared. Also counted:

    FLOPs = 3 * 2 * (multiplications in matrix products of the forward pass),  MFU = FLOPs/s / --peak_tflops  (1)

PyTorch is an extra: pip install -e '.[torch]'; --peer=none does without.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from diffusion.geometry import geometry
from diffusion.models.vit_flops import vit_flops
from diffusion.sample import shifted_grid
from experiments import build, session
from experiments.bench import ours, timing
from experiments.command_line import define_config, given_config
from experiments.config import Config

PEERS = {"both": ("eager", "compile"), "eager": ("eager",), "compile": ("compile",), "none": ()}
flags.declare_key_flag("split")
_PEER = flags.DEFINE_enum("peer", "both", list(PEERS), "PyTorch as it is, under torch.compile, or not at all.")
_ATTENTION = flags.DEFINE_list("attention", [], "Our attention implementations, e.g. xla,cudnn; default: the config's.")
_NUM_CLASSES = flags.DEFINE_integer(
    "num_classes", 1000, "Classes of data that need not be there: configs that state both size and channels."
)
_PEAK = flags.DEFINE_float("peak_tflops", None, "Peak TFLOP/s of the device at the config's dtype, for the MFU.")

# Outputs and gradients of the two networks, in float32, relative to the largest output and the gradient's norm.
TOLERANCE = 1e-4
NOISE = 0.02  # on the initial parameters


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    timing.check_json(flags.FLAGS.json)
    session.start()
    result = run(
        given_config(),
        peers=PEERS[_PEER.value],
        attention=_ATTENTION.value,
        rounds=flags.FLAGS.rounds,
        steps=flags.FLAGS.steps,
        sample_steps=flags.FLAGS.sample_steps,
        num_classes=_NUM_CLASSES.value,
        peak_tflops=_PEAK.value,
    )
    print(report(result))
    timing.write_json(flags.FLAGS.json, result)


def define_flags(argv: list[str]) -> None:
    """Defines the flags of all benchmarks and the config's."""
    timing.define_flags(argv)
    define_config(argv)


def run(
    config: Config,
    *,
    peers: Sequence[str] = (),
    attention: Sequence[str] = (),
    rounds: int = 3,
    steps: int = 1,
    sample_steps: int = 1,
    num_classes: int = 1000,
    peak_tflops: float | None = None,
) -> dict[str, Any]:
    """All measurements, ready for JSON.

    Raises:
      ValueError: PyTorch is asked for and missing, or does not know what the config asks for.
      AssertionError: the two networks are not the same.
    """
    torch_vit = peer_module(config) if peers else None
    if peers:
        options = dataclasses.replace(config.train, optimizer="adamw", matrix_rate=Config().train.matrix_rate)
        config = dataclasses.replace(config, train=options)
    # Two frameworks share the GPU: JAX must not take three quarters of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    seen = facts(config, num_classes)
    rng = np.random.default_rng(0)
    b, drawn = config.train.batch_size, config.sample.batch_size
    batch = {"x": rng.integers(0, 256, (b, *seen.shape), np.uint8)}
    batch["y"] = rng.integers(0, max(seen.num_classes, 1), b).astype(np.int32)
    labels = rng.integers(0, max(seen.num_classes, 1), drawn).astype(np.int32)
    params = ours.params(config, seen, NOISE)

    agreement = parity(config, seen, params) if peers else None
    train, draw = {}, {}
    for implementation in attention or [config.model.attention]:
        name, own = (
            f"ours, {implementation}" if implementation else "ours",
            with_model(config, attention=implementation),
        )
        train[name] = ours.train(own, seen, params, batch, steps)
        draw[name] = ours.draw(own, seen, params, labels, sample_steps)
    for mode in peers:
        both = torch_contenders(torch_vit, config, seen, params, batch, labels, mode, steps, sample_steps)
        train[f"PyTorch {mode}"], draw[f"PyTorch {mode}"] = both

    per_picture = forward_flops(config, seen)
    passes = 2 if guided(config, seen) else 1
    cost = {"train": 3 * per_picture, "sample": passes * config.sample.steps * per_picture}
    done = drawn * sample_steps / config.sample.steps
    result = {
        "machine": timing.machine() | versions(torch_vit),
        "config": config.name,
        "batch_size": b,
        "dtype": config.model.dtype,
        "optimizer": config.train.optimizer,
        "tokens": math.prod(geometry(seen.shape[:-1], config.model.patch_size, config.model.stride).grid),
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "parity": agreement,
        "sample_batch": drawn,
        "sample_steps": config.sample.steps,
        "sample_steps_timed": sample_steps,
        "peak_tflops": peak_tflops,
        "train": timing.summary(timing.interleave(train, rounds), dict.fromkeys(train, steps * b)),
        "sample": timing.summary(timing.interleave(draw, rounds), dict.fromkeys(draw, done)),
    }
    for kind, flops in cost.items():
        for row in result[kind].values():
            row["tflops"] = flops * row["per_second"] / 1e12
            row["mfu"] = row["tflops"] / peak_tflops if peak_tflops else None
    return result


def facts(config: Config, num_classes: int) -> build.Seen:
    """What the network must know of its data; the data itself is only opened if the config leaves its shape open."""
    c = config.data
    if c.size and c.channels:
        return build.Seen((*c.size, c.channels), tuple(map(str, range(num_classes * config.model.conditional))))
    return build.seen(config, build.source(config))


def with_model(config: Config, **fields: Any) -> Config:
    """The config with other fields of the network."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def peer_module(config: Config) -> Any:
    """The module `torch_vit`.

    Raises:
      ValueError: PyTorch is missing, cannot use our device, or `torch_vit` does not know what the config asks for.
    """
    try:
        import torch
    except ImportError:
        raise ValueError(
            "the comparison needs PyTorch: pip install -e '.[torch]', or pass --peer=none to time ours alone"
        ) from None
    from experiments.bench import torch_vit

    known = {"model.name": "vit", "model.dropout": 0, "model.remat": False, "process.path": "linear"}
    known |= {"process.prediction": "x0", "process.loss_in": "flow", "process.times": "logit_normal"}
    known |= {"train.repeat": 1, "sample.clip": False}
    for field, value in known.items():
        part, name = field.split(".")
        asked = getattr(getattr(config, part), name)
        if asked != value:
            raise ValueError(f"the PyTorch network knows --config.{field}={value} only, not {asked}; pass --peer=none")
    if len(config.train.ema) != 1:
        raise ValueError(f"the PyTorch network keeps one average, not --config.train.ema={config.train.ema}")
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise ValueError("JAX uses a GPU and this PyTorch has none: install its CUDA build, or pass --peer=none")
    torch.set_num_threads(timing.cores())
    return torch_vit


def torch_network(torch_vit: Any, config: Config, seen: build.Seen, params: Any) -> Any:
    """Our network in PyTorch, our parameters in it, on our device."""
    c = config.model
    fields = ("patch_size", "stride", "width", "depth", "heads", "mlp_ratio", "bottleneck", "norm", "mlp", "qk_norm")
    network = torch_vit.ViT(
        seen.shape[:-1],
        seen.shape[-1],
        **{name: getattr(c, name) for name in fields},
        num_classes=seen.num_classes,
        positions=c.positions,
        class_tokens=c.class_tokens if seen.num_classes else 0,
        class_tokens_from=c.class_tokens_from,
        clock={"1000 t": lambda t: 1000 * t, "1 - t": lambda t: 1 - t}[c.clock],
    )
    return torch_vit.copy_params(network, params).to(torch_device())


def torch_device() -> str:
    """What PyTorch calls the device that JAX uses."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def versions(torch_vit: Any) -> dict[str, Any]:
    """What to know of PyTorch, if it took part."""
    if torch_vit is None:
        return {}
    return {"torch": torch_vit.torch.__version__, "torch_threads": torch_vit.torch.get_num_threads()}


def parity(config: Config, seen: build.Seen, params: Any, count: int = 4) -> dict[str, float]:
    """Largest difference of outputs, and of gradients in norm, between the networks in float32.

    Raises:
      AssertionError: one is larger than TOLERANCE: they are not the same network.
    """
    torch_vit = peer_module(config)
    torch = torch_vit.torch
    rng = np.random.default_rng(2)
    xt, wanted = rng.standard_normal((2, count, *seen.shape), np.float32)
    t = rng.uniform(size=count).astype(np.float32)
    y = rng.integers(0, seen.num_classes + 1, count).astype(np.int32)

    apply = build.network(with_model(config, dtype="float32", attention=None), seen).apply

    def error(params: Any) -> tuple[jax.Array, jax.Array]:
        pred = apply(params, xt, t, y)
        return jnp.square(pred - wanted).mean(), pred

    with jax.default_matmul_precision("highest"):
        grads, pred = jax.jit(jax.grad(error, has_aux=True))(params)
    network = torch_network(torch_vit, config, seen, params)
    theirs = network(*(torch.from_numpy(a).to(torch_device()) for a in (xt, t, y)))
    (theirs - torch.from_numpy(wanted).to(torch_device())).square().mean().backward()
    output = np.abs(theirs.detach().cpu().numpy() - pred).max() / max(1, np.abs(pred).max())

    slopes = torch_network(torch_vit, config, seen, jax.tree.map(np.asarray, grads))
    pairs = [(p.grad, g) for p, g in zip(network.parameters(), slopes.parameters(), strict=True)]
    squares = [((a - b).square().sum().item(), b.square().sum().item()) for a, b in pairs]
    gradient = math.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares))
    errors = {"output": float(output), "gradient": gradient}
    if not max(errors.values()) <= TOLERANCE:
        raise AssertionError(f"the PyTorch network is not ours: {errors} exceed {TOLERANCE}")
    return errors


def torch_contenders(
    torch_vit: Any,
    config: Config,
    seen: build.Seen,
    params: Any,
    batch: dict[str, np.ndarray],
    labels: np.ndarray,
    mode: str,
    steps: int,
    sample_steps: int,
) -> tuple[Callable[[], None], Callable[[], np.ndarray]]:
    """`ours.train` and `ours.draw` in PyTorch, `mode` "eager" or "compile"."""
    torch, device = torch_vit.torch, torch_device()
    c, d = config.train, config.data
    network = torch_network(torch_vit, config, seen, params)
    compiled = torch.compile if mode == "compile" else lambda f: f
    narrow = partial(torch.autocast, device, torch.bfloat16, enabled=config.model.dtype == "bfloat16")
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # JAX's default on GPUs
    if config.model.dtype == "float32":
        narrow = contextlib.nullcontext

    noising = {"null": seen.num_classes, "drop": c.label_drop if seen.num_classes else 0.0}
    noising |= {"mean": config.process.times_mean, "std": config.process.times_std, "low": d.low, "high": d.high}
    loss = compiled(partial(torch_vit.picture_loss, network, floor=config.process.loss_floor, **noising))
    adamw = torch_vit.optimizer(network, rate=c.learning_rate, b2=c.b2, weight_decay=c.weight_decay)

    def narrow_loss(images: Any, y: Any) -> Any:
        with narrow():
            return loss(images, y)

    step = torch_vit.make_step(network, narrow_loss, adamw, clip=c.clip, ema=c.ema[0])
    x, y, wanted = (torch.from_numpy(a) for a in (batch["x"], batch["y"].astype(np.int64), labels.astype(np.int64)))
    times = shifted_grid(sample_steps, config.sample.shift).tolist()
    draw = partial(
        torch_vit.draw,
        compiled(torch_network(torch_vit, config, seen, params)),
        shape=seen.shape,
        times=times,
        null=seen.num_classes,
        scales=guidance(config, times) if guided(config, seen) else None,
        low=d.low,
        high=d.high,
    )

    def train() -> None:
        for _ in range(steps):
            step(x.to(device), y.to(device))
        if device == "cuda":
            torch.cuda.synchronize()

    def pictures() -> np.ndarray:
        with narrow():
            return draw(wanted.to(device)).cpu().numpy()

    return train, pictures


def guided(config: Config, seen: build.Seen) -> bool:
    """Whether a step of sampling runs the network with and without the label."""
    return seen.num_classes > 0 and config.sample.guidance not in (0, 1)


def guidance(config: Config, times: Sequence[float]) -> list[float]:
    """Guidance scale of each step."""
    c = config.sample
    return [c.guidance if c.guidance_low <= t <= c.guidance_high else 1.0 for t in times[:-1]]


def forward_flops(config: Config, seen: build.Seen) -> int:
    """FLOPs of the matrix products of one picture's forward pass, eq. (1)."""
    *size, channels = seen.shape
    return vit_flops(size, channels, num_classes=seen.num_classes, **dataclasses.asdict(config.model))


def report(result: dict[str, Any]) -> str:
    """The result in words and two tables."""
    machine, errors = result["machine"], result["parity"]
    lines = [
        f"{result['config']}: {result['parameters']:,} parameters, {result['tokens']} tokens, {result['dtype']}; "
        f"{machine['device']}, {machine['cores']} cores, jax {machine['jax']}"
        + (f", torch {machine['torch']} on {machine['torch_threads']} threads" if errors else "")
    ]
    if errors:
        lines.append(
            f"same network: outputs agree to {errors['output']:.1e}, gradients to {errors['gradient']:.1e} (float32)"
        )
    titles = {
        "train": f"training step with {result['optimizer']}, {result['batch_size']} pictures",
        "sample": f"drawing {result['sample_batch']} pictures, {result['sample_steps']} DDIM steps "
        f"(timed over {result['sample_steps_timed']})",
    }
    for kind, title in titles.items():
        rows = result[kind]
        peers = [name for name in rows if name.startswith("PyTorch")]
        heads = ["ms per picture", "pictures/s", *(f"speed over {name}" for name in peers), "TFLOP/s"]
        mfu = result["peak_tflops"] is not None
        cells = [
            [
                name,
                f"{1000 * row['seconds']:.3f}",
                f"{row['per_second']:.1f}",
                *(timing.over(row, peer) for peer in peers),
                f"{row['tflops']:.3f}",
                *([f"{row['mfu']:.1%}"] if mfu else []),
            ]
            for name, row in rows.items()
        ]
        lines += ["", timing.table(title, heads + ["MFU"] * mfu, cells)]
    return "\n".join(lines)


if __name__ == "__main__":
    session.run(main, define_flags)
