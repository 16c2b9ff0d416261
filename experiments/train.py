"""Trains a diffusion model and shows what it draws.

    python -m experiments.train                                              digits, in minutes on a CPU
    python -m experiments.train --config=experiments/configs/blog.py         the blog's model
    python -m experiments.train --config=experiments/configs/patch_unet_mnist.py    a U-Net on patches
    python -m experiments.train --config.data.name=folder:PATH --config.data.size="(64, 64)" --workdir=runs/mine

The same command continues a run that was stopped, bit for bit. `--dry_run` prints what would be trained.
"""

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import json
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from diffusion import checkpoint, data, guide
from diffusion import train as training
from diffusion.geometry import geometry
from experiments import build, drawing, measure, pictures, runs, session
from experiments import objective as objectives
from experiments.config import Config, to_dict

_CONFIGS = Path(__file__).parent / "configs"
# Fields that the command line sets to None, for which ml_collections has no word.
_NONE: list[str] = []

flags.declare_key_flag("workdir")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the resolved config, size and cost of the network, and stop.")
_SPLIT = flags.DEFINE_integer("split", None, "Which SNR expert to train; short for --config.process.split.")
_TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "Also write TensorBoard events (needs the tensorboard extra).")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; fields are set as in --config.train.steps=100")
    config = given_config()
    session.start()
    if _DRY_RUN.value:
        dry_run(config)
    else:
        train(config, session.workdir(default_workdir(config)), tensorboard=_TENSORBOARD.value)


def default_workdir(config: Config) -> Path:
    """Where a run goes if nothing else is said: experts side by side."""
    split = config.process.split
    return Path("runs") / (config.name if split is None else f"{config.name}_split{split}")


def define_config(argv: list[str]) -> None:
    """Defines --config, and a flag for every field of it that `argv` sets.

    Raises:
      ValueError: there is no such field; the nearest one is named.
      FileNotFoundError: there is no such config file.
    """
    known = fields(Config)
    _NONE.clear()
    for argument in argv[1:]:
        name, _, value = argument.lstrip("-").partition("=")
        field = name.removeprefix("no").removeprefix("config.")
        if argument.startswith("-") and name.removeprefix("no").startswith("config.") and field not in known:
            raise ValueError(f"there is no field --config.{field}; the nearest is --config.{nearest(field, known)}")
        if argument.startswith("-") and name == "config" and value and not Path(value.partition(":")[0]).is_file():
            shipped = ", ".join(sorted(p.stem for p in _CONFIGS.glob("[a-z]*.py")))
            raise FileNotFoundError(f"--config={value}: there is no such file; in {_CONFIGS} there are {shipped}")
        if value == "None" and type(None) in get_args(known.get(field)):
            _NONE.append(field)
            argv.remove(argument)
    check_variant(argv)
    explanation = "Config file; its fields, explained in experiments/config.py, are flags: --config.model.depth=8."
    config_flags.DEFINE_config_file("config", str(_CONFIGS / "mnist.py"), explanation, sys_argv=argv)


def check_variant(argv: list[str]) -> None:
    """Raises ValueError if --config=FILE:VARIANT names a variant that one of the shipped files does not have."""
    for argument in argv[1:]:
        name, _, value = argument.lstrip("-").partition("=")
        path, colon, variant = value.partition(":")
        if name != "config" or not colon or Path(path).resolve().parent != _CONFIGS.resolve():
            continue
        get_config = importlib.import_module(f"experiments.configs.{Path(path).stem}").get_config
        if not inspect.signature(get_config).parameters:
            raise ValueError(f"--config={value}: {Path(path).name} has no variants")
        get_config(variant)


def given_config() -> Config:
    """The config that the command line gives."""
    config: Config = flags.FLAGS.config
    for field in _NONE:
        section, _, name = field.rpartition(".")
        setattr(getattr(config, section) if section else config, name, None)
    if _SPLIT.value is not None:
        if config.process.split not in (None, _SPLIT.value):
            raise ValueError(f"--split={_SPLIT.value}, but the config is that of expert {config.process.split}")
        config.process.split = _SPLIT.value
    check_lists(config)
    return config


def check_lists(config: Config) -> None:
    """Raises ValueError for a list on the command line with something else in it than its field holds."""
    for name, hint in fields(Config).items():
        section, _, field = name.rpartition(".")
        value = getattr(getattr(config, section) if section else config, field)
        lists = [part for part in (hint, *get_args(hint)) if get_origin(part) is tuple]
        element = get_args(lists[0])[0] if lists else None
        kinds = {float: (int, float), int: int, str: str}.get(element)
        if kinds and value is not None and not all(isinstance(v, kinds) for v in value):
            example = {float: "(1, 1.5)", int: "(16, 8)", str: "('sincos', 'rotary')"}[element]
            raise ValueError(f"--config.{name}={value} must list values of type {element.__name__}, as in {example}")


