"""Trains a diffusion model and shows what it draws.

    python -m experiments.train                                              digits, in minutes on a CPU
    python -m experiments.train --config=experiments/configs/blog.py         the blog's model
    python -m experiments.train --config=experiments/configs/patch_unet_mnist.py    a U-Net on patches
    python -m experiments.train --config.data.name=folder:PATH --config.data.size="(64, 64)" --workdir=runs/mine

The same command continues a run that was stopped, bit for bit. `--dry_run` prints what would be trained.
"""

import contextlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from diffusion.io import checkpoint, files, stored_config
from diffusion import data, guide
from diffusion.patch.geometry import geometry
from experiments import build, drawing, measure, runs, session, watch
from experiments import objective as objectives
from experiments.command_line import define_config, given_config
from experiments.config import Config, to_dict

flags.declare_key_flag("workdir")
flags.declare_key_flag("split")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the resolved config, size and cost of the network, and stop.")
_TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "Also write TensorBoard events (needs the tensorboard extra).")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; fields are set as in --config.train.steps=100")
    config = given_config()
    session.start()
    if _DRY_RUN.value:
        dry_run(config)
    else:
        train(config, session.workdir(runs.default_workdir(config)), tensorboard=_TENSORBOARD.value)


def train(config: Config, workdir: Path, *, tensorboard: bool = False) -> dict[str, Any]:
    """Trains (or continues) the run in `workdir` to its end, draws and measures; returns what was reached.

    Raises:
      ValueError: config and data do not fit each other, or `workdir` holds a run with another config.
      session.Stopped: a signal ended training; everything is saved.
    """
    check(config)
    source = build.source(config)
    seen = build.seen(config, source)
    rehearse(config, seen, fresh=checkpoint.latest(workdir / "checkpoints") is None)
    params = build.init_params(config, seen)
    claim(workdir, build.to_stored(config, seen))
    finished = workdir / "report.json"
    if finished.exists():
        report = json.loads(finished.read_text())
        print(f"{workdir} is finished; nothing was trained again.\n\n{measure.paragraph(workdir, report)}")
        return report
    with session.Log(workdir, tensorboard) as log:
        with session.stop_signals() as stop:
            ema, steps, seconds = fit(config, workdir, source, params, log, stop)
        report = measure.finish(config, workdir, seen, ema, steps, seconds, log)
    print("\n" + measure.paragraph(workdir, report))
    return report


def check(config: Config) -> None:
    """Raises ValueError for numbers that cannot be meant, naming the flag."""
    c = config.train
    counts = {f"train.{name}": getattr(c, name) for name in ("steps", "batch_size", "repeat", "log_every")}
    counts |= {f"train.{name}": getattr(c, name) for name in ("sample_every", "save_every", "eval_count")}
    counts |= {f"sample.{name}": getattr(config.sample, name) for name in ("count", "steps", "batch_size")}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--config.{name}={value} must be at least 1")
    if c.batch_size % jax.device_count():
        raise ValueError(f"--config.train.batch_size={c.batch_size} must be a multiple of {jax.device_count()} devices")
    if not c.matrix_rate > 0:
        raise ValueError(f"--config.train.matrix_rate={c.matrix_rate} must be positive")
    if c.clip is not None and not c.clip > 0:
        raise ValueError(f"--config.train.clip={c.clip} must be positive; None turns clipping off")
    if c.patience is not None and not c.eval_every:
        raise ValueError(f"--config.train.patience={c.patience} needs --config.train.eval_every")
    if not c.ema:
        raise ValueError("--config.train.ema=() must list one or more decays, such as (0.999,)")
    if not 0 <= c.warmup < c.steps:
        raise ValueError(
            f"--config.train.warmup={c.warmup} must be below --config.train.steps={c.steps}, and not negative"
        )
    examples = c.batch_size * c.repeat
    if c.microbatch is not None and (c.microbatch < 1 or examples % c.microbatch):
        raise ValueError(f"--config.train.microbatch={c.microbatch} must divide the {examples} examples of a batch")
    if c.microbatch is not None and c.microbatch % jax.device_count():
        raise ValueError(f"--config.train.microbatch={c.microbatch} must be a multiple of {jax.device_count()} devices")
    build.check_fields(config)
    build.path(config), objectives.time_sampler(config), build.optimizer(config)
    drawing.sampler_step(config), drawing.time_grid(config)
    guide.interval(config.sample.guidance, config.sample.guidance_low, config.sample.guidance_high)


