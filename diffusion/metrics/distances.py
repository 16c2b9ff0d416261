"""Distances and statistics of images, as pure NumPy functions over features [N, F].

The features come from a network; `diffusion.metrics.features` says what is expected of it. With means m, covariances S
and k(a, b) = (a.b / F + 1)^3:

    frechet = |m_a - m_b|^2 + tr(S_a + S_b) - 2 sum_i sqrt(lambda_i),  lambda = eig(S_a^1/2 S_b S_a^1/2)     (1)
    kernel  = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)              (2)
    precision = share of fakes within some ball(r_i),  ball(x) with the radius to x's k-th nearest neighbour (3)
    recall    = share of reals within some ball(f_i)
    nearest   = median_i min_j |f_i - train_j| / median_i min_j |held_out_i - train_j|,  on pixels           (4)

(1) Dowson and Landau 1982, Heusel et al. 2017 (the squared distance, as it is always quoted); (2) Binkowski et al.
2018, the unbiased estimate; (3) Kynkaanniemi et al. 2019.

The expected value of (1) depends on the number of images: with fewer real images, their distance from the other real
images is larger. Therefore `distance_and_reference` compares n samples, and n real images in their place, with the same
remaining real images. Always quote the distance together with this real-data reference.

All statistics are float64.
"""

from collections.abc import Callable
from operator import index

import numpy as np

from diffusion.data.batches import checked_labels

ROWS = 256  # rows of a table of pairs that are in memory at once


