"""Guidance by the names in the config: of a denoiser, or of a sampler where guidance remembers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from diffusion import guide, process, sample
from diffusion.methods import guidance as variants
from diffusion.methods import meanflow
from diffusion.predict import Denoise
from experiments.checks import choose, named
from experiments.config import Config


def scale(config: Config) -> guide.Scale:
    """The guidance scale of sampling, a number, or a function of t where guidance has an interval."""
    return _scale(config, config.sample.guidance)


def _scale(config: Config, scale: guide.Scale) -> guide.Scale:
    """The scale, inside the interval of `config.sample` only."""
    c = config.sample
    whole = (c.guidance_low, c.guidance_high, c.guidance_open) == (0, 1, False)
    if whole or (isinstance(scale, float | int) and scale in (0, 1)):
        return scale
    # All noise, t = 1, where sampling starts, is no end of an interval that reaches it.
    high = np.inf if c.guidance_open and c.guidance_high == 1 else c.guidance_high
    with named("sample.guidance_low, guidance_high"):
        return guide.interval(scale, c.guidance_low, high, open_ends=c.guidance_open)


def guidance(config: Config, path: process.Path, grid: np.ndarray) -> Callable[[Denoise, Any], Denoise]:
    """(denoiser, null condition) -> denoiser with guidance, for steps along `grid` [steps + 1].

    Raises:
      ValueError: there is no such guidance, or it does not fit the sampler, the steps or the objective.
    """
    c, factor = config.sample, scale(config)
    about = {"path": path, "prediction": config.process.prediction}
    if config.objective.kind == "mean_flow":
        return _told(config)
    options = {
        "classifier_free": lambda: partial(guide.classifier_free, scale=factor),
        "rescale": lambda: partial(variants.rescale, scale=factor, phi=c.guidance_rescale),
        "cfg_zero": lambda: partial(variants.zero, scale=factor, still_above=_time_after(config, grid), **about),
        "apg": lambda: partial(variants.apg, scale=factor, eta=c.guidance_parallel, radius=c.guidance_radius, **about),
        "cfg_plus_plus": lambda: partial(guide.classifier_free, scale=_plus_plus(config, path, grid)),
    }
    return choose("sample.guidance_kind", c.guidance_kind, options)()


def _told(config: Config) -> Callable[[Denoise, Any], Denoise]:
    """Guidance of a mean-flow network, which is told the scale and the interval."""
    c = config.sample
    if c.guidance_kind != "classifier_free" or c.guidance_open:
        raise ValueError(
            f"--config.sample.guidance_kind={c.guidance_kind} and guidance_open={c.guidance_open}: a mean-flow network "
            "is its own guided version; leave them at classifier_free and False"
        )
    if not 1 <= c.guidance <= config.objective.scale_max:
        raise ValueError(
            f"--config.sample.guidance={c.guidance} must lie in [1, {config.objective.scale_max}], the scales that the "
            "network is trained with, --config.objective.scale_max"
        )
    if not c.guidance_low <= 0.5 <= c.guidance_high:
        raise ValueError(
            f"--config.sample.guidance_low={c.guidance_low} must be at most 0.5 and guidance_high={c.guidance_high} at "
            "least 0.5, as the intervals that a mean-flow network is trained with"
        )
    return lambda denoise, null: meanflow.told(denoise, c.guidance, c.guidance_low, c.guidance_high)


def _time_after(config: Config, grid: np.ndarray) -> float:
    """The time after the first steps, in which CFG-Zero* stands still."""
    steps = config.sample.guidance_zero_steps
    if steps >= len(grid) - 1:
        raise ValueError(f"--config.sample.guidance_zero_steps={steps} must be fewer than the {len(grid) - 1} steps")
    # A little later, so that the rounding of the grid to float32 does not make a step of it.
    return float(grid[steps] + 1e-3 * (grid[steps] - grid[steps + 1])) if steps else float("inf")


def _plus_plus(config: Config, path: process.Path, grid: np.ndarray) -> guide.Scale:
    c = config.sample
    if (c.sampler, c.eta, c.overstep) != ("ddim", 0, 1):
        raise ValueError(
            "--config.sample.guidance_kind=cfg_plus_plus is a step of DDIM without noise: set "
            f"--config.sample.sampler=ddim, with eta=0.0 and overstep=1.0, not sampler={c.sampler}"
        )
    if not 0 <= c.guidance <= 1:
        raise ValueError(
            f"--config.sample.guidance={c.guidance} must lie in [0, 1] for guidance_kind=cfg_plus_plus, such as 0.6"
        )
    return _scale(config, variants.plus_plus(c.guidance, path, grid))


def guided_sampler(config: Config) -> Callable[..., sample.Sampler] | None:
    """(sampler, denoiser, null condition, prediction=) -> sampler with guidance that remembers; None for no such.

    Raises:
      ValueError: estimates are clipped, which such guidance would undo.
    """
    c = config.sample
    if not c.guidance_momentum:
        return None
    if c.clip or c.threshold is not None:
        raise ValueError(
            f"--config.sample.guidance_momentum={c.guidance_momentum} acts after estimates are clipped, and undoes it: "
            "leave out sample.clip and sample.threshold, or the momentum"
        )
    options = {"momentum": c.guidance_momentum, "eta": c.guidance_parallel, "radius": c.guidance_radius}
    return partial(variants.apg_momentum, scale=scale(config), **options)
