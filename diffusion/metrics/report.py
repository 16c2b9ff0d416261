"""All numbers of one set of samples, each with the value that real images reach, and the lines that print them."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from diffusion.data import Source
from diffusion.data.batches import checked_images, checked_labels
from diffusion.metrics.blocks import pair
from diffusion.metrics.distances import (
    agreement,
    distance_and_reference,
    kernel_distance,
    nearest_ratios,
    split_real,
)
from diffusion.metrics.features import Extracted, Features, inception
from diffusion.metrics.intervals import Interval, bootstrap, kernel_interval
from diffusion.metrics.moments import Gaussian, frechet, gaussian, moments, scarce, square_root
from diffusion.metrics.neighbours import Neighbourhoods, neighbourhoods
from diffusion.metrics.patches import patch_distance
from diffusion.metrics.scores import inception_score
from diffusion.metrics.seams import seams
from diffusion.metrics.sliced import sliced_distance

RENAMED = {"floor": "reference", "kernel_floor": "kernel_reference"}  # names that earlier versions wrote
AT_ONCE = 1000  # images that are decoded and given to the feature function at once
# Of more features than these, the interval of the Frechet distance would take minutes, and is left out.
MOST_RESAMPLED = 256
# Of more training images than these the nearest ones are not searched.
MOST_SEARCHED = 100_000
SHARES = ("precision", "recall", "coverage", "agreement")  # of images: they lie in [0, 1]
SLICES = 50  # directions of the sliced distance of each resample


class Line(NamedTuple):
    """How a number is printed: its key, its name, its format, and what to compare it with.

    `inception` is its published name, said of Inception-v3 features only.
    """

    key: str
    name: str
    form: str
    meaning: str
    inception: str = ""


LINES = (
    Line("distance", "Frechet distance", ".2f", "lower is better", "FID"),
    Line("reference", "  of real images", ".2f", "the reference: as many real images in their place"),
    Line("ratio", "  ratio", ".2f", "1: as good as real"),
    Line("spatial_distance", "spatial distance", ".2f", "Frechet distance of features with places", "sFID"),
    Line("spatial_reference", "  of real images", ".2f", ""),
    Line("kernel_distance", "kernel distance", ".4f", "lower is better; real images fall below 0", "KID"),
    Line("kernel_reference", "  of real images", ".4f", ""),
    Line("sliced_distance", "sliced distance", ".3f", "lower is better; needs fewer images", "MIND"),
    Line("sliced_reference", "  of real images", ".3f", ""),
    Line("precision", "precision", ".1%", "samples that look like real ones"),
    Line("precision_reference", "  of real images", ".1%", ""),
    Line("recall", "recall", ".1%", "real ones that look like some sample"),
    Line("recall_reference", "  of real images", ".1%", ""),
    Line("density", "density", ".2f", "how many real ones each sample looks like; 1: as real ones do"),
    Line("density_reference", "  of real images", ".2f", ""),
    Line("coverage", "coverage", ".1%", "real ones that have a sample near them"),
    Line("coverage_reference", "  of real images", ".1%", ""),
    Line("class_score", "class score", ".2f", "1 .. classes: certain and varied predictions", "Inception score"),
    Line("class_score_reference", "  of real images", ".2f", ""),
    Line("nearest_ratio", "nearest ratio", ".2f", "about 1: no copies of training images; 0: copies"),
    Line("patch_distance", "patch distance", ".3f", "sliced distance of patches of pixels; lower is better"),
    Line("patch_reference", "  of real images", ".3f", ""),
    Line("seam", "seam", ".3f", "change across patch borders; 1: no grid is visible"),
    Line("seam_reference", "  of real images", ".3f", ""),
    Line("agreement", "agreement", ".1%", "a classifier reads the label as given"),
)


def report(
    images: np.ndarray,
    labels: np.ndarray | None,
    train: Source,
    held_out: Source,
    *,
    features: Features | None,
    patches: tuple[int, int | None] | None = None,
    training: Any = None,
    repeats: int = 5,
    resamples: int = 100,
    seed: int = 0,
) -> dict[str, float]:
    """All numbers of n samples uint8 [n, H, W, C] of classes `labels` [n].

    Real images in the place of the samples have the samples' classes, or, without labels, the shares of all real ones.

    `train` has the images that the model was trained on, `held_out` those that it was not trained on. Distances are
    from both together. `features` maps images to features (`diffusion.metrics.features`); with None only the last
    lines below are computed, which need none, of samples [n, *S, C] of any type in the range 0 .. 255. Images are read
    in blocks.

    agreement, agreement_0 ..    share whose largest logit is at their label, of all and of each class that occurs;
                                 only with labels, and with a feature function that returns logits
    distance ... class_score     those of `comparison`
    nearest_ratio                on pixels, with its interval; not of more than MOST_SEARCHED training images.
                                 `training` has all of them, [M, *S, C], where `train` has only some
    patch_distance, ..reference  `patch_distance` from n real images, and that of n others in place of the samples
    seam, seam_reference         `seams` of the samples, and of n real images, for `patches` (patch_size, stride)

    Raises:
      TypeError: images are not uint8 or labels not integers.
      ValueError: wrong shapes or labels, n < 4, or too few real images (see `distance_and_reference`).
    """
    images = np.asarray(images) if features is None else checked_images(images)
    n = len(images)
    if labels is not None:
        labels = checked_labels(labels, n, train.num_classes or None)
    if n < 4:
        raise ValueError(f"measuring needs at least 4 images, better hundreds, not {n}: pass more samples")
    real_labels = np.concatenate([train.labels, held_out.labels])
    part, rest = split_real(real_labels, n, np.random.default_rng(seed), labels)
    training, pixels = train.images if training is None else training, {}
    if len(training) <= MOST_SEARCHED:  # before the features, because it checks the shapes
        near = nearest_ratios(images, training, held_out.images)
        pixels["nearest_ratio"] = float(np.median(near))
        pixels |= _interval("nearest_ratio", _of_median(near, resamples, seed))
    in_place, seam = _picked(train, held_out, part), {}
    others = _picked(train, held_out, np.random.default_rng(seed).permutation(rest)[:n])
    patch = {"patch_distance": patch_distance(images, others, seed=seed)}
    if len(others) == n:
        patch["patch_reference"] = patch_distance(in_place, others, seed=seed)
    if patches is not None:
        found, real = seams(images, *patches), seams(in_place, *patches)
        seam = {"seam": found.ratio, **_interval("seam", _of_seams(found.sums, resamples, seed))}
        seam["seam_reference"] = real.ratio
    pixels |= patch | seam
    if features is None:
        return pixels

    fake = extract(features, images)
    sources = [extract(features, source.images) for source in (train, held_out)]
    real = Extracted(*(None if x[0] is None else np.concatenate(x) for x in zip(*sources, strict=True)))
    agreements = {}
    if labels is not None and fake.logits is not None:
        read = fake.logits.argmax(1) == labels
        agreements["agreement"] = agreement(fake.logits, labels)
        agreements |= _interval("agreement", _of_mean(read, resamples, seed))
        for c in np.unique(labels):
            agreements[f"agreement_{c}"] = agreement(fake.logits[labels == c], labels[labels == c])
    numbers = comparison(fake, real, real_labels, labels=labels, repeats=repeats, resamples=resamples, seed=seed)
    return {**agreements, **numbers, **pixels}


def comparison(
    fake: Extracted,
    real: Extracted,
    real_labels: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    repeats: int = 5,
    resamples: int = 100,
    seed: int = 0,
) -> dict[str, float]:
    """The numbers of n samples that follow from features, with respect to N real images of classes `real_labels` [N].

    `labels` [n] are the classes of the samples, which real images in their place then have too.

    feature_count                how many features there are
    distance, reference, ratio   `distance_and_reference`, and the first over the second
    spatial_distance             Frechet distance of spatial features, where there are some, from the real images
                                 without n of them
    kernel_distance              from the real images without n of them
    kernel_reference             of these n real images from the others (below 0, see `kernel_distance`)
    precision, recall            with respect to these n real images, k = 3
    density, coverage            the same, k = 5, where n > 5
    sliced_distance              from n of the others
    class_score                  `inception_score` of the logits, where there are some
    ..._reference                the same of n real images in the place of the samples, where N >= 2 n
    ..._low, ..._high            95 % interval of a number (`intervals`) from `resamples` resamples: over the samples,
                                 of recall and coverage over the real images; none of `distance` for more than
                                 MOST_RESAMPLED features; with `resamples` = 0 none at all

    Raises:
      ValueError: too few real images, or features that cannot be compared (see `distance_and_reference`).
    """
    x, y = pair(fake.features, real.features)
    n = len(x)
    part, rest = split_real(real_labels, n, np.random.default_rng(seed), labels)
    others = y[np.random.default_rng(seed).permutation(rest)[:n]]
    enough = len(others) == n
    distance, reference = distance_and_reference(x, y, real_labels, labels=labels, repeats=repeats, seed=seed)
    values = {"feature_count": float(x.shape[1]), "distance": distance, "reference": reference}
    values["ratio"] = distance / reference
    if x.shape[1] <= MOST_RESAMPLED:
        values |= _interval("distance", _of_distance(x, gaussian(moments(y[rest])), resamples, seed, distance))
    if fake.spatial is not None and real.spatial is not None:
        of_rest = gaussian(moments(real.spatial[rest]))
        values["spatial_distance"] = frechet(gaussian(moments(fake.spatial)), of_rest)
        values["spatial_reference"] = frechet(gaussian(moments(real.spatial[part])), of_rest)
    values["kernel_distance"] = kernel_distance(x, y[rest])
    if resamples:
        interval = kernel_interval(x, y[rest], resamples=resamples, seed=seed)
        values |= _interval("kernel_distance", interval)
    values["kernel_reference"] = kernel_distance(y[part], y[rest])
    for k, names in ((3, ("precision", "recall")), (5, ("density", "coverage"))):
        if k < n:
            near = neighbourhoods(y[part], x, k)
            other = neighbourhoods(y[part], others, k) if enough else None
            values |= _of_neighbours(near, other, names, resamples, seed)
    values["sliced_distance"] = sliced_distance(x, others, seed=seed)
    if resamples:
        values |= _interval("sliced_distance", _of_slices(x, others, values["sliced_distance"], resamples, seed))
    if enough:
        values["sliced_reference"] = sliced_distance(y[part], others, seed=seed)
    return values | class_score(fake, None if real.logits is None else real.logits[part])


def against(
    fake: Extracted, reference: Gaussian, spatial: Gaussian | None = None, *, resamples: int = 100, seed: int = 0
) -> dict[str, float]:
    """The numbers of samples with respect to a mean and covariance of real features alone, such as a published file.

    feature_count, distance with its interval, class_score: as in `comparison`. With `spatial`, mean and covariance of
    spatial features, and samples that have such, also spatial_distance. Such files say nothing
    about other numbers, nor what real images would reach.

    Raises:
      ValueError: another number of features, fewer than 2 samples, or values that are NaN or infinite.
    """
    x = fake.features
    distance = frechet(gaussian(moments(x)), reference)
    values = {"feature_count": float(x.shape[1]), "distance": distance}
    if x.shape[1] <= MOST_RESAMPLED:
        values |= _interval("distance", _of_distance(x, reference, resamples, seed, distance))
    if spatial is not None and fake.spatial is not None:
        values["spatial_distance"] = frechet(gaussian(moments(fake.spatial)), spatial)
    return values | class_score(fake, None)


def class_score(fake: Extracted, real_logits: np.ndarray | None) -> dict[str, float]:
    """`class_score` of the samples and, with logits of real images, its reference; nothing without logits."""
    if fake.logits is None:
        return {}
    values = {"class_score": fake.logits} | ({} if real_logits is None else {"class_score_reference": real_logits})
    # Rows may be sorted by class, which splits of consecutive rows must not be.
    mixed = {name: x[np.random.default_rng(0).permutation(len(x))] for name, x in values.items()}
    return {name: inception_score(x, min(10, len(x)))[0] for name, x in mixed.items()}


def extract(features: Features, images: Any) -> Extracted:
    """Features and logits of images [N, H, W, C], an array or the `images` of a `Source`, a block at a time.

    Raises:
      TypeError: the feature function returns something else than `Extracted`.
    """
    blocks = []
    for i in range(0, len(images), AT_ONCE):
        blocks.append(features(images[i : i + AT_ONCE]))
        if not isinstance(blocks[-1], Extracted):
            raise TypeError(
                "the feature function must return diffusion.metrics.features.Extracted(features [N, F], logits or "
                f"None), not {type(blocks[-1]).__name__}"
            )
    return Extracted(*(None if x[0] is None else np.concatenate(x) for x in zip(*blocks, strict=True)))


def lines(values: Mapping[str, Any], features: str | None) -> list[str]:
    """A line for each number of LINES that is among the values: its name, value, interval, and what to compare it with.

    `features` is the name of the features. Names of published metrics, such as FID, are said of Inception-v3 only.
    """
    published, found = features == inception.NAME, []
    for line in LINES:
        if line.key in values:
            name = line.inception if published and line.inception else line.name
            ends = [values.get(f"{line.key}_{end}") for end in ("low", "high")]
            interval = "" if None in ends else " .. ".join(format(end, line.form) for end in ends)
            found.append(f"{name:<18}{format(values[line.key], line.form):>10}  {interval:<20} {line.meaning}".rstrip())
    for key, value in values.items():
        if key.startswith("agreement_") and key.removeprefix("agreement_").isdecimal():
            found.append(f"{'  of ' + key.removeprefix('agreement_'):<18}{value:>10.1%}")
    return found


def cautions(images: np.ndarray, values: Mapping[str, Any]) -> list[str]:
    """Why numbers of these samples uint8 [n, H, W, C] may mislead, a sentence each."""
    found = [scarce(len(images), int(values["feature_count"]))] if "feature_count" in values else []
    if images.size and images.max() <= 1:
        found.append(
            f"all pixel values are {'0' if not images.any() else '0 or 1'}, where 0 .. 255 are meant: if images in "
            "0 .. 1 were converted to uint8, write np.rint(255 * images).astype(np.uint8) instead"
        )
    return [sentence for sentence in found if sentence]


def with_current_names(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A report that was read from a file, with the names that earlier versions wrote replaced by today's."""
    return {RENAMED.get(name, name): value for name, value in stored.items()}


