"""From a config and trained parameters to pictures: the denoiser with all that guides it, the sampler, the drawing."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import superres, experts, guide
from diffusion import sample as sampling
from diffusion.models import recomposed
from diffusion.predict import Denoise
from diffusion.process import noise
from experiments import build
from experiments.config import Config

Draw = Callable[..., Any]


def denoiser(
    config: Config, seen: build.Seen, params: Any, planes: jax.Array | None = None, team: Sequence[Config] = ()
) -> Denoise:
    """The trained denoiser in pictures, with the config's guidance and thresholds.

    Args:
      params: of the network, or with a `team` of experts, in the order of their SNR, a tuple of each one's.
      planes: what a conditional network sees beside xt.
    """
    c, prediction = config.sample, config.process.prediction
    if team:
        answers = [partial(_network(member, seen).apply, p) for member, p in zip(team, params, strict=True)]
        denoise = experts.experts(answers, build.boundaries(config))
    else:
        denoise = partial(_network(config, seen).apply, params)
    if planes is not None:
        denoise = superres.conditioned(denoise, planes)
    if seen.num_classes:
        scale = c.guidance if c.guidance in (0, 1) else guide.interval(c.guidance, c.guidance_low, c.guidance_high)
        denoise = guide.classifier_free(denoise, seen.num_classes, scale)
    low, high = config.data.low, config.data.high
    if c.threshold is not None and c.clip:
        raise ValueError(f"--config.sample.threshold={c.threshold} keeps estimates in range already: leave out clip")
    if c.threshold is not None:
        denoise = guide.dynamic_threshold(denoise, build.path(config), prediction, c.threshold, low, high)
    elif c.clip:
        denoise = guide.clip(denoise, build.path(config), prediction, low, high)
    return denoise


def _network(config: Config, seen: build.Seen) -> Any:
    model = build.network(config, seen)
    return recomposed(model, config.model.patch_size, config.model.stride) if config.process.patches else model


def sampler_step(config: Config) -> sampling.Step:
    """One step of the configured sampler."""
    c = config.sample
    options = {
        "ddim": lambda: sampling.ddim(c.eta, c.overstep),
        "ancestral": lambda: sampling.ancestral(config.process.variance),
        "heun": sampling.heun,
    }
    for name, default in {"overstep": 1.0, "eta": 0.0}.items():
        if getattr(c, name) != default and c.sampler != "ddim":
            raise ValueError(
                f"--config.sample.{name}={getattr(c, name)} belongs to the ddim sampler, not to {c.sampler}"
            )
    return build.choose("sample.sampler", c.sampler, options)()


def time_grid(config: Config) -> np.ndarray:
    """The falling times of the sampler, [steps + 1]."""
    c = config.sample
    if c.respacing is not None:
        if (c.shift, c.last) != (1, None):
            raise ValueError(
                f"--config.sample.respacing={c.respacing!r} names the steps: leave out sample.shift and sample.last"
            )
        build.chain(config)
        return sampling.respaced_grid(c.respacing, config.process.steps)
    # Where no data is left (alpha = 0) a prediction of eps says nothing about it: begin just below.
    blind = config.process.prediction == "eps" and float(build.path(config)(jnp.ones(()))[0]) < 1e-6
    return sampling.shifted_grid(c.steps, c.shift, 0.999 if blind else 1.0, c.last if c.steps > 1 else None)


def expert_grid(config: Config) -> np.ndarray:
    """The times at which one expert restores pictures: those of its own range, and 0, where it leaps to the data."""
    bounds, split, grid = build.boundaries(config), config.process.split, time_grid(config)[:-1]
    own = experts.own_times(bounds, split, grid)
    if not len(own):  # the sampler takes fewer steps than there are ranges
        own = np.array([np.concatenate([[0], bounds, [1]])[split : split + 2].mean()])
    return np.append(own, 0.0)


def drawer(config: Config, seen: build.Seen, keep: int | None = None, team: Sequence[Config] = ()) -> Draw:
    """Compiled (params, index [B], y [B], low uint8 [B, h, w, C] | None) -> uint8 pictures [B, H, W, C].

    With `keep`, also frames [keep, B, H, W, C]. `low` is the smaller picture of a network conditioned on one, `team`
    the configs of all experts. Picture i depends on the sample seed, its number i, its label and its `low` alone.
    """
    step, grid, noising = sampler_step(config), time_grid(config), build.path(config)
    sample_key = build.key(config.sample.seed, "sample")

    @jax.jit
    def draw(params: Any, index: jax.Array, y: jax.Array, low: jax.Array | None = None) -> Any:
        keys = sampling.sample_keys(sample_key, index)
        drawn = sampling.sample(
            keys,
            denoiser(config, seen, params, beside(config, seen, keys, low), team),
            noising,
            sampling.initial_noise(keys, seen.shape),
            grid,
            y if seen.num_classes else None,
            prediction=config.process.prediction,
            step=step,
            keep=keep,
        )
        return jax.tree.map(partial(build.to_uint8, config), drawn)

    return draw


def restorer(config: Config, seen: build.Seen) -> Draw:
    """Compiled (params, index [B], y [B], images uint8 [B, H, W, C]) -> uint8 [B, 2, H, W, C]: noised, and restored.

    Alone an expert draws nothing: pictures are noised to the top of its range, and it takes them through that range.
    """
    step, grid, noising = sampler_step(config), expert_grid(config), build.path(config)
    sample_key = build.key(config.sample.seed, "sample")

    @jax.jit
    def restore(params: Any, index: jax.Array, y: jax.Array, images: jax.Array) -> jax.Array:
        keys = sampling.sample_keys(sample_key, index)
        x0 = build.to_float(config, images)
        x1 = noise(noising, x0, jnp.full(len(x0), grid[0]), sampling.initial_noise(keys, seen.shape))
        x0_hat = sampling.sample(
            keys,
            denoiser(config, seen, params, beside(config, seen, keys, shrunk(config, images))),
            noising,
            x1,
            grid,
            y if seen.num_classes else None,
            prediction=config.process.prediction,
            step=step,
        )
        return build.to_uint8(config, jnp.stack([x1, x0_hat], 1))

    return restore


def beside(config: Config, seen: build.Seen, keys: jax.Array, low: jax.Array | None) -> jax.Array | None:
    """What a conditional network sees beside xt, from pictures uint8 [B, h, w, C]; None for any other network."""
    c = config.condition
    if not c.size:
        return None
    if low is None:
        raise ValueError("this network enlarges pictures: it needs smaller ones to start from")
    x = build.to_float(config, low)
    if not c.noise:
        return superres.planes(x, seen.shape[:-1])
    # Steps fold in their numbers, and the start of sampling the number above this one.
    z = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 2**31 - 2), x.shape[1:]))(keys)
    return superres.planes(x + c.sample_noise * z, seen.shape[:-1], jnp.full(len(x), c.sample_noise))


def shrunk(config: Config, images: jax.Array) -> jax.Array | None:
    """The smaller ones of pictures uint8 [B, H, W, C], as a conditional network takes them; None for any other."""
    if not config.condition.size:
        return None
    return build.to_uint8(config, superres.shrink(build.to_float(config, images), config.condition.size))


def in_batches(
    draw: Draw, params: Any, labels: np.ndarray, batch_size: int, pictures: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Draws pictures 0..len(labels) - 1 batch by batch; the last one is filled up, so that one program serves all.

    `pictures` [N, ...] are those that `draw` starts from, if it does.
    """
    n, batch_size = len(labels), min(batch_size, len(labels))
    for start in range(0, n, batch_size):
        index = np.arange(start, start + batch_size)
        beside = () if pictures is None else (pictures[index % n],)
        yield np.asarray(draw(params, index, labels[index % n], *beside))[: n - start]
