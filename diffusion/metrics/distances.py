"""How good pictures of digits are, in numbers, each with something to hold it against.

Pictures are compared in the features phi of a small digit classifier that ships with this package, because the usual
network of Frechet distances saw photographs. With means m, covariances S and k(a, b) = (a.b / F + 1)^3:

    frechet = |m_a - m_b|^2 + tr(S_a + S_b) - 2 sum_i sqrt(lambda_i),  lambda = eig(S_a^1/2 S_b S_a^1/2)     (1)
    kernel  = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)              (2)
    precision = share of fakes within some ball(r_i),  ball(x) reaching to the k-th nearest neighbour of x   (3)
    recall    = share of reals within some ball(f_i)
    nearest   = median_i min_j |f_i - train_j| / median_i min_j |held_out_i - train_j|,  on pixels           (4)

(1) Dowson and Landau 1982, Heusel et al. 2017 (the square of a metric, as it is always quoted); (2) Binkowski et al.
2018, the unbiased estimate; (3) Kynkaanniemi et al. 2019. (1) depends on the number of pictures: the fewer real
digits one takes, the farther they are from the others. Therefore `distance_and_floor` measures n samples, and n real
digits in their place, against the same remaining real digits. Quote the distance with that floor, never alone.

Statistics are float64 on the host. The network runs in batches of one size, so that a picture's features do not depend
on its neighbours and any number of pictures compiles once.
"""

import functools
import hashlib
import os
from collections.abc import Callable
from operator import index
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.data import Source
from diffusion.models import classifier

WEIGHTS = Path(__file__).parent / "weights" / "mnist_classifier.safetensors"
SHA256 = "052ee3a01fef402e1268c33fc0f871cb5a5e6076c98f207378755c1e16b9d162"  # of WEIGHTS
BATCH_SIZE = 250
ROWS = 256  # of a table of pairs that are held at once


def load_classifier(path: str | os.PathLike = WEIGHTS, sha256: str = SHA256) -> Any:
    """Parameters of the digit classifier, from a file that must have this SHA-256.

    Raises:
      OSError: the file is missing or cannot be read.
      ValueError: it is another file: numbers measured with it could not be compared with anybody else's.
    """
    try:
        file = Path(path).read_bytes()
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"the digit classifier {path} is missing: install the package again, or train it with "
            "`python -m experiments.classifier`"
        ) from e
    found = hashlib.sha256(file).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} is not the digit classifier expected: its SHA-256 is {found}, not {sha256}. Install the package "
            "again, or pass sha256= of a classifier that you trained"
        )
    return classifier.from_bytes(file)


