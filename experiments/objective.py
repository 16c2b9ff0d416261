"""From a config to a step of training: what is drawn for a batch, its loss, and what is remembered and reported."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion import superres, experts, guide, times, train
from diffusion import loss as losses
from diffusion.patch import patchify
from experiments import build
from experiments.config import Config

# Where float16's loss scaling begins, log2.
_SCALE = 20.0


class Objective(NamedTuple):
    """The loss of a run, in the parts that `train.make_step` takes; a batch is {"x": uint8 [B, H, W, C], "y": [B]}."""

    draw: train.DrawFn  # (key, batch, carry) -> all that is random: noise, times, dropped labels
    loss: train.LossFn  # (params, key, drawn) -> (mean, {"loss": [B], "t": [B], ...})
    report: train.ReportFn
    carry: Any  # what is remembered before the first step


def objective(config: Config, seen: build.Seen, *, training: bool = True) -> Objective:
    """The objective of `config`; without `training`, no label is dropped, no unit is, and times ignore the past.

    Raises:
      ValueError: fields of the process do not fit each other.
    """
    c, classes = config.process, seen.num_classes
    build.check_fields(config)
    noising, model, times, bound = build.path(config), build.network(config, seen), time_sampler(config), _bound(config)
    space = partial(patchify, patch_size=config.model.patch_size, stride=config.model.stride) if c.patches else None
    weight = _weight(config)
    if config.condition.size:
        check_condition(config, seen)

    def draw(key: jax.Array, batch: dict[str, jax.Array], carry: Any) -> dict[str, Any]:
        key_loss, key_labels, key_condition = jax.random.split(key, 3)
        x0 = jnp.repeat(build.to_float(config, batch["x"]), config.train.repeat, 0)
        drawn = {"x0": x0}
        if classes:
            y = jnp.repeat(batch["y"], config.train.repeat, 0)
            drawn["y"] = guide.drop_labels(key_labels, y, classes, config.train.label_drop if training else 0.0)
        if config.condition.size:
            drawn["planes"] = planes(config, key_condition, x0)
        now = times.times(carry) if training and isinstance(carry, times.History) else times
        return drawn | {"at": losses.draw(key_loss, x0, now)}

    def loss(params: Any, key: jax.Array, drawn: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        denoise = partial(model.apply, params, key=key if training and config.model.dropout else None)
        if config.condition.size:
            denoise = superres.conditioned(denoise, drawn["planes"])
        values, parts = losses.loss_at(
            drawn["at"],
            denoise,
            noising,
            drawn["x0"],
            drawn.get("y"),
            prediction=c.prediction,
            weight=weight,
            space=space,
            bound=bound,
        )
        return values.mean(), parts

    def report(parts: dict[str, jax.Array], carry: Any) -> tuple[dict[str, jax.Array], Any]:
        metrics = losses.by_quartile(parts["t"], parts["loss"])
        metrics |= {name: parts[name].mean() for name in ("mse", "bound") if name in parts}
        if isinstance(carry, times.History):
            carry = times.remember(carry, parts["t"], parts["loss"])
        return metrics, carry

    carry = times.empty(c.steps) if c.times == "loss_second_moment" else None
    return Objective(draw, loss, report, carry)


def make_step(config: Config, seen: build.Seen) -> train.StepFn:
    """(key, state, batch) -> (state, metrics): one step of training."""
    parts, c = objective(config, seen), config.train
    return train.make_step(
        parts.loss,
        build.optimizer(config),
        ema_decay=c.ema,
        draw=parts.draw,
        report=parts.report,
        microbatch=c.microbatch,
    )


def init_state(config: Config, seen: build.Seen, params: Any) -> train.State:
    """The state before the first of these steps."""
    return train.init_state(
        params,
        build.optimizer(config),
        ema_decay=config.train.ema,
        log2_scale=_SCALE if config.model.dtype == "float16" else None,
        carry=objective(config, seen).carry,
    )


def planes(config: Config, key: jax.Array, x0: jax.Array) -> jax.Array:
    """What the network sees beside the noisy pictures of x0 [B, H, W, C] in training."""
    c = config.condition
    low = superres.shrink(x0, c.size)
    if not c.noise:
        return superres.planes(low, x0.shape[1:-1])
    key_level, key_noise = jax.random.split(key)
    level = c.noise * jax.random.uniform(key_level, x0.shape[:1])
    low = low + level[:, None, None, None] * jax.random.normal(key_noise, low.shape)
    return superres.planes(low, x0.shape[1:-1], level)


def check_condition(config: Config, seen: build.Seen) -> None:
    """Raises ValueError if pictures cannot be conditioned as asked."""
    c = config.condition
    for name in ("noise", "sample_noise"):
        if not getattr(c, name) >= 0:
            raise ValueError(f"--config.condition.{name}={getattr(c, name)} must not be negative")
    if c.sample_noise > c.noise:
        raise ValueError(
            f"--config.condition.sample_noise={c.sample_noise} must not exceed --config.condition.noise={c.noise}, the "
            "most that the network has seen"
        )
    try:
        superres.shrink(jnp.zeros((1, *seen.shape)), c.size)
    except ValueError as e:
        raise ValueError(f"--config.condition.size: {e}") from e


def time_sampler(config: Config) -> losses.Times:
    """The time sampler of the loss, before anything is remembered.

    Raises:
      ValueError: there is none of that name, or it does not fit experts.
    """
    c = config.process
    if c.split is not None or c.snr_splits:
        return _expert_times(config)
    options = {
        "uniform": lambda: losses.uniform_times,
        "antithetic": lambda: losses.antithetic_times,
        "logit_normal": lambda: losses.logit_normal_times(c.times_mean, c.times_std),
        "grid": lambda: losses.grid_times(c.steps, first=1 if c.path == "vp" else 0),
        "loss_second_moment": lambda: losses.listed_times(build.chain(config)[:-1]),
    }
    return build.choose("process.times", c.times, options)()


def _expert_times(config: Config) -> losses.Times:
    c = config.process
    bounds = build.boundaries(config)
    if c.split is None or not 0 <= c.split <= len(bounds):
        raise ValueError(
            f"--config.process.split={c.split}: with snr_splits={c.snr_splits} train one expert at a time, "
            f"--split=0 to --split={len(bounds)}"
        )
    options = {
        "uniform": lambda: experts.expert_times(bounds, c.split),
        "grid": lambda: experts.expert_times(bounds, c.split, build.chain(config)),
    }
    if c.times not in options:
        raise ValueError(f"--config.process.times={c.times} is not one of {', '.join(options)}, which experts can have")
    return options[c.times]()


def _weight(config: Config) -> losses.Weight | None:
    c = config.process
    if c.weighting is not None:
        return losses.weighting(c.weighting, c.prediction, gamma=c.weighting_gamma, bias=c.weighting_bias)
    return None if c.loss_in in (None, c.prediction) else losses.measured_in(c.loss_in, c.prediction, c.loss_floor)


def _bound(config: Config) -> losses.Bound | None:
    c = config.process
    if not c.bound:
        if c.variance.startswith("learned"):
            raise ValueError(
                f"--config.process.variance={c.variance} is learned from the variational term: set "
                "--config.process.bound=1.0"
            )
        if c.bound_alone:
            raise ValueError("--config.process.bound_alone needs a weight, --config.process.bound")
        return None
    if not c.bound > 0:
        raise ValueError(f"--config.process.bound={c.bound} must not be negative")
    if c.times not in ("grid", "loss_second_moment") or c.path != "vp":
        raise ValueError(
            f"--config.process.bound={c.bound} is measured between steps of a chain: it needs "
            f"--config.process.path=vp and times=grid or loss_second_moment, not path={c.path}, times={c.times}"
        )
    if (config.data.low, config.data.high) != (-1, 1):
        raise ValueError(
            f"--config.process.bound={c.bound} needs pictures in [-1, 1], not [{config.data.low}, {config.data.high}]"
        )
    return losses.Bound(build.chain(config), c.variance, c.bound, c.bound_alone)