def agreement(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose largest logit [N, classes] is at their label [N].

    Raises:
      ValueError: logits are not [N, classes] with N >= 1, or labels not N integers in 0 .. classes - 1.
      TypeError: labels are not integers.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or not logits.size:
        raise ValueError(f"logits must have shape [N, classes] with N >= 1, not {logits.shape}")
    return float((logits.argmax(1) == checked_labels(labels, *logits.shape)).mean())


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance, eq. (1), between the Gaussians fitted to features a [N, F] and b [M, F].

    Covariances are the unbiased estimates (divided by N - 1).

    Raises:
      ValueError: fewer than 2 rows, another F, or a value that is NaN or infinite.
    """
    a, b = _pair(a, b)
    root, cov_b = _sqrt(np.atleast_2d(np.cov(a, rowvar=False))), np.atleast_2d(np.cov(b, rowvar=False))
    product = root @ cov_b @ root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    squared = np.square(a.mean(0) - b.mean(0)).sum() + np.square(root).sum() + np.trace(cov_b) - 2 * cross
    return float(max(squared, 0.0))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared kernel distance, eq. (2), between features a [N, F] and b [M, F]: 0 on average for equal distributions.

    It is unbiased for every N and M if the rows are independent samples. Rows with equal shares of each class vary less
    than independent ones, and give values below 0 on average.

    Raises:
      ValueError: as `frechet_distance`.
    """
    a, b = _pair(a, b)
    f = a.shape[1]

    def total(x: np.ndarray, y: np.ndarray) -> float:
        return _by_rows(lambda rows: ((rows @ y.T / f + 1) ** 3).sum(1), x).sum()

    def within(x: np.ndarray) -> float:
        itself = ((np.square(x).sum(1) / f + 1) ** 3).sum()
        return (total(x, x) - itself) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b)))


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Precision and recall, eq. (3), of features `fake` [M, F] with respect to `real` [N, F].

    Precision is the share of fakes that lie near some real, recall the share of reals that lie near some fake. Compare
    only values with equal N, M and k: 1,000 real digits in the place of fakes reach 0.88 of 1,000 others.

    Raises:
      ValueError: k is outside 1 .. (rows of the smaller set) - 1, or as `frechet_distance`.
    """
    real, fake = _pair(real, fake)
    k = index(k)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k={k} must lie in 1 .. {min(len(real), len(fake)) - 1} for {len(real)} and {len(fake)} rows")
    return _covered(fake, real, k), _covered(real, fake, k)


def nearest_ratio(samples: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> float:
    """Median distance of samples [N, ...] to the nearest training image, relative to held-out images, eq. (4).

    About 1 if the samples are new images, towards 0 if they are copies of training images. Images that are smoother
    than real ones are nearer to all others, so a value slightly below 1 does not prove copying.

    Raises:
      ValueError: images of different shapes, no images, a non-finite value, or at least half of the held-out images are
        also in the training set.
    """
    arrays = {"samples": samples, "train": train, "held_out": held_out}
    samples, train, held_out = (_finite(name, x) for name, x in arrays.items())
    shapes = [x.shape[1:] for x in (samples, train, held_out)]
    if len(set(shapes)) != 1:
        raise ValueError(
            f"samples, train and held_out have images of different shapes {shapes}; pass images of one shape"
        )

    def median(x: np.ndarray) -> float:
        y = train.reshape(len(train), -1)
        nearest = _by_rows(lambda rows: _square_distances(rows, y).min(1), x.reshape(len(x), -1))
        return float(np.median(np.sqrt(nearest)))

    expected = median(held_out)
    if not expected:
        raise ValueError("at least half of held_out is also in train: pass images that were not used for training")
    return median(samples) / expected


def distance_and_reference(
    samples: np.ndarray, real: np.ndarray, real_labels: np.ndarray, *, repeats: int = 5, seed: int = 0
) -> tuple[float, float]:
    """Frechet distance of n samples [n, F] from real features [N, F], and the real-data reference of this distance.

    `repeats` times the real features are split at random into n features, with an equal share of each class (as the
    samples should have), and the rest. The distance is that of the samples from the rest; the reference is that of the
    n real features from the rest; both are averaged. Their ratio is about 1 for samples as good as real images.

    Raises:
      ValueError: N < n + 2, a class has fewer real features than its share, repeats < 1, or as `frechet_distance`.
    """
    samples, real = _pair(samples, real)
    real_labels = checked_labels(real_labels, len(real), owner="of the real features ")
    if index(repeats) < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(repeats):
        part, rest = split_real(real_labels, len(samples), rng)
        values.append([frechet_distance(x, real[rest]) for x in (samples, real[part])])
    distance, reference = np.mean(values, 0)
    return float(distance), float(reference)


def split_real(labels: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random indices [n] with an equal share of each class of `labels` [N], and the remaining indices [N - n].

    If n is not a multiple of the number of classes, random classes get one more.

    Raises:
      ValueError: fewer than 2 would remain, or a class has fewer than its share.
    """
    if n > len(labels) - 2:
        raise ValueError(
            f"comparing {n} samples needs at least {n + 2} real images, there are {len(labels)}: measure fewer samples"
        )
    classes, counts = np.unique(labels, return_counts=True)
    shares = np.full(len(classes), n // len(classes))
    shares[rng.permutation(len(classes))[: n % len(classes)]] += 1
    if (shares > counts).any():
        scarce = int(np.argmax(shares - counts))
        raise ValueError(
            f"comparing {n} samples needs {shares[scarce]} real images of class {classes[scarce]}, there are "
            f"{counts[scarce]}: measure fewer samples"
        )
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:m] for c, m in zip(classes, shares, strict=True)]
    part = np.concatenate(chosen)
    return part, np.setdiff1d(np.arange(len(labels)), part)


def _sqrt(cov: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def _covered(x: np.ndarray, centres: np.ndarray, k: int) -> float:
    """Share of x within the ball of some centre, eq. (3)."""
    # The nearest of all centres is the centre itself, so its k-th neighbour is at index k.
    radii = _by_rows(lambda rows: np.partition(_square_distances(rows, centres), k, 1)[:, k], centres)
    return float(_by_rows(lambda rows: (_square_distances(rows, centres) <= radii).any(1), x).mean())


def _square_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a_i - b_j|^2 [N, M]; exact for integers such as pixels."""
    return (np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T).clip(0)


def _by_rows(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    return np.concatenate([f(x[i : i + ROWS]) for i in range(0, len(x), ROWS)])


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, if their shapes are [N, F] and [M, F] and all values finite."""
    a, b = _finite("the first features", a), _finite("the second features", b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be [N, F] and [M, F] with N, M >= 2, not {a.shape} and {b.shape}")
    return a, b


def _finite(name: str, x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if not x.size or not x.ndim:
        raise ValueError(f"{name} must have at least one row, not shape {x.shape}")
    bad = x.size - np.isfinite(x).sum()
    if bad:
        raise ValueError(f"{name} contain {bad} values that are NaN or infinite")
    return x
