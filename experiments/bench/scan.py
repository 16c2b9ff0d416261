"""Blocks of the vision transformer one after the other, or as a loop (`ViT.scan`): compilation, and training steps.

    python -m experiments.bench.scan
    python -m experiments.bench.scan --compiled=experiments/configs/jit.py:g16 --config=experiments/configs/mnist.py

Of --compiled the training step is compiled, with its optimiser and averages, for --images images and the device that
JAX finds; nothing is computed, and no earlier compilation is reused. The network of --config trains in both forms, in
turns (`timing`), after both were shown to be the same.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import flags

from diffusion import layers
from diffusion.models.vit import ViT
from experiments import command, objective
from experiments.bench import commands, jax_run, peers, tables, timing
from experiments.command_line import chosen_config, define_config, given_config
from experiments.config import Config, network_name
from experiments.parts import init_params, resolve

FORMS = {"unrolled": False, "scanned": True}
CLASSES = 1000  # of data that need not be there
NOISE = 0.02  # on the initial parameters


def define_flags(argv: list[str]) -> None:
    """Defines these flags, those of all benchmarks and the config's."""
    commands.define_flags(argv)
    define_config(argv)
    flags.DEFINE_list("compiled", ["experiments/configs/jit.py:b16"], "Configs whose training step is compiled.")
    flags.DEFINE_integer("images", 2, "Images in a batch of those.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    command.start()
    compiled = {name: chosen_config(["", f"--config={name}"]) for name in flags.FLAGS.compiled}
    options = {name: value for name, value in commands.amounts().items() if name != "sample_steps"}
    measure = partial(run, given_config(), compiled, images=flags.FLAGS.images, **options)
    commands.perform(argv, measure, report)


def run(
    config: Config, compiled: dict[str, Config], *, images: int = 2, rounds: int = 3, steps: int = 1
) -> dict[str, Any]:
    """All measurements, ready for JSON.

    Raises:
      ValueError: a network is no vision transformer.
      AssertionError: the two forms of the network do not compute the same.
    """
    for each in (config, *compiled.values()):
        if not isinstance(each.model, ViT):
            raise ValueError(f"scan is a field of vit, not of {network_name(each.model)}: pass another config")
    jax.config.update("jax_enable_compilation_cache", False)
    programs = {
        name: {form: compilation(jax_run.with_model(each, scan=scan), images) for form, scan in FORMS.items()}
        for name, each in compiled.items()
    }
    return {"machine": timing.machine(), "images": images, "config": config.name, "compiled": programs} | trained(
        config, rounds, steps
    )


def compilation(config: Config, images: int) -> dict[str, float]:
    """Seconds to trace and to compile a training step on `images` images, and the bytes of its temporary arrays."""
    one = resolve(config, jax_run.data_spec(config, CLASSES))
    state = jax.eval_shape(lambda: objective.init_state(one, init_params(one)))
    batch = {
        "x": jax.ShapeDtypeStruct((images, *one.spec.shape), np.uint8),
        "y": jax.ShapeDtypeStruct((images,), np.int32),
    }
    begin = time.perf_counter()
    lowered = jax.jit(objective.make_step(one), donate_argnums=1).lower(jax.random.key(0), state, batch)
    traced = time.perf_counter()
    done = lowered.compile()
    seconds = {"trace": traced - begin, "compile": time.perf_counter() - traced}
    return seconds | {"temporary_bytes": done.memory_analysis().temp_size_in_bytes}


def trained(config: Config, rounds: int, steps: int) -> dict[str, Any]:
    """Training steps of a config in both forms, in turns; how far their predictions are apart."""
    spec, rng, b = jax_run.data_spec(config, CLASSES), np.random.default_rng(0), config.train.batch_size
    batch = {"x": rng.integers(0, 256, (b, *spec.shape), np.uint8)}
    batch["y"] = rng.integers(0, max(spec.num_classes, 1), b).astype(np.int32)
    forms = {name: resolve(jax_run.with_model(config, scan=scan), spec) for name, scan in FORMS.items()}
    plain = jax_run.params(forms["unrolled"], NOISE)
    like = jax.eval_shape(partial(init_params, forms["scanned"]))
    params = {"unrolled": plain, "scanned": layers.stacked(plain, like)}
    xt, t = rng.standard_normal((2, *spec.shape), np.float32), np.float32([0.3, 0.8])
    preds = [
        np.asarray(jax.jit(one.image_model.apply)(params[name], xt, t, batch["y"][:2] if spec.num_classes else None))
        for name, one in forms.items()
    ]
    error = peers.check_same("the scanned network", {"outputs": float(abs(preds[0] - preds[1]).max())})
    programs = {name: jax_run.train(one, params[name], batch, steps) for name, one in forms.items()}
    return {"batch_size": b, "parity": error, "train": timing.compare(programs, steps, rounds)}


def report(result: dict[str, Any]) -> str:
    """The result in tables."""
    lines = [tables.where(result["machine"], ["jax"])]
    for name, rows in result["compiled"].items():
        whole = {form: row["trace"] + row["compile"] for form, row in rows.items()}
        cells = [
            [
                form,
                f"{row['trace']:.1f}",
                f"{row['compile']:.1f}",
                f"{whole['unrolled'] / whole[form]:.1f} x",
                f"{row['temporary_bytes'] / 2**30:.2f}",
            ]
            for form, row in rows.items()
        ]
        heads = ["s to trace", "s to compile", "speed over unrolled", "GiB of temporary arrays"]
        lines += ["", tables.table(f"training step of {name}, {result['images']} images", heads, cells)]
    cells = [
        [form, f"{1000 * row['seconds']:.1f}", tables.over(row, "unrolled")] for form, row in result["train"].items()
    ]
    title = f"training step of {result['config']}, {result['batch_size']} images"
    return "\n".join([*lines, "", tables.table(title, ["ms", "speed over unrolled"], cells)])


if __name__ == "__main__":
    command.run(main, define_flags)