def digit_features(images: np.ndarray, params: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 [N, 10] and features float32 [N, 64] of digits: uint8 [N, 28, 28, 1], white on black.

    `params` are those of `models.classifier`; None takes the shipped ones.

    Raises:
      TypeError: images are not uint8.
      ValueError: images are not N >= 1 pictures of 28x28x1.
    """
    images = _digits(images)
    params = _shipped() if params is None else params
    n = len(images)
    padded = np.concatenate([images, np.zeros((-n % BATCH_SIZE, *images.shape[1:]), np.uint8)])
    parts = [_forward(params, batch) for batch in padded.reshape(-1, BATCH_SIZE, *images.shape[1:])]
    logits, features = (np.concatenate(arrays)[:n] for arrays in zip(*parts, strict=True))
    return logits, features


def agreement(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of pictures whose largest logit [N, classes] is their label [N].

    Raises:
      ValueError: logits and labels do not belong together, or labels lie outside 0 .. classes - 1.
      TypeError: labels are not integers.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or not logits.size:
        raise ValueError(f"logits must have shape [N, classes] with N >= 1, not {logits.shape}")
    return float((logits.argmax(1) == _labels(labels, *logits.shape)).mean())


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
    """Squared kernel distance, eq. (2), of features a [N, F] and b [M, F]: expected value 0 for equal distributions.

    It is unbiased for every N and M if rows are drawn independently. Rows in equal shares of each class are spread more
    evenly than that, and fall below 0 on average.

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
    """Precision (are fakes like reals?) and recall (is every real like a fake?), eq. (3), of features [N, F], [M, F].

    Compare values of equal N, M and k only: 1,000 real digits in the place of fakes reach 0.88 of 1,000 others.

    Raises:
      ValueError: k is not between 1 and the number of rows of the smaller set - 1, or as `frechet_distance`.
    """
    real, fake = _pair(real, fake)
    k = index(k)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k={k} must lie in 1 .. {min(len(real), len(fake)) - 1} for {len(real)} and {len(fake)} rows")
    return _covered(fake, real, k), _covered(real, fake, k)


def nearest_ratio(samples: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> float:
    """Are samples [N, ...] copies of training pictures [M, ...]? Eq. (4): about 1 if not, towards 0 if they are.

    Pictures that are smoother than real ones are nearer to everything: a value somewhat below 1 does not prove copying.

    Raises:
      ValueError: pictures of different shapes, none, a value that is not finite, or held-out pictures which are mostly
        in the training set.
    """
    arrays = {"samples": samples, "train": train, "held_out": held_out}
    samples, train, held_out = (_finite(name, x) for name, x in arrays.items())
    shapes = [x.shape[1:] for x in (samples, train, held_out)]
    if len(set(shapes)) != 1:
        raise ValueError(f"samples, train and held_out hold pictures of different shapes {shapes}")

    def median(x: np.ndarray) -> float:
        y = train.reshape(len(train), -1)
        nearest = _by_rows(lambda rows: _square_distances(rows, y).min(1), x.reshape(len(x), -1))
        return float(np.median(np.sqrt(nearest)))

    usual = median(held_out)
    if not usual:
        raise ValueError("at least half of held_out is also in train: pass pictures that training never saw")
    return median(samples) / usual


def distance_and_floor(
    samples: np.ndarray, real: np.ndarray, real_labels: np.ndarray, *, repeats: int = 5, seed: int = 0
) -> tuple[float, float]:
    """Frechet distance of n samples [n, F] from real ones [N, F], and what n real ones in their place would have.

    `repeats` times the real set is divided by chance into n features, an equal share of each class (as samples should
    be), and the rest: the distance is that of the samples from the rest, the floor that of the n real ones from the
    rest, both averaged. Their ratio is about 1 for samples that cannot be told from real pictures.

    Raises:
      ValueError: N does not leave 2 real features beside n, a class has fewer than its share, repeats < 1, or as
        `frechet_distance`.
    """
    samples, real = _pair(samples, real)
    real_labels = _labels(real_labels, len(real))
    if index(repeats) < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(repeats):
        part, rest = _divide(real_labels, len(samples), rng)
        found.append([frechet_distance(x, real[rest]) for x in (samples, real[part])])
    distance, floor = np.mean(found, 0)
    return float(distance), float(floor)


def report(
    images: np.ndarray, labels: np.ndarray, train: Source, held_out: Source, *, repeats: int = 5, seed: int = 0
) -> dict[str, float]:
    """All numbers for n digits uint8 [n, 28, 28, 1] which should show `labels` [n], a nearly equal share of each class.

    `train` is what the digits were learned from, `held_out` what was kept back; distances are from both together.

    agreement, agreement_0 ..  share that the classifier reads as its label, of all and of each class that occurs
    distance, floor, ratio     `distance_and_floor`, and the first over the second
    kernel_distance            from the real digits but n, and
    kernel_floor               these n digits from the others (below 0, see `kernel_distance`)
    precision, recall          against these n digits
    nearest_ratio              on pixels

    Raises:
      TypeError: images are not uint8 or labels not integers.
      ValueError: shapes or labels are wrong, n < 4, or there are not enough real digits (see `distance_and_floor`).
    """
    images = _digits(images)
    n = len(images)
    labels = _labels(labels, n, classifier.CLASSES)
    if n < 4:
        raise ValueError(f"{n} pictures are too few to measure: at least 4 are needed, and hundreds to mean anything")
    real_images = [_digits(source.images[:]) for source in (train, held_out)]
    real_labels = np.concatenate([train.labels, held_out.labels])
    part, rest = _divide(real_labels, n, np.random.default_rng(seed))

    logits, fake = digit_features(images)
    real = digit_features(np.concatenate(real_images))[1]
    distance, floor = distance_and_floor(fake, real, real_labels, repeats=repeats, seed=seed)
    precision, recall = precision_recall(real[part], fake)
    classes = {f"agreement_{c}": agreement(logits[labels == c], labels[labels == c]) for c in np.unique(labels)}
    return {
        "agreement": agreement(logits, labels),
        **classes,
        "distance": distance,
        "floor": floor,
        "ratio": distance / floor,
        "kernel_distance": kernel_distance(fake, real[rest]),
        "kernel_floor": kernel_distance(real[part], real[rest]),
        "precision": precision,
        "recall": recall,
        "nearest_ratio": nearest_ratio(images, *real_images),
    }


@functools.cache
def _shipped() -> Any:
    return load_classifier()


@jax.jit
def _forward(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return classifier.apply(params, images.astype(jnp.float32) / 255)


def _divide(labels: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of n chosen with an equal share of each class (what is left over goes to classes by chance); the rest."""
    if n > len(labels) - 2:
        raise ValueError(
            f"{n} samples need at least {n + 2} real pictures to be compared with, there are {len(labels)}: "
            "measure fewer samples"
        )
    classes, counts = np.unique(labels, return_counts=True)
    shares = np.full(len(classes), n // len(classes))
    shares[rng.permutation(len(classes))[: n % len(classes)]] += 1
    if (shares > counts).any():
        scarce = int(np.argmax(shares - counts))
        raise ValueError(
            f"{n} samples in equal shares need {shares[scarce]} real pictures of class {classes[scarce]}, "
            f"there are {counts[scarce]}: measure fewer samples"
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
    # A centre is its own nearest neighbour, so the k-th other one is at place k.
    radii = _by_rows(lambda rows: np.partition(_square_distances(rows, centres), k, 1)[:, k], centres)
    return float(_by_rows(lambda rows: (_square_distances(rows, centres) <= radii).any(1), x).mean())


def _square_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a_i - b_j|^2 [N, M]; exact for whole numbers, as pixels are."""
    return (np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T).clip(0)


def _by_rows(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    return np.concatenate([f(x[i : i + ROWS]) for i in range(0, len(x), ROWS)])


def _digits(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8:
        remedy = "np.rint(images * 255).astype(np.uint8) if they lie in [0, 1]"
        raise TypeError(f"images must be uint8 with values 0 .. 255, not {images.dtype}: pass {remedy}")
    if images.ndim != 4 or images.shape[1:] != classifier.SIZE or not len(images):
        raise ValueError(f"images must be digits of shape [N, 28, 28, 1] with N >= 1, not {images.shape}")
    return images


def _labels(labels: np.ndarray, n: int, classes: int | None = None) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, not {labels.dtype}")
    if labels.shape != (n,):
        raise ValueError(f"labels have shape {labels.shape}, but there are {n} pictures: expected ({n},)")
    if classes is not None and n and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(f"labels lie in {labels.min()} .. {labels.max()}, outside 0 .. {classes - 1}")
    return labels


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, if they are features that can be compared."""
    a, b = _finite("the first features", a), _finite("the second features", b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be [N, F] and [M, F] with N, M >= 2, not {a.shape} and {b.shape}")
    return a, b


def _finite(name: str, x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if not x.size or not x.ndim:
        raise ValueError(f"{name} are empty: shape {x.shape}")
    bad = x.size - np.isfinite(x).sum()
    if bad:
        raise ValueError(f"{name} hold {bad} values that are NaN or infinite")
    return x
