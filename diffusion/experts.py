"""Experts: several networks, each for a range of the signal-to-noise ratio, as one denoiser.

Descending thresholds s_1 > ... > s_n cut the chain into n + 1 ranges. With SNR = (alpha / sigma)^2, expert k has

    s_k >= SNR > s_(k+1),    s_0 = infinity, s_(n+1) = -1                                          (1)

so expert 0 has the least noisy images and clean data itself, and the last one pure noise. SNR falls with t, so (1)
divides the time axis; `boundaries` computes where, and training and sampling compare t with the same numbers. Balaji et
al. 2022 (2211.01324); Luhman & Luhman 2022 (2207.04316).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.predict import Denoise, Output
from diffusion.process import Path, times_of_snr
from diffusion.times import Times, listed_times, uniform_times


def boundaries(path: Path, snr_splits: Sequence[float], span: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
    """The times [n] at which the SNR has fallen to each threshold, in float32: expert k has b_k <= t < b_(k+1).

    `span` is the range of times of the path.

    Raises:
      ValueError: thresholds are not positive and falling, or the path does not reach one of them.
    """
    splits = np.asarray(snr_splits, np.float64)
    if splits.ndim != 1 or not splits.size or not (splits > 0).all() or not np.isfinite(splits).all():
        raise ValueError(f"snr_splits={snr_splits} must list one or more positive thresholds")
    if not (np.diff(splits) < 0).all():
        raise ValueError(f"snr_splits={snr_splits} must fall: from the least noisy threshold to the noisiest")
    try:
        high = times_of_snr(path, splits, span)
    except ValueError as e:
        raise ValueError(f"snr_splits={snr_splits}: {e}") from None
    if len(np.unique(high)) < len(high):
        raise ValueError(
            f"snr_splits={snr_splits}: two thresholds are reached at the same time, so the expert between them has no "
            f"times; move them further apart"
        )
    return high


def expert_of(bounds: np.ndarray, t: jax.Array) -> jax.Array:
    """The number of the expert, 0..n, for each t [B], for `boundaries` [n]."""
    return jnp.searchsorted(jnp.asarray(bounds), t.astype(jnp.float32), side="right")


def expert_times(
    bounds: np.ndarray, expert: int, chain: np.ndarray | None = None, span: tuple[float, float] = (0.0, 1.0)
) -> Times:
    """Time sampler, uniform on the times of one expert: on those of `chain`, or on all inside `span`.

    Raises:
      ValueError: there is no such expert, or the chain has no time for it.
    """
    if not 0 <= expert <= len(bounds):
        raise ValueError(f"expert={expert} must lie in 0..{len(bounds)}: {len(bounds)} thresholds, one expert more")
    if chain is not None:
        own = own_times(bounds, expert, chain[:-1])
        if not len(own):
            raise ValueError(
                f"expert={expert} has none of the {len(chain) - 1} times of the chain; its SNR range is empty"
            )
        return listed_times(own)
    low, high = np.concatenate([span[:1], bounds, span[1:]]).astype(np.float32)[expert : expert + 2]
    # Rounding may give low + (high - low) u = high, which is the next expert's.
    largest = np.nextafter(high, np.float32(-np.inf))
    return lambda key, n: jnp.minimum(low + (high - low) * uniform_times(key, n), largest)


def own_times(bounds: np.ndarray, expert: int, times: np.ndarray) -> np.ndarray:
    """Those of `times` [n] that belong to one expert."""
    return times[np.searchsorted(bounds, np.asarray(times, np.float32), side="right") == expert]


def experts(denoisers: Sequence[Denoise], bounds: np.ndarray) -> Denoise:
    """One denoiser from n + 1, for `boundaries` [n]: each example is denoised by the expert of its t.

    An expert runs only if a t of the batch is its own (inside `jax.shard_map`: of the batch of any device), then on the
    whole batch. In sampling and likelihood, where t is usually the same for all, exactly one runs; under `jax.vmap` all
    do.

    Raises:
      ValueError: the number of denoisers does not fit the thresholds.
    """
    if len(denoisers) != len(bounds) + 1:
        raise ValueError(f"{len(bounds)} thresholds need {len(bounds) + 1} experts, not {len(denoisers)}")

    def denoise(xt: jax.Array, t: jax.Array, y: Any = None) -> Output:
        index = expert_of(bounds, t)
        output = jax.tree.map(jnp.zeros_like, jax.eval_shape(denoisers[0], xt, t, y))
        for k, expert in enumerate(denoisers):
            mine = index == k

            def evaluate(output: Output, expert: Denoise = expert, mine: jax.Array = mine) -> Output:
                own = mine.reshape(mine.shape + (1,) * (xt.ndim - 1))
                return jax.tree.map(lambda new, old: jnp.where(own, new, old), expert(xt, t, y), output)

            output = jax.lax.cond(_on_any_device(mine.any()), evaluate, lambda output: output, output)
        return output

    return denoise


def _on_any_device(needed: jax.Array) -> jax.Array:
    """Whether `needed` holds on one of the devices, if it differs between those of a `shard_map`.

    All devices must take the same branch: the gradient of shared parameters is a sum over devices, inside the branch.
    """
    axes = sorted(jax.typeof(needed).manual_axis_type.varying)
    return jax.lax.pmax(needed.astype(int), tuple(axes)) > 0 if axes else needed
