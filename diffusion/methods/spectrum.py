"""How much of an image can be known from a noised one, frequency by frequency, and how much of that is finer than P.

The orthonormal cosine transform c = DCT-II(x) over the spatial axes has coefficients k = (k_1, .., k_r) with

    f(k) = max_a k_a / size_a,  in [0, 1): 1 is the highest frequency that pixels can carry        (1)

Band b = floor(n f), n the shortest side, collects coefficients of about one frequency. A grid of one position for each
P x .. x P patch can carry f < 1 / P, so what it cannot carry are the bands from n / P on.        (2)

The energy of E[x0 | xt] is the energy of x0 that can be recovered from xt, E|x0|^2 - E|x0 - E[x0 | xt]|^2. Without the
true posterior mean, any estimates m_1 .. m_K of x0 bound it from below: in each band the best linear combination of
them explains

    r_b = v' M^-1 v,    v_j = E sum_(k in b) m_jk x0_k,    M_ij = E sum_(k in b) m_ik m_jk         (3)

of the energy sum_(k in b) E x0_k^2, with equality if E[x0 | xt] is such a combination. With m = xt alone (3) is the
Wiener filter. What a grid of patches of P loses is the share

    lost(P) = sum_(b >= n / P) r_b / sum_b E_b,    E_b = sum_(k in b) E x0_k^2                     (4)

of the energy of images, or, with r_b for E_b, of what can be recovered. That the former is small at most noise levels
is the argument of Luhman & Luhman 2022 (2207.04316): the best prediction of x0 is blurry there. A network on patches
still sees and predicts every pixel, in its channels; (4) is what its grid of positions alone is too coarse for.

NumPy functions in float64, whose arrays may be JAX's.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Sums over images and the coefficients of each of n bands, to be added up over batches; see eq. (3).

    count: number of images.
    energy: [n] of x0^2.
    cross: [n, K] of m x0, v of eq. (3).
    gram: [n, K, K] of m m', M of eq. (3).
    """

    count: int
    energy: np.ndarray
    cross: np.ndarray
    gram: np.ndarray

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))


def bands(size: tuple[int, ...]) -> np.ndarray:
    """The band of each coefficient, [*S] integers in 0 .. min(S) - 1, eqs. (1) and (2)."""
    n = min(size)
    return np.max(np.meshgrid(*(np.arange(s) * n // s for s in size), indexing="ij"), axis=0)


def cosines(x: np.ndarray) -> np.ndarray:
    """Coefficients [B, *S, C] of images [B, *S, C]."""
    return _transformed(x, lambda basis: basis)


def images(c: np.ndarray) -> np.ndarray:
    """Images [B, *S, C] from coefficients [B, *S, C]: the inverse of `cosines`."""
    return _transformed(c, np.transpose)


def power(x: np.ndarray) -> np.ndarray:
    """Mean energy of one coefficient in each band, [n], over images [B, *S, C] and channels: white noise has 1."""
    where = bands(x.shape[1:-1])
    energy = np.square(cosines(x)).mean((0, -1))
    return np.bincount(where.ravel(), energy.ravel()) / np.bincount(where.ravel())


def moments(x0: np.ndarray, estimates: Sequence[np.ndarray]) -> Moments:
    """The sums of eq. (3) for images x0 [B, *S, C] and K estimates of them, all without their common mean image."""
    b, *size, _ = x0.shape
    where = bands(tuple(size))
    n, index = min(size), np.repeat(where.ravel(), x0.shape[-1])
    truth, *found = (cosines(x).reshape(b, -1) for x in (x0, *estimates))

    def summed(a: np.ndarray, c: np.ndarray) -> np.ndarray:
        return np.bincount(index, np.einsum("bi,bi->i", a, c), minlength=n)

    return Moments(
        b,
        summed(truth, truth),
        np.stack([summed(m, truth) for m in found], -1),
        np.stack([np.stack([summed(a, c) for c in found], -1) for a in found], -1),
    )


def gains(found: Moments) -> np.ndarray:
    """The best linear combination in each band, [n, K], M^-1 v of eq. (3); the smallest where M is singular."""
    return np.einsum("nij,nj->ni", np.linalg.pinv(found.gram, rcond=1e-10, hermitian=True), found.cross)


def combined(weights: np.ndarray, estimates: Sequence[np.ndarray]) -> np.ndarray:
    """The images [B, *S, C] that combine the estimates with `gains` [n, K]."""
    each = weights[bands(estimates[0].shape[1:-1])]  # [*S, K]
    return images(sum(each[..., j, None] * cosines(m) for j, m in enumerate(estimates)))


def recoverable(found: Moments) -> np.ndarray:
    """Energy per image that the estimates explain in each band, [n], r of eq. (3)."""
    return np.maximum(np.einsum("ni,ni->n", gains(found), found.cross), 0) / found.count


def lost(recovered: np.ndarray, patch_size: int, of: np.ndarray | None = None) -> float:
    """The share of the energy `of` [n] that is recoverable, `recovered` [n], and finer than the patches, eq. (4).

    `of` is the energy of images; by default it is what can be recovered.

    Raises:
      ValueError: `patch_size` does not divide the number of bands.
    """
    n = len(recovered)
    if patch_size < 1 or n % patch_size:
        raise ValueError(f"patch_size={patch_size} must divide the shortest side, {n}")
    total = (recovered if of is None else of).sum()
    return float(recovered[n // patch_size :].sum() / total) if total > 0 else 0.0


def _transformed(x: np.ndarray, direction: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    x = np.asarray(x, np.float64)
    for axis in range(1, x.ndim - 1):
        n = x.shape[axis]
        basis = np.cos(np.pi / n * np.arange(n)[:, None] * (np.arange(n) + 0.5)) * math.sqrt(2 / n)
        basis[0] /= math.sqrt(2)
        x = np.moveaxis(np.tensordot(x, direction(basis), (axis, 1)), -1, axis)
    return x
