"""Trains a diffusion model, samples from it and measures the samples.

    python -m experiments.train                                              digits, in minutes on a CPU
    python -m experiments.train --config=experiments/configs/blog.py         the blog's model
    python -m experiments.train --config=experiments/configs/patch_unet_mnist.py    a U-Net on patches
    python -m experiments.train --config.data.name=folder:PATH --config.data.size="(64, 64)" --workdir=runs/mine

The same command continues a run that was stopped, bit for bit, also on other devices. `--dry_run` prints what would be
trained. All devices of the machine are used; `experiments.processes` says how to start several processes.
"""

import contextlib
import math
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags

from diffusion import data, sharding
from diffusion.io import checkpoint, snapshots
from experiments import command, hooks, inputs, objective, parts, preflight, processes, report, signals, trackers
from experiments.command_line import define_config, given_config
from experiments.config import Config, Train, to_dict
from experiments.finish import finish
from experiments.log import Log
from experiments.progress import Bar
from experiments.run_dir import RunDir, default_workdir

flags.declare_key_flag("workdir")
flags.declare_key_flag("split")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the resolved config, size and cost of the network, and stop.")
_TRACK = flags.DEFINE_list(
    "track", [], f"Programs that also show the run: {', '.join(trackers.TRACKERS)}; each is an extra to install."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; fields are set as in --config.train.steps=100")
    config = given_config()
    with processes.joined():
        command.start()
        if _DRY_RUN.value:
            preflight.dry_run(config)
        else:
            typed = shlex.join(["python", "-m", "experiments.train", *sys.argv[1:]])
            train(config, command.workdir(default_workdir(config)), track=_TRACK.value, typed=typed)


def train(config: Config, workdir: Path, *, track: Sequence[str] = (), typed: str | None = None) -> dict[str, Any]:
    """Trains (or continues) the run in `workdir` to its end, samples and measures; returns the report.

    `track` names `trackers`. `typed` is the command that does so, which is kept with the run.

    Raises:
      ValueError: config and data do not fit each other, or `workdir` holds a run with another config.
      signals.Stopped: a signal ended training; everything is saved.
    """
    preflight.check(config)
    folder = RunDir(workdir)
    with processes.first_alone("data"):  # which may prepare a data set
        source = inputs.source(config)
        if processes.several():
            inputs.source(config, config.data.held_out)
    run = parts.resolve(config, inputs.data_spec(config, source))
    preflight.check_shapes(config, run, fresh=folder.latest_step is None)
    with processes.first_alone("folder"):
        folder.open(config, run.spec, typed, writes=processes.first())
    finished = folder.report()
    if finished is not None:
        print(f"{workdir} is finished; nothing was trained again.\n\n{report.paragraph(workdir, finished)}")
        return finished
    writes = processes.first()
    followers = trackers.start(track if writes else (), folder, config.name, to_dict(config))
    with Log(folder.metrics, followers, writes=writes) as log:
        with signals.stop_signals() as stop:
            ema, steps, seconds = fit(config, run, folder, source, log, stop)
        reached = finish(config, run, folder, ema, steps, seconds, log)
    processes.wait("finished")
    if writes:
        print("\n" + report.paragraph(workdir, reached))
    return reached


class Due(NamedTuple):
    """What is due after a step."""

    log: bool
    validate: bool
    save: bool
    preview: bool
    snapshot: bool = False


def due(c: Train, step: int) -> Due:
    """What is due after `step`, 1..c.steps."""
    last = step == c.steps
    return Due(
        log=step % c.log_every == 0 or step == 1 or last,
        validate=bool(c.eval_every) and (step % c.eval_every == 0 or last),
        save=step % c.save_every == 0 or last,
        preview=step % c.sample_every == 0,
        snapshot=bool(c.ema_power) and (step % c.snapshot_every == 0 or last),
    )


def fit(
    config: Config, run: parts.Parts, folder: RunDir, source: data.Source, log: Log, stop: signals.Stop
) -> tuple[Any, int, float]:
    """Trains from the newest checkpoint, or from the start, to the end: (averaged parameters, steps, seconds)."""
    c = config.train
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    state, placed, begin = restored(config, run, folder, mesh)
    with processes.first_alone("log"):
        log.rewind(begin)
    seconds = max((row["seconds"] for row in log.rows() if "seconds" in row), default=0.0)
    validation = hooks.Validation(config, run, folder, log, mesh) if c.eval_every else None
    if begin >= c.steps or (validation and validation.should_stop()):
        return state.ema[0], begin, seconds

    step, own = objective.sharded_step(run, mesh, placed), sharding.rows(mesh, c.batch_size)
    key = sharding.put(parts.key(config.seed, "train"), sharding.whole(mesh))

    def placed_batch(i: int) -> dict[str, jax.Array]:
        return sharding.put_rows(mesh, inputs.batch(config, source, i, own), c.batch_size)

    batches = data.prefetch(placed_batch, begin, c.steps)
    preview = hooks.Preview(config, run, folder, log)

    print(preflight.describe(config, source, state.params))
    if mesh.size > 1:
        print(preflight.describe_mesh(mesh, state))
    print(f"{'continuing after' if begin else 'training from'} step {begin} of {c.steps}, writing to {folder.path}")
    with Bar(c.steps, "training", "step", begin, seconds) as bar, contextlib.closing(batches):
        for i, examples in batches:
            state, metrics = step(key, state, examples)
            bar.update()
            done, now = i + 1, due(c, i + 1)
            stopping = asked(stop, now)  # read once: what is announced as saved must have been saved
            if any(now) or stopping:
                hooks.check_finite(done, state.step, metrics, folder)
            if now.log:
                log_step(done, metrics, bar, log, c.batch_size * c.repeat)
            if now.snapshot:
                snapshots.save(folder.averages, done, state.power)
            if now.validate:
                validation.validate(done, state)
            over = done == c.steps or (now.validate and validation.should_stop())
            if over and validation:
                state = validation.best(state)
            if over or stopping or now.save:
                checkpoint.save(folder.checkpoints, done, state)
            if stopping:
                raise signals.Stopped(f"Stopped at step {done} of {c.steps}; the same command continues from there.")
            if over:
                break
            if now.preview:
                with bar.paused():
                    preview(done, state.ema[0])
        return state.ema[0], done, bar.seconds()


def asked(stop: signals.Stop, now: Due) -> bool:
    """Whether to stop after this step. Several processes agree on it, at the steps after which anything is due."""
    return (any(now) and processes.anywhere(stop.asked)) if processes.several() else stop.asked


def restored(config: Config, run: parts.Parts, folder: RunDir, mesh: jax.sharding.Mesh) -> tuple[Any, Any, int]:
    """The state of the newest checkpoint or else the initial one, its shardings, and the step that it is from."""
    init_from, fresh = config.train.init_from, folder.latest_step is None
    shapes = jax.eval_shape(partial(parts.init_params, run))
    of_params = sharding.of_state(mesh, shapes)
    like = jax.eval_shape(partial(objective.init_state, run), shapes)
    placed = sharding.of_state(mesh, like)
    if not fresh:
        like = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), like, placed)
        state, step = checkpoint.restore(folder.checkpoints, like, report=print)
        processes.check_same("the step of the newest checkpoint", step)
        return state, placed, step
    if init_from is None:
        params = parts.init_params(run, of_params)
    else:
        params = sharding.put(RunDir(Path(init_from)).initial_weights(shapes), of_params)
        print(f"starting from the averaged weights of {init_from}")
    return jax.jit(partial(objective.init_state, run), out_shardings=placed)(params), placed, 0


def log_step(step: int, metrics: dict[str, jax.Array], bar: Bar, log: Log, examples: int) -> None:
    """Logs the metrics of a step of so many examples, and shows them with the progress bar."""
    values = {name: float(value) for name, value in metrics.items()}
    # A quarter of the times without an example in this batch has no loss.
    values = {name: value for name, value in values.items() if not math.isnan(value)}
    rate = bar.rate() * examples
    # The loss of mean flow hardly changes: each example's is divided by its own size.
    shown = "velocity_mse" if "velocity_mse" in values else "loss"
    bar.note(f"{shown} {values[shown]:.4f}, {rate:.0f} images/s")
    log.scalars(step, {**values, "images_per_second": rate, "seconds": bar.seconds()})


if __name__ == "__main__":
    command.run(main, define_config)
