"""Numbers that are a mean and a spread: the Inception score of logits, and the kernel distance of subsets (KID).

    score = exp(mean_i KL(p(y | x_i) || p(y))),   p(y) = mean_i p(y | x_i)                          (1)

(1) Salimans et al. 2016. KID is published as mean and standard deviation of the unbiased kernel distance over random
subsets (Binkowski et al. 2018). All values are float64.
"""

from operator import index

import numpy as np

from diffusion.metrics.blocks import finite, pair
from diffusion.metrics.distances import kernel_distance


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over `splits` of the score, eq. (1), of logits [N, K]: 1 .. K, higher is better.

    Split i holds consecutive rows, as published, so rows must not be sorted by class. "Inception score" is said of
    logits of the published Inception-v3 only. It compares with no real image: quote that of real images beside it.

    Raises:
      ValueError: logits are not [N, K], splits outside 1 .. N, or a value that is NaN or infinite.
    """
    logits, splits = finite("logits", logits), index(splits)
    if logits.ndim != 2:
        raise ValueError(f"logits must be [N, K], not {logits.shape}")
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits={splits} must lie in 1 .. {len(logits)}, the number of images")
    bounds = np.arange(splits + 1) * len(logits) // splits
    scores = [_score(logits[i:j].astype(np.float64)) for i, j in zip(bounds[:-1], bounds[1:], strict=True)]
    return float(np.mean(scores)), float(np.std(scores))


def kernel_subsets(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of `kernel_distance` over random subsets of features a [N, F] and b [M, F].

    Each subset holds `size` rows of either side, without repetition; fewer where a side has fewer than `size`.
    Published values have 100 subsets of 1,000 rows. The deviation is that of one subset, not of the mean.

    Raises:
      ValueError: subsets < 1, size < 2, or as `kernel_distance`.
    """
    a, b = pair(a, b)
    if index(subsets) < 1 or index(size) < 2:
        raise ValueError(f"subsets={subsets} must be at least 1, and size={size} at least 2")
    rng, size = np.random.default_rng(seed), min(size, len(a), len(b))
    values = [kernel_distance(*(x[rng.choice(len(x), size, replace=False)] for x in (a, b))) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


def _score(logits: np.ndarray) -> float:
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    mean = p.mean(0)
    # A class of no probability in all rows adds nothing.
    log_mean = np.log(np.where(mean > 0, mean, 1))
    return float(np.exp((p * (log_p - log_mean)).sum(1).mean()))
