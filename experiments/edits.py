"""The edits of `experiments.edit`: from the parts of a run to functions from images to images."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import sample as samplers
from diffusion.methods import edit
from diffusion.predict import Denoise
from diffusion.process import expand
from experiments import sampling
from experiments.parts import DataSpec, Parts, key, to_float


class Edit(NamedTuple):
    """One kind of edit.

    do: (keys [B], denoise, x0 [B, *S, C], y) -> the stages of the edit, images [B, *S, C] in the network's range; the
      first is what goes in, the last the result.
    names: of the stages.
    numbers: stages, NumPy arrays [N, *S, C], scaled so that values are 0 to 1 -> what to report, by its name.
    """

    do: Callable[..., tuple[jax.Array, ...]]
    names: tuple[str, ...]
    numbers: Callable[[Sequence[np.ndarray]], dict[str, float]]


def edit_fn(parts: Parts, chosen: Edit, members: Sequence[Parts] = ()) -> sampling.SampleFn:
    """Compiled (params, index [B], y [B], images [B, *S, C]) -> stages, a tuple of float32 [B, *S, C].

    `members` are the parts of all experts. Result i depends on the seed, its number i, its label and its image alone.
    """
    sample_key = key(parts.sample_seed, "sample")

    @jax.jit
    def run(params: Any, index: jax.Array, y: jax.Array, images: jax.Array) -> Any:
        keys = samplers.sample_keys(sample_key, index)
        denoise = sampling.denoiser(parts, params, members=members)
        return chosen.do(keys, denoise, to_float(parts, images), y if parts.spec.num_classes else None)

    return run


def sdedit(parts: Parts, strength: float) -> Edit:
    """Noised to a share of the time, and sampled from there."""
    times = edit.from_strength(parts.grid, strength)

    def do(keys, denoise, x0, y):
        x0_hat = edit.sdedit(keys, denoise, parts.path, x0, times, y, **_options(parts, denoise))
        alpha, sigma = (expand(a, x0) for a in parts.path(jnp.full(len(x0), times[0], jnp.float32)))
        return x0, alpha * x0 + sigma * samplers.initial_noise(keys, x0.shape[1:]), x0_hat

    return Edit(do, ("image", "noised", "result"), lambda stages: {"difference": rms(stages[-1] - stages[0])})


def inpainting(parts: Parts, mask: np.ndarray, jump: int, resamples: int) -> Edit:
    """What `mask`, boolean [1, *S, 1], is false for made anew."""
    times, grey = edit.repaint_times(parts.grid, jump, resamples), sum(parts.value_range) / 2

    def do(keys, denoise, x0, y):
        x0_hat = edit.repaint(keys, denoise, parts.path, x0, mask, times, y, **_options(parts, denoise))
        return x0, jnp.where(mask, x0, grey), x0_hat

    def numbers(stages: Sequence[np.ndarray]) -> dict[str, float]:
        difference = stages[-1] - stages[0]
        known = np.broadcast_to(mask, difference.shape)
        return {"largest_difference_of_known": np.abs(difference[known]).max(), "difference": rms(difference[~known])}

    return Edit(do, ("image", "what is known", "result"), numbers)


def inversion(parts: Parts, first: float) -> Edit:
    """The noise of an image, and the sample of it; the parts' sampler adds no noise.

    Raises:
      ValueError: `first` is out of range, or guidance remembers earlier steps, which are others on the way back.
    """
    if parts.guided_sampler and parts.spec.num_classes:
        raise ValueError(
            "--invert cannot go back along guidance that remembers earlier steps: pass --guidance_momentum=0"
        )
    if not 0 < first < parts.grid[0]:
        raise ValueError(f"--first={first} must lie between 0 and {parts.grid[0]:g}, where noise begins")
    times = np.linspace(parts.grid[0], first, len(parts.grid))

    def do(keys, denoise, x0, y):
        del keys
        return x0, *edit.round_trip(denoise, parts.path, x0, times, y, **_options(parts, denoise))

    def numbers(stages: Sequence[np.ndarray]) -> dict[str, float]:
        image, noise, again = stages
        low, high = parts.value_range
        return {
            "reconstruction_error": rms(again - image),
            "largest_error": np.abs(again - image).max(),
            "noise_deviation": (noise * (high - low)).std(),
        }

    return Edit(do, ("image", "its noise", "sample of that noise"), numbers)


def restoration(parts: Parts, measure: edit.Operator, deviation: float, scale: float | None) -> Edit:
    """Images that would be measured alike, with noise of this deviation on it, white being 1.

    With `scale` by the published algorithm of DPS, else by the gradient with the variance of the data.
    """
    low, high = parts.value_range
    noise = deviation * (high - low)
    if not noise > 0:
        raise ValueError(
            f"--measurement_noise={deviation} must be positive; for an exact measurement 0.01, for example"
        )
    # Of values that are as often low as high: an upper bound.
    spread = edit.gaussian_spread(parts.path, ((high - low) / 2) ** 2)
    # Where alpha is 0 the denoiser given a measurement is a limit that it does not know.
    grid = np.append(min(parts.grid[0], 0.999), parts.grid[1:])

    def do(keys, denoise, x0, y):
        z = samplers.normal(jax.vmap(lambda k: jax.random.fold_in(k, 2**31 - 3))(keys), jax.eval_shape(measure, x0))
        measured = measure(x0) + noise * z
        if scale is None:
            denoise = edit.given(
                denoise, parts.path, parts.denoiser_prediction, measure, measured, deviation=noise, spread=spread
            )
        # Guidance with a memory then compares two denoisers that both know the measurement.
        options = _options(parts, denoise)
        if scale is not None:
            options["sampler"] = edit.dps(options["sampler"], measure, measured, scale)
        x1 = sampling.initial_noise(parts, keys)
        x0_hat = samplers.sample(keys, denoise, parts.path, x1, grid, y, **options)
        return x0, _enlarged(measured, x0.shape), x0_hat

    def numbers(stages: Sequence[np.ndarray]) -> dict[str, float]:
        residual = measure(jnp.asarray(stages[-1])) - measure(jnp.asarray(stages[0]))
        return {"residual": rms(residual), "error": rms(stages[-1] - stages[0])}

    return Edit(do, ("image", "what is measured", "result"), numbers)


def rms(x: np.ndarray | jax.Array) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.square(np.asarray(x, np.float64)).mean()))


def operator(spelled: str, mask: np.ndarray | None, spec: DataSpec) -> edit.Operator:
    """The operator of --measure: "downscale:4", "blur:1.5", or "mask", for images like `spec`.

    Raises:
      ValueError: there is no such operator, or it does not fit the images.
    """
    name, _, value = spelled.partition(":")
    if name == "mask":
        if mask is None or value:
            raise ValueError(f"--measure={spelled} needs --mask=FILE, white where pixels are measured")
        return edit.masked(mask)
    try:
        made = {"downscale": lambda: edit.downscale(int(value)), "blur": lambda: edit.blur(float(value))}[name]()
        jax.eval_shape(made, jax.ShapeDtypeStruct((1, *spec.shape), np.float32))
    except KeyError:
        raise ValueError(f"--measure={spelled} is not one of downscale:FACTOR, blur:PIXELS, mask") from None
    except ValueError as e:
        raise ValueError(f"--measure={spelled}: {e}; as in downscale:2 or blur:1.5") from None
    return made


def _options(parts: Parts, denoise: Denoise) -> dict[str, Any]:
    """What the functions of `edit` take beside the denoiser: its prediction, and the sampler with its guidance."""
    return {"prediction": parts.denoiser_prediction, "sampler": sampling.guided(parts, denoise)}


def _enlarged(measured: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What is measured [B, *s, C], at the size of images of `shape` [B, *S, C], by repeating pixels."""
    for axis in range(1, len(shape) - 1):
        measured = jnp.repeat(measured, shape[axis] // measured.shape[axis], axis)
    return measured