def rehearse(config: Config, seen: build.Seen, *, fresh: bool = True) -> None:
    """Traces the loss and the drawing without computing, so that what cannot work fails before anything is written.

    Raises:
      ValueError: a field is wrong, or the network does not fit the pictures.
    """
    params = jax.eval_shape(partial(build.init_params, config, seen))
    b = config.train.batch_size
    examples = {"x": jax.ShapeDtypeStruct((b, *seen.shape), np.uint8), "y": jax.ShapeDtypeStruct((b,), np.int32)}
    state = jax.eval_shape(partial(objectives.init_state, config, seen), params)
    jax.eval_shape(objectives.make_step(config, seen), jax.random.key(0), state, examples)
    one = jax.ShapeDtypeStruct((1,), np.int32)
    image = jax.ShapeDtypeStruct((1, *seen.shape), np.uint8)
    if config.process.split is not None:
        jax.eval_shape(drawing.restorer(config, seen), params, one, one, image)
    else:
        low = [jax.eval_shape(partial(drawing.shrunk, config), image)] if config.condition.size else []
        jax.eval_shape(drawing.drawer(config, seen), params, one, one, *low)
    if config.train.init_from is not None and fresh:
        runs.begin_with(Path(config.train.init_from), params)
    if config.train.eval_every or config.process.split is not None or config.condition.size:
        build.source(config, config.data.held_out)


def claim(workdir: Path, resolved: dict[str, Any]) -> None:
    """Makes `workdir` this run's, or makes sure that it already is.

    Raises:
      ValueError: it holds a run with another config; the fields that differ are listed.
      OSError: nothing can be written there.
    """
    files.check_writable(workdir)
    if not (workdir / stored_config.CONFIG).exists():
        stored_config.write_config(workdir, resolved)
        return
    stored = stored_config.read_config(workdir)
    with contextlib.suppress(ValueError, FileNotFoundError):  # one of another version differs, and is refused below
        stored = build.to_stored(*build.stored(workdir))
    differing = stored_config.config_differences(stored, resolved)
    if differing:
        raise ValueError(
            f"{workdir} holds a run with another config (stored -> asked for):\n  "
            + "\n  ".join(differing)
            + "\nPass another --workdir, or the stored values to continue that run."
        )


