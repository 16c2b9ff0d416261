"""What the fields of a config must satisfy before anything is opened: ranges, and an effect on the run."""

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments.config import Config, Sample

# The paths that are a chain of `config.process.steps` steps.
CHAINS = ("vp", "geometric")
# What must hold, how it is said, and for which fields; None is no value.
_RANGES: list[tuple[Callable[[Any], bool], str, str]] = [
    (
        lambda v: v >= 1,
        "must be at least 1",
        "process.steps train.steps train.batch_size train.microbatch train.repeat train.log_every train.sample_every "
        "train.save_every train.eval_every train.eval_count train.patience sample.count sample.steps sample.batch_size "
        "sample.order",
    ),
    (
        lambda v: 0 < v < float("inf"),
        "must be positive",
        "process.loss_floor process.weighting_gamma process.times_std train.learning_rate train.matrix_rate "
        "train.adam_eps train.clip sample.overstep sample.shift sample.churn_high sample.churn_noise sample.rho "
        "sample.sigma_min sample.sigma_max sample.guidance_radius",
    ),
    (
        lambda v: 0 <= v < float("inf"),
        "must not be negative",
        "process.vlb_weight condition.noise condition.sample_noise train.warmup train.weight_decay data.shift "
        "sample.churn sample.churn_low sample.guidance_zero_steps",
    ),
    (
        lambda v: 0 <= v <= 1,
        "must lie in [0, 1]",
        "train.label_drop sample.eta sample.guidance_low sample.guidance_high sample.guidance_rescale",
    ),
    (lambda v: 0 < v <= 1, "must lie in (0, 1]", "sample.threshold"),
    (lambda v: 0 < v < 1, "must lie in (0, 1)", "process.rate sample.last"),
    (lambda v: 0 <= v < 1, "must lie in [0, 1)", "train.b2"),
    (
        lambda v: abs(v) < float("inf"),
        "must be a finite number",
        "data.low data.high sample.guidance sample.guidance_parallel",
    ),
    (lambda v: -1 < v < 1, "must lie in (-1, 1)", "sample.guidance_momentum"),
    (lambda v: v and all(0 <= decay < 1 for decay in v), "must list decays in [0, 1), such as (0.999,)", "train.ema"),
]


def check(config: Config) -> None:
    """Raises ValueError for a field whose value is out of range or has no effect, naming the flag."""
    for holds, words, names in _RANGES:
        for name in names.split():
            section, _, field = name.partition(".")
            value = getattr(getattr(config, section), field)
            if value is not None and not holds(value):
                raise ValueError(f"--config.{name}={value} {words}")
    _check_range(config.data.range)
    for section in ("process", "train", "sample"):
        for field, needed in without_effect(getattr(config, section)).items():
            _refuse_if_set(config, section, field, f"{section}.{needed}")
    p, sized = config.process, bool(config.condition.size)
    uses_steps = p.path in CHAINS or p.times in ("grid", "loss_second_moment")
    for section, field, is_used, needed in (
        ("process", "steps", uses_steps, f"process.path={CHAINS[0]}"),
        ("process", "loss_in", p.weighting is None, "process.weighting=None"),
        ("process", "loss_floor", p.weighting is None and p.loss_in is not None, "process.loss_in"),
        ("condition", "noise", sized, "condition.size"),
        ("condition", "sample_noise", sized, "condition.size"),
        ("sample", "steps", config.sample.respacing is None, "sample.respacing=None"),
        ("sample", "sigma_min", config.sample.rho is not None, "sample.rho=7.0"),
        ("sample", "sigma_max", config.sample.rho is not None, "sample.rho=7.0"),
        (
            "model",
            "num_heads",
            getattr(config.model, "num_head_channels", None) is None,
            "model.num_head_channels=None",
        ),
    ):
        if not is_used and hasattr(getattr(config, section), field):
            _refuse_if_set(config, section, field, needed)


def _check_range(given: tuple[float, ...] | None) -> None:
    if given is not None and (len(given) != 2 or not -float("inf") < given[0] < given[1] < float("inf")):
        raise ValueError(
            f'--config.data.range="{tuple(given)}" must be the smallest and the largest value of the arrays, as in '
            '--config.data.range="(0.0, 1.0)"'
        )


def without_effect(section: Any) -> dict[str, str]:
    """The fields of a section that were set and have no effect, and what they would need, as "path=geometric"."""
    found = {}
    for each in dataclasses.fields(section):
        for name, only in each.metadata.get("only", {}).items():
            values = only if isinstance(only, tuple) else (only,)
            if getattr(section, each.name) != each.default and getattr(section, name) not in values:
                found[each.name] = f"{name}={' or '.join(map(str, values))}"
    return found


def without_guidance(section: Sample) -> Sample:
    """The fields of sampling with guidance of no kind."""
    plain = dataclasses.replace(section, guidance=1.0, guidance_kind=Sample.guidance_kind)
    return dataclasses.replace(plain, **{name: getattr(Sample, name) for name in without_effect(plain)})


def _refuse_if_set(config: Config, section: str, field: str, needed: str) -> None:
    values = getattr(config, section)
    value, default = getattr(values, field), getattr(type(values), field)
    if value != default:
        raise ValueError(
            f"--config.{section}.{field}={value} has no effect on this run: leave it at {default}, or set "
            f"--config.{needed}"
        )
