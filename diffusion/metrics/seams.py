"""Whether the grid of patches shows in images: the change across patch borders against the change beside them.

With D_i the mean square difference of the neighbouring rows i - 1 and i over all images, columns and channels, and
likewise of columns, and borders the i at which some patch begins or ends,

    seam = sum_border D_i  /  sum_border (D_left(i) + D_right(i)) / 2                                (1)

where left(i) and right(i) are the nearest i before and after that are no borders. The comparison with what lies beside
a border, not with the whole image, is fair to images whose middle has more detail than their rim. 1: no grid is
visible, as in white noise and in smooth images; above 1: patches do not fit together; below 1: borders are blurred.
"""

from collections.abc import Sequence
from operator import index
from typing import NamedTuple

import numpy as np

from diffusion.metrics.blocks import ROWS, finite


class Seams(NamedTuple):
    """What `seams` finds.

    ratio   eq. (1), of rows and columns together
    energy  [H, W], where: the mean square difference of each pixel from the one above plus from the one to its left
    sums    [N, 2], the sums of eq. (1) of each image alone, on borders and beside them
    """

    ratio: float
    energy: np.ndarray
    sums: np.ndarray


def seams(images: np.ndarray, patch_size: int, stride: int | None = None) -> Seams:
    """Eq. (1) of images [N, H, W, C] for patches of `patch_size` every `stride` pixels (default: patch_size).

    The ratio is infinite where patches of constant colour differ, and 1 where no pixel differs from another.

    Raises:
      ValueError: images are not [N, H, W, C] or hold NaN, the patches do not tile them, or leave no border between
        two of them, or no two neighbouring pixels that are no border.
    """
    images = finite("images", images)
    if images.ndim != 4:
        raise ValueError(f"images must be [N, H, W, C], not {images.shape}")
    _, *size, _ = images.shape
    (rows, *beside_rows), (columns, *beside_columns) = (_places(n, patch_size, stride) for n in size)
    down, across, sums = *np.zeros((2, *size)), []
    for start in range(0, len(images), ROWS):
        x = images[start : start + ROWS].astype(np.float64)
        vertical, horizontal = (np.square(np.diff(x, axis=axis)) for axis in (1, 2))
        down[1:] += vertical.sum((0, 3))
        across[:, 1:] += horizontal.sum((0, 3))
        vertical, horizontal = vertical.mean((2, 3)), horizontal.mean((1, 3))  # [B, H - 1] and [B, W - 1]
        border = vertical[:, rows - 1].sum(1) + horizontal[:, columns - 1].sum(1)
        beside = sum(vertical[:, i - 1].sum(1) for i in beside_rows)
        beside += sum(horizontal[:, i - 1].sum(1) for i in beside_columns)
        sums.append(np.stack([border, beside / 2], 1))
    sums = np.concatenate(sums)
    energy = (down + across) / (images.shape[0] * images.shape[3])
    border, beside = sums.sum(0)
    if not beside:
        return Seams(float("inf") if border else 1.0, energy, sums)
    return Seams(float(border / beside), energy, sums)


def has_seams(size: Sequence[int], patch_size: int, stride: int | None = None) -> bool:
    """Whether images of `size` (H, W) have borders of patches, and pixels between: not with patches of one pixel."""
    try:
        for n in size:
            _places(n, patch_size, stride)
    except ValueError:
        return False
    return True


def _places(n: int, patch_size: int, stride: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The borders in an axis of length n, and the nearest differences before and after each that are no borders."""
    p = index(patch_size)
    s = p if stride is None else index(stride)
    if not 1 <= s <= p <= n or (n - p) % s:
        raise ValueError(f"patches of patch_size={p} with stride={s} do not tile {n} pixels: pass those of the network")
    starts = np.arange(0, n - p + 1, s)
    at = np.union1d(starts, starts + p)
    at = at[(at > 0) & (at < n)]
    inside = np.setdiff1d(np.arange(1, n), at)
    if not len(at) or not len(inside):
        found = "no border" if not len(at) else "nothing but borders"
        raise ValueError(f"patches of patch_size={p} with stride={s} leave {found} in {n} pixels: there are no seams")
    after = np.searchsorted(inside, at)
    left, right = inside[np.maximum(after - 1, 0)], inside[np.minimum(after, len(inside) - 1)]
    return at, left, right