def fit(
    config: Config, workdir: Path, source: data.Source, params: Any, log: session.Log, stop: session.Stop
) -> tuple[Any, int, float]:
    """Trains from the newest checkpoint, or from `params`, to the end: (averaged parameters, steps, seconds) of it."""
    c = config.train
    seen = build.seen(config, source)
    checkpoints = workdir / "checkpoints"
    if c.init_from is not None and checkpoint.latest(checkpoints) is None:
        params = runs.begin_with(Path(c.init_from), params)
        print(f"beginning with the averaged weights of {c.init_from}")
    state, begin = objectives.init_state(config, seen, params), 0
    if checkpoint.latest(checkpoints) is not None:
        state, begin = checkpoint.restore(checkpoints, state, report=print)
    log.rewind(begin)
    seconds = max((row["seconds"] for row in log.rows() if "seconds" in row), default=0.0)
    held_out = watch.HeldOut(config, seen, workdir, log) if c.eval_every else None
    if begin >= c.steps or (held_out and held_out.exhausted()):
        return state.ema[0], begin, seconds

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    split = jax.sharding.NamedSharding(mesh, jax.P("data"))
    step = jax.jit(objectives.make_step(config, seen), donate_argnums=1)
    state, key = jax.device_put((state, build.key(config.seed, "train")), everywhere)
    batches = data.prefetch(partial(batch, config, source), begin, c.steps)
    preview = watch.Preview(config, seen, workdir, log)

    print(describe(config, source, params))
    print(f"{'continuing after' if begin else 'training from'} step {begin} of {c.steps}, writing to {workdir}")
    with session.Bar(c.steps, "training", "step", begin, seconds) as bar, contextlib.closing(batches):
        for i, examples in batches:
            state, metrics = step(key, state, jax.device_put(examples, split))
            bar.update()
            done, taken = i + 1, state.step
            if done % c.log_every == 0 or done in (1, c.steps):
                check_loss(done, taken, metrics, checkpoints)
                values = {name: float(value) for name, value in metrics.items()}
                # A quarter of the times that this batch has nothing of has no loss.
                values = {name: value for name, value in values.items() if not math.isnan(value)}
                rate = bar.rate() * c.batch_size * c.repeat
                bar.note(f"loss {values['loss']:.4f}, {rate:.0f} images/s")
                log.scalars(done, {**values, "images_per_second": rate, "seconds": bar.seconds()})
            if held_out and (done % c.eval_every == 0 or done == c.steps):
                check_loss(done, taken, metrics, checkpoints)
                held_out.judge(done, state)
            over = done == c.steps or bool(held_out and held_out.exhausted())
            if over and held_out and c.patience is not None:
                state = held_out.best(state)
            stopping = stop.asked  # read once: what is announced as saved must have been saved
            if over or stopping or done % c.save_every == 0:
                check_loss(done, taken, metrics, checkpoints)
                checkpoint.save(checkpoints, done, state)
            if stopping:
                raise session.Stopped(f"Stopped at step {done} of {c.steps}; the same command continues from there.")
            if over:
                break
            if done % c.sample_every == 0:
                with bar.paused():
                    preview(done, state.ema[0])
        return state.ema[0], done, bar.seconds()


def batch(config: Config, source: data.Source, step: int) -> dict[str, np.ndarray]:
    """The training batch of a step, uint8 [B, H, W, C] and labels [B]."""
    c = config.data
    return data.batch(source, config.seed, step, config.train.batch_size, flip=c.flip, shift=c.shift)


def describe(config: Config, source: data.Source, params: Any) -> str:
    """One line: what learns what."""
    count = sum(p.size for p in jax.tree.leaves(params))
    n, *shape = source.images.shape
    tokens = math.prod(geometry(shape[:-1], config.model.patch_size, config.model.stride).grid)
    size = "x".join(map(str, shape))
    return f"{config.model.name}: {count:,} parameters, {tokens} tokens, on {n:,} pictures {size} of {source.name}"


def check_loss(step: int, taken: jax.Array, metrics: dict[str, jax.Array], checkpoints: Path) -> None:
    """Raises FloatingPointError, saying what to do, if a step up to `step` was refused: loss or gradient no number."""
    if int(taken) < step:
        value = float(metrics["loss"] + metrics["grad_norm"])
        when = f"was no number before step {step}" if math.isfinite(value) else f"is {value} at step {step}"
        raise FloatingPointError(
            f"the loss or its gradient {when}; nothing was saved after step "
            f"{checkpoint.latest(checkpoints) or 0}. Lower --config.train.learning_rate (with muon "
            "also matrix_rate) or set --config.train.clip=1.0, with another --workdir."
        )


def dry_run(config: Config) -> None:
    """Prints the resolved config and what a training step would cost; computes nothing."""
    check(config)
    source = build.source(config)
    seen = build.seen(config, source)
    params = jax.eval_shape(partial(build.init_params, config, seen))
    state = jax.eval_shape(partial(objectives.init_state, config, seen), params)
    step = objectives.make_step(config, seen)
    b, shape = config.train.batch_size, source.images.shape[1:]
    examples = {"x": jax.ShapeDtypeStruct((b, *shape), np.uint8), "y": jax.ShapeDtypeStruct((b,), np.int32)}
    lowered = jax.jit(step).lower(jax.random.key(0), state, examples)
    print(json.dumps(to_dict(config), indent=2))
    print(describe(config, source, params))
    print(f"{lowered.cost_analysis()['flops']:.3e} FLOPs per training step, as XLA counts them before optimising")


if __name__ == "__main__":
    session.run(main, define_config)
