"""From parts and trained parameters to images or other arrays: the denoiser with guidance, and compiled samplers."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import experts, guide, sharding, superres
from diffusion import sample as samplers
from diffusion.predict import Denoise, convert
from diffusion.process import noise
from experiments.parts import Parts, key, to_data, to_float

# (params, index [B], y [B], *images) -> images of the data's type
SampleFn = Callable[..., Any]


def denoiser(
    parts: Parts,
    params: Any,
    conditioning: jax.Array | None = None,
    members: Sequence[Parts] = (),
    weak: Parts | None = None,
) -> Denoise:
    """The trained denoiser, xt [B, *S, C] to images, with guidance, thresholds and a floor of the velocity's divisor.

    It predicts `parts.denoiser_prediction`.

    Guidance with a memory is not in it, but in `guided`.

    Args:
      params: of the network; with experts a tuple of those of each one, in the order of their ranges.
      conditioning: extra input channels of a super-resolution network.
      members: the parts of all experts.
      weak: the parts of a weaker run, for autoguidance in the place of guidance by labels; `params` are then a pair,
        of the run itself and of the weaker one.
    """
    params, weaker = params if weak is not None else (params, None)
    if members:
        denoisers = [partial(each.image_model.apply, p) for each, p in zip(members, params, strict=True)]
        denoise = experts.experts(denoisers, parts.bounds)
    else:
        denoise = partial(parts.image_model.apply, params)
    if conditioning is not None:
        denoise = superres.conditioned(denoise, conditioning)
    if weak is not None:
        other = partial(weak.image_model.apply, weaker)
        if weak.prediction != parts.prediction:
            other = convert(other, parts.path, weak.prediction, parts.prediction)
        denoise = guide.extrapolate(denoise, other, parts.guidance_scale)
    elif parts.spec.num_classes and not parts.guided_sampler:
        denoise = parts.guidance(denoise, parts.spec.num_classes)
    if parts.threshold is not None:
        denoise = parts.threshold(denoise)
    return convert(denoise, parts.path, parts.prediction, "flow", parts.floor) if parts.floor else denoise


def guided(parts: Parts, denoise: Denoise, weak: Parts | None = None) -> samplers.Sampler:
    """The sampler for `denoiser`'s result, which guides too where guidance has a memory."""
    if weak is not None or not parts.spec.num_classes or not parts.guided_sampler:
        return parts.sampler
    return parts.guided_sampler(parts.sampler, denoise, parts.spec.num_classes, prediction=parts.denoiser_prediction)


def sample_fn(
    parts: Parts,
    keep: int | None = None,
    members: Sequence[Parts] = (),
    *,
    finite: bool = False,
    weak: Parts | None = None,
) -> SampleFn:
    """Compiled (params, index [B], y [B], low [B, h, w, C] | None) -> samples [B, *S, C] of the data's type.

    With `keep`, also frames [keep, B, *S, C]. With `finite`, also bool [B]: whether all values of each sample are
    finite, which uint8 cannot tell, NaN being 0 there. `low` is the low-resolution image of a super-resolution network,
    `members` the parts of all experts, `weak` those of a weaker run, see `denoiser`. Sample i depends on the seed, its
    number i, its label and its `low` alone.
    """
    sample_key = key(parts.sample_seed, "sample")

    @jax.jit
    def sample(params: Any, index: jax.Array, y: jax.Array, low: jax.Array | None = None) -> Any:
        keys = samplers.sample_keys(sample_key, index)
        denoise = denoiser(parts, params, conditioning(parts, keys, low), members, weak)
        sampled = samplers.sample(
            keys,
            denoise,
            parts.path,
            initial_noise(parts, keys),
            parts.grid,
            y if parts.spec.num_classes else None,
            prediction=parts.denoiser_prediction,
            sampler=guided(parts, denoise, weak),
            keep=keep,
        )
        images = jax.tree.map(partial(to_data, parts), sampled)
        if not finite:
            return images
        last = sampled if keep is None else sampled[0]
        return images, jnp.isfinite(last).all(tuple(range(1, last.ndim)))

    return sample


