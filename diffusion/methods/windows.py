"""Images larger than those of the training: overlapping windows that are denoised together.

    pred = 1 / P^T 1 * P^T denoise(P xt)                                                           (1)

P cuts xt into windows of the training size, `patch.patchify`, and P^T / P^T 1 averages them where they overlap,
`patch.unpatchify`. This is MultiDiffusion, Bar-Tal et al. 2023 (2302.08113), with equal weights: it averages the steps
of all windows, and at a fixed xt the DDIM and the ancestral step are affine in the prediction, so their average is the
step of the average. It suits data whose parts look like the data, such as textures and landscapes: where each image has
one thing in its centre, as digits do, overlapping windows disagree, and little but their outer borders is left.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.patch import patchify, unpatchify
from diffusion.patch.geometry import per_axis
from diffusion.predict import Denoise, Output


def windows(denoise: Denoise, size: Sequence[int], stride: int | Sequence[int]) -> Denoise:
    """The denoiser of xt [B, *S, C] of any size S that windows of `size` every `stride` tile, eq. (1).

    The denoiser sees [B N, *size, C], the N windows of each example with its t and y; its prediction may have other
    channels than xt. A learned variance is averaged too. A stride below the size makes windows overlap: without, they
    know nothing of each other.

    Raises:
      TypeError: the size is not a sequence of integers.
      ValueError: on a call, if the windows do not tile xt; the message names a stride that does.
    """
    if isinstance(size, int):
        raise TypeError(f"size={size} must be a sequence of integers, one per spatial axis, as ({size}, {size})")
    size = tuple(size)
    stride = per_axis("stride", stride, len(size))

    def denoise_larger(xt: jax.Array, t: jax.Array, y: Any = None) -> Output:
        b, *whole, c = xt.shape
        cut = patchify(xt, size, stride)  # [B, N, D]
        n = cut.shape[1]
        t, y = jax.tree.map(lambda a: jnp.repeat(a, n, 0), (t, y))
        output = denoise(cut.reshape(b * n, *size, c), t, y)
        return jax.tree.map(lambda a: unpatchify(a.reshape(b, n, -1), whole, size, stride), output)

    return denoise_larger
