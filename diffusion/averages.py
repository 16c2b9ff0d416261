"""Averages of the parameters whose horizon is chosen after training: power functions of the step.

    average_n = sum_k w_k params_k,    w_k proportional to k^(gamma + 1) - (k - 1)^(gamma + 1)      (1)
    average_n = d average_(n-1) + (1 - d) params_n,    d = (1 - 1 / n)^(gamma + 1)                   (2)
    sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))                                      (3)

with the parameters after steps 1..n: Karras et al. 2023 (2312.02696), section 3. (3) is the width of the weights
relative to n, by which users choose: the horizon grows with training, and 0.05 to 0.2 are usual. (2) tracks (1).

An average of any other width, at any step, is nearly a combination of stored ones. Its coefficients x make the weights
as functions of time agree in the sense of least squares,

    min ||sum_i x_i p_i - p||^2,  p_i(t) = (gamma_i + 1) t^gamma_i / n_i^(gamma_i + 1) for 0 <= t <= n_i,  sum x = 1 (4)

whose inner products are known in closed form (their appendix C). The sum, which is not theirs, keeps what parameters
have in common exactly. Two gammas are tracked, and their averages stored a few dozen times in a training.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = Any


def gamma_of(sigma_rel: float) -> float:
    """gamma of the power function with a relative width, eq. (3).

    Raises:
      ValueError: the width lies outside (0, 0.2886], that of equal weights.
    """
    if not 0 < sigma_rel <= sigma_rel_of(0):
        raise ValueError(
            f"sigma_rel={sigma_rel} must lie in (0, {math.floor(1e4 * sigma_rel_of(0)) / 1e4}], up to the average over "
            "the whole training; 0.05 or 0.1 are usual"
        )
    # (gamma + 2)^2 (gamma + 3) sigma^2 = gamma + 1, a cubic with one root from 0 on.
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(float(roots.real.max()), 0.0)


def sigma_rel_of(gamma: float) -> float:
    """Eq. (3)."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def power_share(gamma: float, step: jax.Array) -> jax.Array:
    """1 - d of eq. (2), the share of the new parameters, for the update after `step` steps: n = step + 1."""
    # Near 1 the decay itself would lose the digits of this share.
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / (step + 1)))


def coefficients(steps: Sequence[int], gammas: Sequence[float], step: float, gamma: float) -> np.ndarray:
    """x [K] of eq. (4) for K averages that were stored after `steps` with `gammas`, for that of `gamma` after `step`.

    Raises:
      ValueError: nothing is stored, or nothing up to `step`.
    """
    n, g = np.asarray(steps, np.float64), np.asarray(gammas, np.float64)
    if n.shape != g.shape or n.ndim != 1 or not len(n) or not (n <= step).any():
        raise ValueError(f"there must be an average stored at step {step} or before, not {list(steps)}")
    used = n <= step  # a later one has weight where the wanted average has none
    n, g = n[used], g[used]
    k = len(n)
    system = np.zeros((k + 1, k + 1))
    system[:k, :k] = _inner(n[:, None], g[:, None], n, g)
    system[k, :k] = system[:k, k] = scale = 1 / n.max()  # of the inner products
    wanted = np.append(_inner(n, g, np.float64(step), np.float64(gamma)), scale)
    found = np.zeros(len(used))
    found[used] = np.linalg.lstsq(system, wanted, rcond=1e-15)[0][:k]
    return found


def fit_error(steps: Sequence[int], gammas: Sequence[float], step: float, gamma: float) -> float:
    """||sum_i x_i p_i - p|| / ||p|| of eq. (4): how well the stored averages can make the wanted one."""
    x = coefficients(steps, gammas, step, gamma)
    n, g = np.asarray(steps, np.float64), np.asarray(gammas, np.float64)
    cross, own = _inner(n, g, np.float64(step), np.float64(gamma)), _inner(step, gamma, step, gamma)
    square = x @ _inner(n[:, None], g[:, None], n, g) @ x - 2 * x @ cross + own
    return float(np.sqrt(max(square, 0) / own))


def combined(coefficients: Sequence[float], averages: Iterable[Params]) -> Params:
    """sum_i x_i average_i, a pytree of NumPy arrays; `averages` may be read one by one. Sums are in float64.

    Raises:
      ValueError: there are no averages, or not as many as coefficients.
    """
    if not len(coefficients):
        raise ValueError("there must be at least one average to combine")
    total = None
    for x, average in zip(coefficients, averages, strict=True):
        scaled = jax.tree.map(lambda a, x=x: x * np.asarray(a, np.float64), average)
        total = scaled if total is None else jax.tree.map(np.add, total, scaled)
    return total


def _inner(n_a: Any, gamma_a: Any, n_b: Any, gamma_b: Any) -> Any:
    """The integral of p_a p_b over time, for p of eq. (4)."""
    least, most = np.minimum(n_a, n_b), np.maximum(n_a, n_b)
    longer = np.where(np.asarray(n_a) < n_b, gamma_b, gamma_a)  # of the one that was stored later
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (least / most) ** longer / most