def initial_noise(parts: Parts, keys: jax.Array) -> jax.Array:
    """The noise from which samples start [B, *S, C], one key per sample."""
    if parts.scaled_noise:
        return samplers.initial_noise(keys, parts.spec.shape, parts.path, parts.grid[0])
    return samplers.initial_noise(keys, parts.spec.shape)


def denoise_fn(parts: Parts) -> SampleFn:
    """Compiled (params, index [B], y [B], images [B, *S, C]) -> [B, 2, *S, C] of their type: noised, and denoised.

    One expert alone cannot sample: images are noised to the end of its range of times, and denoised through that range.
    """
    grid, sample_key = expert_grid(parts), key(parts.sample_seed, "sample")

    @jax.jit
    def denoised(params: Any, index: jax.Array, y: jax.Array, images: jax.Array) -> jax.Array:
        keys = samplers.sample_keys(sample_key, index)
        x0 = to_float(parts, images)
        x1 = noise(parts.path, x0, jnp.full(len(x0), grid[0]), samplers.initial_noise(keys, parts.spec.shape))
        denoise = denoiser(parts, params, conditioning(parts, keys, low_resolution(parts, images)))
        x0_hat = samplers.sample(
            keys,
            denoise,
            parts.path,
            x1,
            grid,
            y if parts.spec.num_classes else None,
            prediction=parts.denoiser_prediction,
            sampler=guided(parts, denoise),
        )
        return to_data(parts, jnp.stack([x1, x0_hat], 1))

    return denoised


def expert_grid(parts: Parts) -> np.ndarray:
    """The times at which one expert denoises: those of the grid in its own range, and then a jump to t = 0."""
    own = experts.own_times(parts.bounds, parts.split, parts.grid[:-1])
    if not len(own):  # the sampler takes fewer steps than there are ranges
        own = np.array([np.concatenate([[0], parts.bounds, [1]])[parts.split : parts.split + 2].mean()])
    return np.append(own, 0.0)


def conditioning(parts: Parts, keys: jax.Array, low: jax.Array | None) -> jax.Array | None:
    """The conditioning channels of a super-resolution network, from images [B, h, w, C]; None for any other."""
    if not parts.superres:
        return None
    if low is None:
        raise ValueError("a super-resolution network needs low-resolution images to start from")
    x, size, deviation = to_float(parts, low), parts.spec.shape[:-1], parts.superres.sample_noise
    if not parts.superres.noise:
        return superres.conditioning(x, size)
    # Steps fold in their numbers, and the start of sampling the number above this one.
    z = samplers.normal(jax.vmap(lambda k: jax.random.fold_in(k, 2**31 - 2))(keys), x)
    return superres.conditioning(x + deviation * z, size, jnp.full(len(x), deviation))


def low_resolution(parts: Parts, images: jax.Array) -> jax.Array | None:
    """Images [B, H, W, C] at the size of the conditioning input; None for a network without one."""
    if not parts.superres:
        return None
    return to_data(parts, superres.shrink(to_float(parts, images), parts.superres.size))


def in_batches(
    sample: SampleFn, params: Any, labels: np.ndarray, batch_size: int, images: np.ndarray | None = None
) -> Iterator[Any]:
    """Samples 0..len(labels) - 1 batch by batch; the last batch is filled up, so that one program serves all.

    Where `params` lie on a mesh, all its devices share a batch, whose size is then a multiple of their number. What
    `sample` returns, an array or a tuple of arrays, is cut to the samples that were asked for. `images` [N, ...] are
    the inputs of `sample`, if it has any.
    """
    n, mesh = len(labels), sharding.mesh_of(params)
    batch_size = min(batch_size, n)
    if mesh is not None:
        batch_size = -(-batch_size // mesh.size) * mesh.size
    for start in range(0, n, batch_size):
        index = np.arange(start, start + batch_size)
        inputs = (index, labels[index % n]) + (() if images is None else (images[index % n],))
        if mesh is not None:
            inputs = sharding.put(inputs, sharding.by_examples(mesh))
        with sharding.in_use(mesh):
            made = sharding.gathered(sample(params, *inputs))
        yield jax.tree.map(lambda array, left=n - start: array[:left], made)