def _picked(train: Source, held_out: Source, places: np.ndarray) -> np.ndarray:
    """The images of these places in both sources, one after the other."""
    n = len(train.labels)
    return np.concatenate([train.images[places[places < n]], held_out.images[places[places >= n] - n]])


def _of_neighbours(
    near: Neighbourhoods, other: Neighbourhoods | None, names: tuple[str, str], resamples: int, seed: int
) -> dict[str, float]:
    """Numbers that are means of one value for each image, with their references and intervals."""
    rows = {
        "precision": near.holders > 0,
        "recall": near.recalled,
        "density": near.holders / near.k,
        "coverage": near.covered,
    }
    values = {}
    for name in names:
        values[name] = getattr(near, name)
        values |= _interval(name, _of_mean(rows[name], resamples, seed))
        if other is not None:
            values[f"{name}_reference"] = getattr(other, name)
    return values


def _of_mean(rows: np.ndarray, resamples: int, seed: int) -> Interval | None:
    if not resamples:
        return None
    return bootstrap(lambda which: rows[which].mean(), len(rows), resamples=resamples, seed=seed)


def _of_median(rows: np.ndarray, resamples: int, seed: int) -> Interval | None:
    if not resamples:
        return None
    return bootstrap(lambda which: np.median(rows[which]), len(rows), resamples=resamples, seed=seed)


