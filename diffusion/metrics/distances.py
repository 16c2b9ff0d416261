"""Distances and statistics of images, as pure NumPy functions over features [N, F].

The features come from a network; `diffusion.metrics.features` says what is expected of it. With means m, covariances S
and k(a, b) = (a.b / F + 1)^3:

    frechet = |m_a - m_b|^2 + tr(S_a + S_b) - 2 sum_i sqrt(lambda_i),  lambda = eig(S_a^1/2 S_b S_a^1/2)     (1)
    kernel  = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)              (2)
    nearest = median_i min_j |f_i - train_j| / median_i min_j |held_out_i - train_j|,  on pixels             (3)

(1) Dowson and Landau 1982, Heusel et al. 2017 (the squared distance, as it is always quoted; `moments` computes it);
(2) Binkowski et al. 2018, the unbiased estimate, called KID of Inception features. Precision and recall are those of
`neighbours`.

The expected value of (1) depends on the number of images: with fewer real images, their distance from the other real
images is larger. Therefore `distance_and_reference` compares n samples, and n real images in their place, with the same
remaining real images. Always quote the distance together with this real-data reference.

All statistics are float64.
"""

import warnings
from operator import index
from typing import Any

import numpy as np

from diffusion.data.batches import checked_labels
from diffusion.metrics import blocks
from diffusion.metrics.blocks import by_rows, finite, pair, square_distances
from diffusion.metrics.moments import frechet, gaussian, moments, scarce, square_root
from diffusion.metrics.neighbours import neighbourhoods


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

    Covariances are the unbiased estimates (divided by N - 1). Warns if N or M is not above F.

    Raises:
      ValueError: fewer than 2 rows, another F, or a value that is NaN or infinite.
    """
    a, b = pair(a, b)
    if reason := scarce(min(len(a), len(b)), a.shape[1]):
        warnings.warn(reason, stacklevel=2)
    return frechet(gaussian(moments(a)), gaussian(moments(b)))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared kernel distance, eq. (2), between features a [N, F] and b [M, F]: 0 on average for equal distributions.

    It is unbiased for every N and M if the rows are independent samples. Rows with equal shares of each class vary less
    than independent ones, and give values below 0 on average.

    Raises:
      ValueError: as `frechet_distance`.
    """
    a, b = (x.astype(np.float64) for x in pair(a, b))
    f = a.shape[1]

    def total(x: np.ndarray, y: np.ndarray) -> float:
        return by_rows(lambda rows: ((rows @ y.T / f + 1) ** 3).sum(1), x).sum()

    def within(x: np.ndarray) -> float:
        itself = ((np.square(x).sum(1) / f + 1) ** 3).sum()
        return (total(x, x) - itself) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b)))


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Precision and recall (`neighbours`) of features `fake` [M, F] with respect to `real` [N, F].

    Precision is the share of fakes that lie near some real, recall the share of reals that lie near some fake. Compare
    only values with equal N, M and k: 1,000 real digits in the place of fakes reach 0.88 of 1,000 others.

    Raises:
      ValueError: k is outside 1 .. (rows of the smaller set) - 1, or as `frechet_distance`.
    """
    near = neighbourhoods(real, fake, k)
    return near.precision, near.recall


def nearest_ratio(samples: np.ndarray, train: Any, held_out: Any) -> float:
    """Median distance of samples [N, ...] to the nearest training image, relative to held-out images, eq. (3).

    About 1 if the samples are new images, towards 0 if they are copies of training images. Images that are smoother
    than real ones are nearer to all others, so a value slightly below 1 does not prove copying. The arguments and the
    errors are those of `nearest_ratios`.
    """
    return float(np.median(nearest_ratios(samples, train, held_out)))


def nearest_ratios(samples: np.ndarray, train: Any, held_out: Any) -> np.ndarray:
    """The ratio of each sample [N], whose median is the `nearest_ratio`.

    `train` and `held_out` may be the `images` of a `Source`, decoded when indexed: those of `train` are read once, a
    block at a time, those of `held_out` are kept, in their own type. One block of each is float64.

    Raises:
      ValueError: images of different shapes, no images, a non-finite value, or at least half of the held-out images are
        also in the training set.
    """
    shapes = [tuple(x.shape[1:]) for x in (samples, train, held_out)]
    if len(set(shapes)) != 1:
        raise ValueError(
            f"samples, train and held_out have images of different shapes {shapes}; pass images of one shape"
        )
    for name, images in {"samples": samples, "train": train, "held_out": held_out}.items():
        if not len(images):
            raise ValueError(f"{name} must have at least one image, not shape {tuple(images.shape)}")
    # Both sets at once, so that training images which are decoded when indexed are decoded once.
    (near, _), (near_held_out, _) = _nearest({"samples": samples, "held_out": held_out[:]}, train)
    expected = float(np.median(np.sqrt(near_held_out)))
    if not expected:
        raise ValueError("at least half of held_out is also in train: pass images that were not used for training")
    return np.sqrt(near) / expected


def nearest(samples: np.ndarray, train: Any) -> tuple[np.ndarray, np.ndarray]:
    """Index [N] of the image of `train` that is nearest to each of `samples` [N, ...], and the distance [N] to it.

    The distance is that of `nearest_ratio`: between pixels, Euclidean. `train` may be the `images` of a `Source`.

    Raises:
      ValueError: images of different shapes, no training images, or a non-finite value.
    """
    if tuple(samples.shape[1:]) != tuple(train.shape[1:]) or not len(train):
        raise ValueError(f"samples {tuple(samples.shape)} and train {tuple(train.shape)} must hold images of one shape")
    ((square, which),) = _nearest({"samples": samples}, train)
    return which, np.sqrt(square)


def distance_and_reference(
    samples: np.ndarray,
    real: np.ndarray,
    real_labels: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    repeats: int = 5,
    seed: int = 0,
) -> tuple[float, float]:
    """Frechet distance of n samples [n, F] from real features [N, F], and the real-data reference of this distance.

    `repeats` times the real features are split at random (`split_real`) into n features, with the classes of the
    samples if their `labels` [n] are given, and the rest. The distance is that of the samples from the rest; the
    reference is that of the n real features from the rest; both are averaged. Their ratio is about 1 for samples as
    good as real images.

    Raises:
      ValueError: N < n + 2, a class has fewer real features than samples, repeats < 1, or as `frechet_distance`.
    """
    samples, real = pair(samples, real)
    real_labels = checked_labels(real_labels, len(real), owner="of the real features ")
    if index(repeats) < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    rng = np.random.default_rng(seed)
    values, of_samples = [], gaussian(moments(samples))
    root = square_root(of_samples.covariance)
    for _ in range(repeats):
        part, rest = split_real(real_labels, len(samples), rng, labels)
        of_rest = gaussian(moments(real[rest]))
        values.append([frechet(of_samples, of_rest, root), frechet(gaussian(moments(real[part])), of_rest)])
    distance, reference = np.mean(values, 0)
    return float(distance), float(reference)


def split_real(
    labels: np.ndarray, n: int, rng: np.random.Generator, like: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Random indices [n] of real images of classes `labels` [N], and the remaining indices [N - n].

    The n have the classes of the samples, `like` [n]; without it each class its share of the real images, so that both
    parts have the same shares.

    Raises:
      ValueError: fewer than 2 would remain, or a class has fewer real images than samples.
    """
    if n > len(labels) - 2:
        raise ValueError(
            f"comparing {n} samples needs at least {n + 2} real images, there are {len(labels)}: measure fewer samples"
        )
    classes, counts = np.unique(labels, return_counts=True)
    order = rng.permutation(len(classes))  # of equal fractions the first of these are rounded up
    if like is None:
        exact = n * counts / len(labels)
        shares = np.floor(exact).astype(int)
        shares[order[np.argsort((shares - exact)[order], kind="stable")][: n - shares.sum()]] += 1
    else:
        unknown = np.setdiff1d(like, classes)
        if len(unknown):
            raise ValueError(f"samples of class {unknown[0]} cannot be compared: there is no real image of it")
        shares = np.array([np.count_nonzero(like == c) for c in classes])
    if (shares > counts).any():
        scarce = int(np.argmax(shares - counts))
        raise ValueError(
            f"comparing {n} samples needs {shares[scarce]} real images of class {classes[scarce]}, there are "
            f"{counts[scarce]}: measure fewer samples"
        )
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:m] for c, m in zip(classes, shares, strict=True)]
    part = np.concatenate(chosen)
    return part, np.setdiff1d(np.arange(len(labels)), part)


def _nearest(sets: dict[str, Any], train: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Squared distance [N] from each image of each set to the nearest of `train`, and its index [N]; block by block."""
    found = [(np.full(len(images), np.inf), np.zeros(len(images), int)) for images in sets.values()]
    for start in range(0, len(train), blocks.ROWS):
        centres = _pixels("train", train, start)
        for (name, images), (least, which) in zip(sets.items(), found, strict=True):
            for i in range(0, len(images), blocks.ROWS):
                gaps = square_distances(_pixels(name, images, i), centres)
                now, part = gaps.min(1), slice(i, i + len(gaps))
                which[part] = np.where(now < least[part], start + gaps.argmin(1), which[part])
                least[part] = np.minimum(now, least[part])
    return found


def _pixels(name: str, images: Any, start: int) -> np.ndarray:
    """One block of images, from number `start` on, as rows of float64."""
    block = finite(name, images[start : start + blocks.ROWS])
    return block.reshape(len(block), -1).astype(np.float64)
