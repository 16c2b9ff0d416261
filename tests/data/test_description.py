"""What is said about a source."""

import numpy as np

from diffusion import data
from diffusion.data.batches import Opened


def source(**more):
    images = np.zeros((1500, 6, 8, 3), np.uint8)
    labels = np.repeat([0, 2], [1200, 300])
    return data.from_arrays(images, labels, ("cat", "cow", "dog"))._replace(**more)


def test_images_classes_and_their_counts():
    assert data.describe(source()).splitlines() == [
        "arrays: 1,500 images of 6x8, 3 channels (RGB)",
        "  classes     3: cat (1,200), cow (0), dog (300); without images: cow",
    ]
    grey = data.from_arrays(np.zeros((2, 5, 4, 1), np.uint8))
    assert data.describe(grey).splitlines() == [
        "arrays: 2 images of 5x4, 1 channel (grey)",
        "  classes     none: the images have no labels",
    ]


def test_what_was_opened():
    opened = Opened(
        "train", (("train", 1500), ("test", 20)), ((".txt", 1200), (".heic", 3)), ("a.png (empty)",), ("n",)
    )
    assert data.describe(source(opened=opened)).splitlines() == [
        "arrays, split train: 1,500 images of 6x8, 3 channels (RGB)",
        "  classes     3: cat (1,200), cow (0), dog (300); without images: cow",
        "  splits      train 1,500, test 20",
        "  passed over 1,200 .txt, 3 .heic",
        "  skipped     1 that cannot be read",
        "              a.png (empty)",
        "  note        n",
    ]


def test_long_lists_are_cut():
    labels = np.arange(1500) % 1000
    names = tuple(f"class {i}" for i in range(1000))
    opened = Opened(skipped=tuple(f"{i}.png (why)" for i in range(70)))
    text = data.describe(data.from_arrays(np.zeros((1500, 2, 2, 1), np.uint8), labels, names)._replace(opened=opened))
    assert "1,000: class 0 (2), " in text and "class 19 (2) and 980 more (1 to 2 images each)" in text
    assert "70 that cannot be read" in text and "4.png" in text and "5.png" not in text and "and 65 more" in text


def test_the_digits_have_their_splits(mnist5k_splits):
    lines = data.describe(mnist5k_splits[1]).splitlines()
    assert lines[0] == "mnist5k, split test: 500 images of 28x28, 1 channel (grey)"
    assert lines[1].startswith("  classes     10: 0 (50), 1 (50)")
    assert lines[2] == "  splits      train 4,500, test 500"
