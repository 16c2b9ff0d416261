"""Asymmetric flow: the network predicts the velocity in a low-rank subspace of each patch and the image in the rest.

With the orthogonal projection P onto the subspace, of rank r in a patch of D values, the same for every patch,

    target     P (dalpha/dt x0 + dsigma/dt eps) + (I - P) x0                                       (1)
    velocity   P pred + (I - P) velocity of pred as an x0_hat, eq. (4) of `predict`                (2)
    loss       || P e ||^2 + w(t) || (I - P) e ||^2                                                (3)

with e the error of (1) and w the weight `loss.measured_in("flow", "x0", floor)`. Chen et al. 2026 (2605.12964), eqs. 3
to 5: the noise that a network must carry through its features is P eps, and the division by sigma, which amplifies
errors near the data, happens outside the subspace only. The paper predicts -x0 there, which differs by a sign in the
last layer. (3) is the squared error of the velocity (2), its divisor kept above the floor. Rank 0 is the x0 prediction
with the loss of JiT, and full rank the flow prediction, both bit for bit. On ImageNet the paper's best rank was 8 of
768, with the directions of `principal_directions`; random ones were close to rank 0.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.loss import Draw, draw, measured_in
from diffusion.patch import patchify, unpatchify
from diffusion.patch.views import patchify as patches_of
from diffusion.predict import Denoise, Output, WithVariance, decode, pred_of, replace_pred
from diffusion.predict import target as combined
from diffusion.process import Coefficients, Path, coefficients, noise
from diffusion.times import Times

Project = Callable[[jax.Array], jax.Array]  # x [B, *S, C] -> P x, the same shape


def projection(basis: jax.Array | np.ndarray, patch_size: int | Sequence[int]) -> Project:
    """P of eq. (1): every patch of x [B, *S, C] projected onto the orthonormal columns of `basis` [D, r].

    The D values of a patch are ordered as in `patch.patchify`. With r = D it returns x itself.

    Raises:
      ValueError: the columns are not orthonormal; on a call, patches do not tile x or hold another number of values.
    """
    basis = np.asarray(basis)
    if basis.ndim != 2 or np.abs(basis.T @ basis - np.eye(basis.shape[1])).max(initial=0) > 1e-4:
        raise ValueError(f"the columns of a basis {basis.shape} must be orthonormal: take the Q of np.linalg.qr(basis)")

    def project(x: jax.Array) -> jax.Array:
        tokens = patchify(x, patch_size)  # (B, N, D)
        if tokens.shape[-1] != len(basis):
            raise ValueError(
                f"patches of {tokens.shape[-1]} values, size {patch_size}, do not fit a basis {basis.shape}"
            )
        if basis.shape[0] == basis.shape[1]:
            return x
        columns = jnp.asarray(basis, x.dtype)
        within = jnp.einsum("bnd,dr->bnr", tokens, columns, precision="highest")
        low = jnp.einsum("bnr,dr->bnd", within, columns, precision="highest")
        return unpatchify(low, x.shape[1:-1], patch_size)

    return project


def principal_directions(images: np.ndarray, patch_size: int | Sequence[int], rank: int) -> np.ndarray:
    """The `rank` directions [D, rank] of most energy in the patches of images [N, *S, C], in the network's range.

    The left singular vectors of the matrix of all patches, which is not centred (appendix A.1 of the paper). Some
    thousands of images are enough.

    Raises:
      ValueError: the rank is not in 0..D, or the patches do not tile the images.
    """
    patches = patches_of(np.asarray(images), patch_size)
    patches = patches.reshape(-1, patches.shape[-1])
    if not 0 <= rank <= patches.shape[1]:
        raise ValueError(f"rank={rank} must lie in 0..{patches.shape[1]}, the number of values of a patch")
    moment = sum(block.T @ block for block in (part.astype(np.float64) for part in np.array_split(patches, 64)))
    _, directions = np.linalg.eigh(moment)
    return directions[:, ::-1][:, :rank]


def target(project: Project, coef: Coefficients, x0: jax.Array, eps: jax.Array) -> jax.Array:
    """What the network should predict, [B, *S, C], eq. (1)."""
    return project(combined("flow", coef, x0, eps)) + (x0 - project(x0))


def velocity(denoise: Denoise, path: Path, project: Project, *, floor: float = 0.05) -> Denoise:
    """The network's prediction (1) as one of the velocity, "flow", eq. (2), for samplers and guidance.

    Args:
      floor: of sigma as a divisor; of a path of another noise scale, this times the scale. The paper samples at 0.04.

    Raises:
      ValueError: the floor is negative.
    """
    _check_floor(floor)

    def recovered(xt: jax.Array, t: jax.Array, y: Any = None) -> Output:
        coef, output = coefficients(path, t), denoise(xt, t, y)
        pred = pred_of(output)
        outside = combined("flow", coef, *decode("x0", coef, xt, pred, floor))
        return replace_pred(output, project(pred) + (outside - project(outside)))

    return recovered


def loss(
    key: jax.Array,
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    y: Any = None,
    *,
    project: Project,
    floor: float = 0.05,
    times: Times | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`loss_at` at times and noise from `diffusion.loss.draw`: the loss of each example [B], eq. (3), and its parts."""
    return loss_at(draw(key, x0, times), denoise, path, x0, y, project=project, floor=floor)


def loss_at(
    sampled: Draw,
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    y: Any = None,
    *,
    project: Project,
    floor: float = 0.05,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of each example [B], eq. (3), at given times and noise; `denoise` predicts (1).

    Returns also {"t", "mse", "loss"} [B], as `diffusion.loss.loss_at`: mse is that of (1).

    Raises:
      ValueError: the denoiser returns another shape than x0's, or a learned variance, or the floor is negative.
    """
    _check_floor(floor)
    t, eps, importance = sampled
    coef, xt = coefficients(path, t), noise(path, x0, t, eps)
    pred = denoise(xt.astype(x0.dtype), t, y)
    if isinstance(pred, WithVariance):
        raise ValueError("the denoiser returned a learned variance, which this loss does not train")
    if pred.shape != x0.shape:
        raise ValueError(f"denoise returned shape {pred.shape}, the loss compares it with {x0.shape}")
    error = pred - target(project, coef, x0, eps)
    inside = project(error)
    inside, outside = (jnp.square(e).mean(range(1, e.ndim)) for e in (inside, error - inside))
    value = inside + measured_in("flow", "x0", floor)(coef) * outside
    parts = {"t": t, "mse": inside + outside, "loss": value}
    return value if importance is None else importance * value, parts


def _check_floor(floor: float) -> None:
    if not floor >= 0:
        raise ValueError(f"floor={floor} must not be negative: it is the smallest divisor, 0 for no bound")