def _of_slices(x: np.ndarray, others: np.ndarray, distance: float, resamples: int, seed: int) -> Interval:
    """Interval of the sliced distance, from fewer directions, moved to its value."""
    of = partial(sliced_distance, b=others, directions=SLICES, seed=seed)
    low, high = bootstrap(lambda which: of(x[which]), len(x), resamples=resamples, seed=seed)
    shift = distance - of(x)
    return Interval(low + shift, high + shift)


def _of_seams(sums: np.ndarray, resamples: int, seed: int) -> Interval | None:
    """Interval of the seam metric from the sums of each image; None where an image has no change beside borders."""
    if not resamples or not sums[:, 1].all():
        return None
    return bootstrap(lambda which: np.divide(*sums[which].sum(0)), len(sums), resamples=resamples, seed=seed)


def _of_distance(x: np.ndarray, real: Gaussian, resamples: int, seed: int, distance: float) -> Interval | None:
    """Interval of the Frechet distance of features x [n, F], moved to `distance`, which is a mean over splits."""
    if not resamples:
        return None
    root = square_root(real.covariance)
    of = lambda which: frechet(real, gaussian(moments(x[which])), root)  # noqa: E731
    low, high = bootstrap(of, len(x), resamples=resamples, seed=seed)
    shift = distance - of(np.arange(len(x)))
    return Interval(low + shift, high + shift)


def _interval(name: str, interval: Interval | None) -> dict[str, float]:
    if interval is None:
        return {}
    low, high = interval
    if name in SHARES:  # moved to its value, an interval may reach beyond what there can be
        low, high = max(low, 0.0), min(high, 1.0)
    return {f"{name}_low": low, f"{name}_high": high}
