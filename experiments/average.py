"""Averaged weights of any horizon, from the snapshots that a training stored.

    python -m experiments.train --config.train.ema_power="(0.05, 0.1)" --workdir=runs/mnist
    python -m experiments.average --workdir=runs/mnist --sigma_rel=0.15
    python -m experiments.sample --workdir=runs/mnist/averages/sigma_rel_0.15

The horizon is the standard deviation of the weights of all steps relative to their number (`diffusion.averages`). What
is written is a run like that of --workdir, whose only average is this one, with its width, step and origin in
average.json: `experiments.sample` and --config.train.init_from take it. It is measured by its samples,
`experiments.evaluate --samples=FILE`; `experiments.horizons` measures many.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from diffusion import averages
from diffusion.io import files, snapshots
from experiments import command, objective, parts
from experiments.config import Config
from experiments.paths import define_path
from experiments.run_dir import RunDir


def define_flags(argv: Sequence[str]) -> None:
    """Flags of this command; defined when it runs, since other commands have some of the same names."""
    del argv
    flags.declare_key_flag("workdir")
    flags.DEFINE_float("sigma_rel", None, "Width of the average, from 0.01 (short) to 0.28 (all steps alike).")
    flags.DEFINE_integer("step", None, "The training step at which it is taken; default: that of the last snapshot.")
    define_path("outdir", None, "Where to write; default: WORKDIR/averages/sigma_rel_SIGMA_REL, with --step _stepSTEP.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    command.start()
    f = flags.FLAGS
    if f.sigma_rel is None:
        raise ValueError("--sigma_rel is missing: pass the width of the average, such as --sigma_rel=0.1")
    print(make(RunDir(command.workdir()), f.sigma_rel, f.step, Path(f.outdir) if f.outdir else None))


def make(folder: RunDir, sigma_rel: float, step: int | None = None, outdir: Path | None = None) -> str:
    """Writes the average of a width as a run in `outdir`, by default a folder of averages/; says what it wrote.

    Raises:
      FileNotFoundError, ValueError: see `reconstruct`; or `outdir` holds a run.
    """
    named = f"sigma_rel_{sigma_rel:g}" + ("" if step is None else f"_step{step}")
    target = RunDir(outdir or folder.averages / named)
    if target.is_run:
        raise ValueError(f"{target.path} holds a run already; pass another --outdir")
    found = reconstruct(folder, sigma_rel, step)
    write(folder, target, found, sigma_rel)
    return (
        f"{target.path}: the average of width {sigma_rel:g} after step {found.step}, from {found.count} stored ones, "
        f"whose weights over the steps differ from the wanted ones by {found.error:.2%} (root mean square).\n"
        f"Next: python -m experiments.sample --workdir={target.path}"
    )


class Reconstruction(NamedTuple):
    """Averaged parameters, the step that they are of, how many stored averages they are made of, and the error of the
    weights, `averages.fit_error`."""

    params: Any
    step: int
    count: int
    error: float


def reconstruct(folder: RunDir, sigma_rel: float, step: int | None = None) -> Reconstruction:
    """The average of a width after `step`, default that of the last snapshot, of the run in `folder`.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: the run stored no averages, or none up to this step, or the width is out of range.
    """
    steps, gammas = stored(folder)
    step = max(steps) if step is None else step
    if not min(steps) <= step <= max(steps):
        raise ValueError(f"--step={step}: {folder.path} has snapshots of the steps {min(steps)} to {max(steps)}")
    n, powers, gamma = np.repeat(steps, len(gammas)), np.tile(gammas, len(steps)), averages.gamma_of(sigma_rel)
    x = averages.coefficients(n, powers, step, gamma)
    used = np.flatnonzero(x)
    read = (snapshots.read(folder.averages, int(n[i]), int(i % len(gammas))) for i in used)
    params = averages.combined(x[used], read)
    return Reconstruction(params, step, int((n <= step).sum()), averages.fit_error(n, powers, step, gamma))


def stored(folder: RunDir) -> tuple[list[int], list[float]]:
    """The steps and the powers of the snapshots of a run.

    Raises:
      ValueError: there are none.
    """
    config, _ = folder.stored()
    steps = snapshots.steps(folder.averages)
    if not config.train.ema_power or not steps:
        raise ValueError(
            f"{folder.path} stored no averages to combine: train with --config.train.ema_power='(0.05, 0.1)', for "
            "example, and another --workdir"
        )
    return steps, [averages.gamma_of(sigma_rel) for sigma_rel in config.train.ema_power]


def without_power(config: Config) -> Config:
    """The config of a run that has one average, of any kind, and tracks none for later."""
    defaults = type(config.train)()
    single = {"ema": config.train.ema[:1], "ema_power": (), "snapshot_every": defaults.snapshot_every}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **single))


def write(folder: RunDir, outdir: RunDir, found: Reconstruction, sigma_rel: float) -> None:
    """Writes a run with these averaged parameters, and average.json, which says what they are."""
    config, spec = folder.stored()
    config = without_power(config)
    files.check_writable(outdir.path)
    run = parts.resolve(config, spec)
    about = {"sigma_rel": sigma_rel, "step": found.step, "workdir": str(folder.path.resolve()), "error": found.error}
    text = json.dumps(about, indent=2) + "\n"
    files.atomic_write(outdir.path / "average.json", lambda file: file.write(text.encode()))
    outdir.write_new(config, spec, objective.init_state(run, like_network(run, found.params)))


def like_network(run: parts.Parts, params: Any) -> Any:
    """Parameters in the types of the network's averages."""
    like = jax.eval_shape(lambda: objective.init_state(run, parts.init_params(run)).ema[0])
    return jax.tree.map(lambda p, shape: jnp.asarray(p, shape.dtype), params, like)


if __name__ == "__main__":
    command.run(main, define_flags)
