"""Figures of a run beyond its samples: some on their way from noise, those nearest to training images, and seams."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffusion import data, sharding
from diffusion.metrics.distances import nearest
from diffusion.metrics.seams import seams
from experiments import charts, image_files, sampling
from experiments.display import as_images
from experiments.parts import Parts

STRIP_ROWS = 10  # samples
STRIP_FRAMES = 11  # images from noise to sample
PAIRS = 10
# Of training images that are decoded when they are read, at most so many are compared with the samples.
SEARCHED = 5_000
BYTES = 1 << 30  # and at most so much of them
COMPARED = 1_000  # samples


def film(
    run: Parts,
    params: Any,
    labels: np.ndarray,
    low: np.ndarray | None = None,
    members: Sequence[Parts] = (),
    *,
    keep: int = STRIP_FRAMES,
    weak: Parts | None = None,
) -> np.ndarray:
    """Images uint8 [K, N, H, W, C], from noise to sample, of the first `STRIP_ROWS` of samples with these labels.

    K is `keep`, or one more than the sampler has steps if those are fewer. `low`, `members` and
    `weak` as in `sampling.sample_fn`.
    """
    n = min(len(labels), STRIP_ROWS)
    sample = sampling.sample_fn(run, min(len(run.grid), keep), members, weak=weak)
    _, frames = sample(params, np.arange(n), labels[:n], *(() if low is None else (low[:n],)))
    shown = as_images(sharding.gathered(frames).reshape(-1, *run.spec.shape), run.spec.value_range)
    return shown.reshape(-1, n, *shown.shape[1:])


def film_strip(frames: np.ndarray) -> Image.Image:
    """At most `STRIP_FRAMES` of frames [K, N, H, W, C], evenly chosen: a row per sample, from noise on the left."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, STRIP_FRAMES).round().astype(int))
    return image_files.strip(frames[chosen])


def nearest_pairs(samples: np.ndarray, train: data.Source) -> Image.Image:
    """The `PAIRS` of samples [N, *S, C] that are nearest to a training image, in a row above those images.

    Nearest by values, of the first `COMPARED` samples. Of images that are not in memory at most `SEARCHED` are
    compared, chosen at random.
    """
    images, samples = train.images, samples[:COMPARED]
    most = max(min(SEARCHED, BYTES // (8 * math.prod(images.shape[1:]))), 1)
    if not isinstance(images, np.ndarray) and len(images) > most:
        images = images[np.sort(np.random.default_rng(0).permutation(len(images))[:most])]
    which, distance = nearest(samples, images)
    first = np.argsort(distance, kind="stable")[:PAIRS]
    pairs = np.concatenate([samples[first], images[which[first]]])
    return image_files.grid(as_images(pairs, train.value_range), len(first))


def seam_maps(samples: np.ndarray, train: data.Source, patches: tuple[int, int | None]) -> Image.Image:
    """Where neighbouring pixels of samples [N, H, W, C] differ, beside that of as many training images.

    `patches` are patch size and stride of the network. Both maps have one scale.
    """
    n = min(len(samples), len(train.labels))
    real = train.images[np.sort(np.random.default_rng(0).permutation(len(train.labels))[:n])]
    found = [seams(x, *patches) for x in (samples, real)]
    titles = [f"{name}, seam {each.ratio:.3f}" for name, each in zip(("samples", "real images"), found, strict=True)]
    return charts.heat_maps([each.energy for each in found], titles)
