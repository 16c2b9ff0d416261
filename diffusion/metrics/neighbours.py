"""Precision, recall, density and coverage: which samples lie near which real images, in features.

B(x) is the ball around x that reaches to its k-th nearest neighbour in its own set, of N real features r and M fakes f:

    precision = 1/M  sum_j  1[f_j in some B(r_i)]          recall   = 1/N  sum_i  1[r_i in some B(f_j)]      (1)
    density   = 1/kM sum_j  #{i : f_j in B(r_i)}           coverage = 1/N  sum_i  1[some f_j in B(r_i)]      (2)

(1) Kynkaanniemi et al. 2019; (2) Naeem et al. 2020, 2002.09797. Density does not grow by outliers among the real
features as precision does, and may exceed 1; coverage needs balls around real features only.
"""

from operator import index
from typing import NamedTuple

import numpy as np

from diffusion.metrics import blocks


class Neighbourhoods(NamedTuple):
    """Who lies near whom.

    k        the number of neighbours that a ball reaches to
    holders  int [M], how many balls of real features hold each fake
    recalled bool [N], whether each real feature lies in the ball of some fake
    covered  bool [N], whether the ball of each real feature holds some fake
    """

    k: int
    holders: np.ndarray
    recalled: np.ndarray
    covered: np.ndarray

    @property
    def precision(self) -> float:
        return float((self.holders > 0).mean())

    @property
    def recall(self) -> float:
        return float(self.recalled.mean())

    @property
    def density(self) -> float:
        return float(self.holders.mean() / self.k)

    @property
    def coverage(self) -> float:
        return float(self.covered.mean())


def neighbourhoods(real: np.ndarray, fake: np.ndarray, k: int = 5) -> Neighbourhoods:
    """Eq. (1) and (2) of features `fake` [M, F] with respect to `real` [N, F].

    Precision, recall and coverage depend on N and M: compare only values with the same. Published values of density
    and coverage have k = 5, of precision and recall k = 3. Memory: `blocks.ROWS` rows of distances.

    Raises:
      ValueError: k is outside 1 .. (rows of the smaller set) - 1, fewer than 2 rows, another F, or values that are
        NaN or infinite.
    """
    real, fake = blocks.pair(real, fake)
    real, fake, k = real.astype(np.float64), fake.astype(np.float64), index(k)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k={k} must lie in 1 .. {min(len(real), len(fake)) - 1} for {len(real)} and {len(fake)} rows")
    reach, reach_of_fakes = _radii(real, k), _radii(fake, k)

    def near(block: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        gaps = blocks.square_distances(real[block], fake)
        inside = gaps <= reach[block, None]
        return inside.sum(0), (gaps <= reach_of_fakes).any(1), inside.any(1)

    holders, recalled, covered = zip(*blocks.over_blocks(near, len(real)), strict=True)
    return Neighbourhoods(k, np.sum(holders, 0), np.concatenate(recalled), np.concatenate(covered))


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance [N] from each row of x [N, F] to its k-th nearest neighbour."""
    # The nearest of all rows is the row itself, so its k-th neighbour is at index k.
    return blocks.by_rows(lambda rows: np.partition(blocks.square_distances(rows, x), k, 1)[:, k], x)
