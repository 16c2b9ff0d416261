"""What a run learns, by `config.objective`: to denoise, or a method that samples in few steps, and its options."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from diffusion import guide
from diffusion.methods import distill, meanflow
from diffusion.models import Model, classifier
from diffusion.predict import Denoise
from diffusion.process import Path
from experiments.checks import choose, named
from experiments.config import Config


class MeanFlow(NamedTuple):
    """Options of `meanflow.draw` and of `meanflow.loss_at`; its features by their name, for `features`."""

    draw: dict[str, float]
    loss: dict[str, Any]


class Progressive(NamedTuple):
    """Progressive distillation: guidance of the teacher."""

    guidance: Callable[[Denoise, Any], Denoise]


class Consistency(NamedTuple):
    """Consistency distillation: guidance of the teacher, and the options of `distill.consistency_times`."""

    guidance: Callable[[Denoise, Any], Denoise]
    times: dict[str, int]


Method = MeanFlow | Progressive | Consistency


def method(config: Config, shape: tuple[int, ...]) -> Method | None:
    """What a run on images of `shape` [H, W, C] learns; None: to denoise.

    Raises:
      ValueError: there are no such features for the loss, or they are not for such images.
    """
    c, p = config.objective, config.process
    if c.kind == "mean_flow":
        shares = {name: getattr(c, name) for name in ("instant", "to_data", "scale_max", "scale_power")}
        used = dict(feature_weight=c.feature_weight, feature_until=c.feature_until) if c.features else {}
        choose("objective.features", c.features, dict.fromkeys((None, "digits", "efficientnet")))
        with named("objective.features"):
            features = _features(config, shape)
        floor = p.loss_floor * p.noise_scale  # of t, and the loss takes that of sigma
        return MeanFlow(shares, dict(floor=floor, power=c.adaptive_power, features=features, **used))
    guidance = _guidance(config)
    options = {
        "denoise": lambda: None,
        "progressive": lambda: Progressive(guidance),
        "consistency": lambda: Consistency(
            guidance, dict(steps=config.train.steps, first=c.first_steps, last=c.last_steps)
        ),
    }
    return options[c.kind]()


def told(model: Model) -> Model:
    """A mean-flow network as one of plain conditions, without guidance unless y is `meanflow.Guided`."""
    return Model(
        model.init,
        lambda params, xt, t, y=None, *, key=None: meanflow.told(partial(model.apply, params, key=key))(xt, t, y),
    )


def anchored(model: Model, config: Config, path: Path) -> Model:
    """The network of a consistency model, which returns its input at t = 0."""
    fixed = dict(prediction=config.process.prediction, data_std=config.objective.data_std)
    return Model(
        model.init,
        lambda params, xt, t, y=None, *, key=None: distill.anchored(
            partial(model.apply, params, key=key), path, **fixed
        )(xt, t, y),
    )


def _features(config: Config, shape: tuple[int, ...]) -> str | None:
    """The name of the features in the config, which must be for images of this shape."""
    name = config.objective.features
    if name == "digits" and shape != classifier.SIZE:
        raise ValueError(f"digits must have shape {classifier.SIZE}, not {shape}; take efficientnet")
    if name == "efficientnet" and (len(shape) != 3 or shape[-1] not in (1, 3)):
        raise ValueError(f"efficientnet is for images with 1 or 3 channels, not for arrays of shape {shape}")
    return name


def features(name: str | None, low: float, high: float) -> Callable[[jax.Array], jax.Array] | None:
    """Differentiable features [B, F], by their name, of images of values from `low` to `high`; loads their weights.

    Raises:
      ImportError: the package with the weights is not installed; the message says how to.
    """
    from diffusion.metrics.features import digits, efficientnet
    from diffusion.models import efficientnet as network

    if name is None:
        return None
    if name == "digits":
        params = digits.load_classifier()
        return lambda x: classifier.apply(params, (x - low) / (high - low))[1]
    efficientnet.check_installed()
    weights = efficientnet.load_weights()
    scaled = lambda x: efficientnet.resized(255 * (x - low) / (high - low))  # noqa: E731
    return lambda x: network.apply(weights, (scaled(x) - 127) / 128)[0]


def _guidance(config: Config) -> Callable[[Denoise, Any], Denoise]:
    c, scale = config.objective, config.objective.guidance
    if scale not in (0, 1) and (c.guidance_low, c.guidance_high) != (0, 1):
        with named("objective.guidance_low, guidance_high"):
            scale = guide.interval(scale, c.guidance_low, c.guidance_high)
    return partial(guide.classifier_free, scale=scale)