def fields(cls: type) -> dict[str, Any]:
    """Dotted names of all fields of a dataclass and of those inside it, "seed", "model.depth", and their types."""
    names = {}
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            names |= {f"{name}.{inner}": inner_hint for inner, inner_hint in fields(hint).items()}
        else:
            names[name] = hint
    return names


def nearest(name: str, known: Iterable[str]) -> str:
    """The name in `known` that was meant by `name`: the same field of another section, else the most similar."""
    own = name.rpartition(".")[2]
    elsewhere = [k for k in known if k.rpartition(".")[2] == own]
    return difflib.get_close_matches(name, elsewhere or list(known), 1, 0.0)[0]


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
    checkpoint.check_writable(workdir)
    if not (workdir / checkpoint.CONFIG).exists():
        checkpoint.write_config(workdir, resolved)
        return
    differing = checkpoint.config_differences(checkpoint.read_config(workdir), resolved)
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
    held_out = HeldOut(config, seen, workdir, log) if c.eval_every else None
    if begin >= c.steps or (held_out and held_out.exhausted()):
        return state.ema[0], begin, seconds

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    split = jax.sharding.NamedSharding(mesh, jax.P("data"))
    step = jax.jit(objectives.make_step(config, seen), donate_argnums=1)
    state, key = jax.device_put((state, build.key(config.seed, "train")), everywhere)
    batches = data.prefetch(partial(batch, config, source), begin, c.steps)
    preview = Preview(config, seen, workdir, log)

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


class HeldOut:
    """Loss on a fixed set of noised held-out pictures; remembers the best weights and when to give up."""

    def __init__(self, config: Config, seen: build.Seen, workdir: Path, log: session.Log) -> None:
        c = config.train
        self._patience, self._log, self._kept = c.patience, log, workdir / "best"
        held = data.batch(build.source(config, config.data.held_out), config.seed, 0, -(-c.eval_count // c.repeat))
        parts = objectives.objective(config, seen, training=False)

        def loss(params: Any) -> jax.Array:
            # The key is made inside, anew each time: every measurement is of the same noise.
            key = build.key(config.seed, "held out")
            return parts.loss(params, key, parts.draw(key, held, None))[0]

        self._loss = jax.jit(loss)

    def losses(self) -> dict[int, float]:
        """Step to loss, of every measurement so far."""
        return {row["step"]: row["held_out_loss"] for row in self._log.rows() if "held_out_loss" in row}

    def judge(self, step: int, state: training.State) -> None:
        """Measures, and keeps the weights if they are the best so far."""
        before = self.losses()
        value = float(self._loss(state.ema[0]))
        self._log.scalars(step, {"held_out_loss": value})
        if self._patience is not None and value < min(before.values(), default=math.inf):
            checkpoint.save(self._kept, step, state, keep=1)

    def exhausted(self) -> bool:
        """Whether the last `patience` measurements brought nothing better."""
        losses = self.losses()
        if self._patience is None or not losses:
            return False
        best = min(losses, key=losses.get)
        return sum(step > best for step in losses) >= self._patience

    def best(self, state: training.State) -> training.State:
        """The best weights, in the form of `state`."""
        state, step = checkpoint.restore(self._kept, state, report=print)
        print(f"\nheld-out loss was lowest after step {step}: those weights are kept")
        return state


class Preview:
    """A grid of what the averaged weights draw, from the same noise every time, as training goes.

    An expert restores held-out pictures instead: below each row of them, noised, is what it makes of them. A network
    that enlarges pictures enlarges held-out ones.
    """

    def __init__(self, config: Config, seen: build.Seen, workdir: Path, log: session.Log) -> None:
        self._columns = min(seen.num_classes, 10) or 8
        self._labels = measure.equal_share(4 * self._columns, seen.num_classes)
        self._beside, self._batch_size = None, config.sample.batch_size
        self._expert = config.process.split is not None
        if self._expert or config.condition.size:
            held = measure.held_out(config, self._labels)
            self._beside = held if self._expert else np.asarray(drawing.shrunk(config, held))
        self._draw = drawing.restorer(config, seen) if self._expert else drawing.drawer(config, seen)
        self._folder, self._log = workdir / "previews", log

    def __call__(self, step: int, params: Any) -> None:
        batches = drawing.in_batches(self._draw, params, self._labels, self._batch_size, self._beside)
        drawn = np.concatenate(list(batches))
        if self._expert:  # [N, 2, H, W, C] to a row of noised pictures, one of restored ones, and so on
            drawn = drawn.reshape(-1, self._columns, *drawn.shape[1:]).swapaxes(1, 2).reshape(-1, *drawn.shape[2:])
        image = pictures.grid(drawn, self._columns)
        self._folder.mkdir(exist_ok=True)
        pictures.save(self._folder / f"{step:07d}.png", image)
        self._log.image(step, "samples", np.asarray(image))


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
            f"{checkpoint.latest(checkpoints) or 0}. Lower --config.train.learning_rate or set "
            "--config.train.clip=1.0, with another --workdir."
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
