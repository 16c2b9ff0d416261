"""What the fields of a config must satisfy before anything is opened: ranges, and an effect on the run."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusion.averages import gamma_of
from experiments.config import Config, Sample

# The paths that are a chain of `config.process.steps` steps.
CHAINS = ("vp", "geometric")
# What a network can learn.
OBJECTIVES = ("denoise", "mean_flow", "progressive", "consistency")
# What the teacher of a distilled run learned.
TEACHERS = {"progressive": ("denoise", "progressive"), "consistency": ("denoise",)}
# Fields that a run which does not learn to denoise cannot be combined with, or has no use for.
_NO_USE = {
    "mean_flow": "process.weighting process.loss_in",
    "progressive": "train.eval_every train.label_drop process.times process.times_mean process.times_std",
    "consistency": "train.eval_every train.label_drop process.weighting process.loss_in process.loss_floor",
}
# What must hold, how it is said, and for which fields; None is no value.
_RANGES: list[tuple[Callable[[Any], bool], str, str]] = [
    (
        lambda v: v >= 1,
        "must be at least 1",
        "process.steps mesh.data mesh.fsdp train.steps train.batch_size train.microbatch train.repeat train.log_every "
        "train.sample_every train.save_every train.snapshot_every train.eval_every train.eval_count train.patience "
        "sample.count sample.steps sample.batch_size sample.order",
    ),
    (
        lambda v: 0 < v < float("inf"),
        "must be positive",
        "process.loss_floor process.noise_scale process.weighting_gamma process.times_std train.learning_rate "
        "train.matrix_rate train.adam_eps train.clip sample.overstep sample.shift sample.churn_high sample.churn_noise "
        "sample.rho sample.sigma_min sample.sigma_max sample.guidance_radius "
        "objective.data_std",
    ),
    (
        lambda v: 0 <= v < float("inf"),
        "must not be negative",
        "process.vlb_weight objective.feature_weight objective.adaptive_power condition.noise condition.sample_noise "
        "train.warmup train.weight_decay data.shift sample.churn sample.churn_low sample.guidance_zero_steps",
    ),
    (
        lambda v: 0 <= v <= 1,
        "must lie in [0, 1]",
        "train.label_drop sample.eta sample.guidance_low sample.guidance_high sample.guidance_rescale "
        "objective.instant objective.to_data objective.feature_until objective.guidance_low objective.guidance_high",
    ),
    (lambda v: 0 < v <= 1, "must lie in (0, 1]", "sample.threshold"),
    (lambda v: 0 < v < 1, "must lie in (0, 1)", "process.rate sample.last"),
    (lambda v: 0 <= v < 1, "must lie in [0, 1)", "train.b2 sample.floor"),
    (
        lambda v: abs(v) < float("inf"),
        "must be a finite number",
        "data.low data.high sample.guidance sample.guidance_parallel objective.guidance objective.scale_power",
    ),
    (lambda v: 1 <= v < float("inf"), "must be at least 1", "objective.scale_max objective.first_steps"),
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
    _check_power(config.train.ema_power)
    for section in ("process", "objective", "train", "sample"):
        for field, needed in without_effect(getattr(config, section)).items():
            _refuse_if_set(config, section, field, f"{section}.{needed}")
    _check_objective(config)
    p, sized = config.process, bool(config.condition.size)
    uses_steps = p.path in CHAINS or p.times in ("grid", "loss_second_moment")
    for section, field, is_used, needed in (
        ("process", "steps", uses_steps, f"process.path={CHAINS[0]}"),
        ("process", "loss_in", p.weighting is None, "process.weighting=None"),
        ("process", "loss_floor", p.weighting is None and p.loss_in is not None, "process.loss_in"),
        ("train", "snapshot_every", bool(config.train.ema_power), 'train.ema_power="(0.05, 0.1)"'),
        ("condition", "noise", sized, "condition.size"),
        ("condition", "sample_noise", sized, "condition.size"),
        ("sample", "steps", config.sample.respacing is None, "sample.respacing=None"),
        ("sample", "floor", p.prediction in ("x0", "eps"), "process.prediction=x0"),
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


def _check_objective(config: Config) -> None:
    """Raises ValueError for what a run that does not learn to denoise cannot be combined with, or lacks."""
    o, p, c, sampler = config.objective, config.process, config.train, config.sample.sampler
    kind = o.kind
    if kind not in OBJECTIVES:
        raise ValueError(f"--config.objective.kind={kind!r} is not one of {', '.join(OBJECTIVES)}")
    if kind != "consistency" and sampler == "consistency":
        raise ValueError(
            "--config.sample.sampler=consistency needs a network that was trained with "
            "--config.objective.kind=consistency"
        )
    if kind == "denoise":
        return
    if o.first_steps > o.last_steps:
        raise ValueError(f"--config.objective.first_steps={o.first_steps} must not exceed last_steps={o.last_steps}")
    if kind in TEACHERS and c.init_from is None:
        raise ValueError(
            f"--config.objective.kind={kind} learns from a trained run: pass --config.train.init_from=runs/NAME"
        )
    names = f"process.snr_splits process.patches process.vlb_weight condition.size {_NO_USE[kind]}".split()
    for name in [*names, *(["process.times"] if p.times == "loss_second_moment" else [])]:
        section, _, field = name.partition(".")
        value, default = (getattr(each, field) for each in (getattr(config, section), type(getattr(config, section))))
        if value and value != default:  # nothing is what such a run does
            raise ValueError(
                f"--config.{name}={value} cannot be combined with --config.objective.kind={kind}: leave it at {default}"
            )
    if kind in TEACHERS and o.guidance != 1 and config.sample.guidance != 1:
        raise ValueError(
            f"--config.sample.guidance={config.sample.guidance} would guide a second time: the network has learned "
            f"--config.objective.guidance={o.guidance} of its teacher; leave it at 1.0"
        )
    if kind == "progressive" and sampler != "ddim":
        raise ValueError(f"--config.sample.sampler={sampler}: progressive distillation learns steps of ddim")
    if kind == "consistency" and sampler != "consistency":
        raise ValueError(
            f"--config.sample.sampler={sampler}: consistency distillation learns steps of the sampler consistency"
        )


def _check_range(given: tuple[float, ...] | None) -> None:
    if given is not None and (len(given) != 2 or not -float("inf") < given[0] < given[1] < float("inf")):
        raise ValueError(
            f'--config.data.range="{tuple(given)}" must be the smallest and the largest value of the arrays, as in '
            '--config.data.range="(0.0, 1.0)"'
        )


def _check_power(given: tuple[float, ...]) -> None:
    for sigma_rel in given:
        try:
            gamma_of(sigma_rel)
        except ValueError as e:
            raise ValueError(f"--config.train.ema_power={tuple(given)}: {e}") from None
    if len(set(given)) < len(given):
        raise ValueError(f"--config.train.ema_power={tuple(given)} lists a width twice")


def without_effect(section: Any) -> dict[str, str]:
    """The fields of a section that were set and have no effect, and what they would need, as "path=geometric"."""
    found = {}
    for each in dataclasses.fields(section):
        for name, only in each.metadata.get("only", {}).items():
            values = only if isinstance(only, tuple) else (only,)
            if getattr(section, each.name) != each.default and getattr(section, name) not in values:
                found[each.name] = f"{name}={' or '.join(map(str, values))}"
    return found


def reset(section: Sample, **chosen: Any) -> Sample:
    """The fields of sampling with those `chosen`, and what then has no effect at its default."""
    changed = dataclasses.replace(section, **chosen)
    return dataclasses.replace(changed, **{name: getattr(Sample, name) for name in without_effect(changed)})


def without_guidance(section: Sample) -> Sample:
    """The fields of sampling with guidance of no kind."""
    return reset(section, guidance=1.0, guidance_kind=Sample.guidance_kind)


def _refuse_if_set(config: Config, section: str, field: str, needed: str) -> None:
    values = getattr(config, section)
    value, default = getattr(values, field), getattr(type(values), field)
    if value != default:
        raise ValueError(
            f"--config.{section}.{field}={value} has no effect on this run: leave it at {default}, or set "
            f"--config.{needed}"
        )


def choose(name: str, value: str, options: dict[str, Any]) -> Any:
    """options[value], or an error that names the flag and the choices."""
    if value not in options:
        raise ValueError(f"--config.{name}={value!r} is not one of {', '.join(map(str, options))}")
    return options[value]


@contextmanager
def named(flag: str) -> Iterator[None]:
    """Puts the name of a flag, or of a section of flags, before the message of a ValueError of the library."""
    try:
        yield
    except ValueError as e:
        raise ValueError(f"--config.{flag}: {e}") from e
