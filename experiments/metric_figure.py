"""Plots what each metric does when real digits get worse: with noise, blur, shifts, fewer classes and duplicates.

    python -m experiments.metric_figure --out=docs/metrics_damage.png

1,000 of the 5,000 digits of mnist5k take the place of samples, damaged more and more, and are compared with 3,000
others, in the features of the digits' classifier, for several random choices. The other 1,000 replace those of classes
that are left out. Takes some minutes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import scipy.ndimage
from absl import app, flags
from matplotlib.figure import Figure

from diffusion import data
from diffusion.io import files
from diffusion.metrics.distances import split_real
from diffusion.metrics.features.digits import digit_features
from diffusion.metrics.report import comparison
from experiments import command
from experiments.paths import define_path
from experiments.progress import Bar

_OUT = define_path("out", "metrics_damage.png", "The figure.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "How many random choices of images.", lower_bound=1)
_DATA_DIR = define_path("data_dir", None, "Where data sets are prepared; default: that of TensorFlow Datasets.")

COUNT = 1000
ROWS = (("distance",), ("kernel_distance",), ("sliced_distance",), ("precision", "recall"), ("density", "coverage"))
TITLES = ("Frechet distance", "kernel distance", "sliced distance", "precision, recall", "density, coverage")


def noise(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, level: float) -> np.ndarray:
    return np.clip(np.rint(x + rng.normal(0, 255 * level, x.shape)), 0, 255).astype(np.uint8)


def blur(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, level: float) -> np.ndarray:
    return np.rint(scipy.ndimage.gaussian_filter(x.astype(np.float32), (0, level, level, 0))).astype(np.uint8)


def shift(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, level: float) -> np.ndarray:
    return np.roll(x, int(level), 2)


def dropped_classes(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, level: float, spare: np.ndarray, spare_y: np.ndarray
) -> np.ndarray:
    """As many images, none of them of the first `level` classes: others of the later classes take their place."""
    free = rng.permutation(np.flatnonzero(spare_y >= level))[: int((y < level).sum())]
    return np.concatenate([x[y >= level], spare[free]])


def duplicates(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, level: float) -> np.ndarray:
    """As many images, of which the share `level` are copies of the others."""
    return np.resize(x[rng.permutation(len(x))[: max(round((1 - level) * len(x)), 1)]], x.shape)


# What makes images worse, in which unit, and how much.
DAMAGES: tuple[tuple[Callable[..., np.ndarray], str, tuple[float, ...]], ...] = (
    (noise, "noise, standard deviation (white: 1)", (0, 0.1, 0.2, 0.4, 0.8)),
    (blur, "blur, standard deviation in pixels", (0, 0.5, 1, 1.5, 2)),
    (shift, "shift in pixels", (0, 1, 2, 3, 4)),
    (dropped_classes, "classes left out of 10", (0, 1, 2, 3, 5)),
    (duplicates, "share of duplicates", (0, 0.5, 0.8, 0.9, 0.98)),
)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    command.start()
    source = data.load("mnist5k", "train", data_dir=_DATA_DIR.value)
    held_out = data.load("mnist5k", "test", data_dir=_DATA_DIR.value)
    images = np.concatenate([source.images, held_out.images])
    labels = np.concatenate([source.labels, held_out.labels])
    figure = plot(measure(images, labels, COUNT, _SEEDS.value))
    files.atomic_write(_OUT.value, lambda file: figure.savefig(file, format=Path(_OUT.value).suffix[1:] or "png"))
    print(f"written: {_OUT.value}")


def measure(images: np.ndarray, labels: np.ndarray, count: int, seeds: int) -> list[list[list[dict[str, float]]]]:
    """The numbers of `comparison`, by seed, damage and level, of `count` of digits uint8 [N, 28, 28, 1]."""
    features = digit_features(images)
    found = []
    with Bar(seeds * sum(len(levels) for *_, levels in DAMAGES), "measuring", "set") as bar:
        for seed in range(seeds):
            pool, rest = split_real(labels, 2 * count, np.random.default_rng(seed))
            part, spare = pool[::2], pool[1::2]  # the pool is in the order of the classes
            x, y = images[part], labels[part]
            real = features._replace(**{n: v[rest] for n, v in features._asdict().items() if v is not None})
            found.append([])
            for damage, _, levels in DAMAGES:
                found[-1].append([])
                for level in levels:
                    more = (images[spare], labels[spare]) if damage is dropped_classes else ()
                    worse = digit_features(damage(x, y, np.random.default_rng(seed), level, *more))
                    values = comparison(worse, real, labels[rest], repeats=1, resamples=0, seed=seed)
                    found[-1][-1].append(values)
                    bar.update()
    return found


def plot(found: list[list[list[dict[str, float]]]]) -> Figure:
    """A row for each metric, a column for each damage; lines are means over seeds, bands all of them."""
    figure = Figure(figsize=(2.6 * len(DAMAGES), 2.0 * len(ROWS)), layout="constrained", dpi=110)
    axes = figure.subplots(len(ROWS), len(DAMAGES), sharey="row")
    for i, (names, title) in enumerate(zip(ROWS, TITLES, strict=True)):
        for j, (_, unit, levels) in enumerate(DAMAGES):
            for name in names:
                values = np.array([[numbers[name] for numbers in seed[j]] for seed in found])
                axes[i, j].plot(levels, values.mean(0), marker="o", markersize=3, label=name)
                axes[i, j].fill_between(levels, values.min(0), values.max(0), alpha=0.3)
            axes[i, j].grid(alpha=0.3)
            if i == len(ROWS) - 1:
                axes[i, j].set_xlabel(unit, fontsize="small")
        if len(names) == 1:
            axes[i, 0].set_yscale("symlog", linthresh=10)
        else:
            axes[i, 0].legend(fontsize="small")
        axes[i, 0].set_ylabel(title)
    return figure


if __name__ == "__main__":
    command.run(main)
