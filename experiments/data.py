"""Shows a data set as training would read it: what was found, and a few images of each class.

    python -m experiments.data --name=folder:PATH --out=pets.png
    python -m experiments.data --name=folder:PATH --size=64 --split=test --class_names_in=names
    python -m experiments.data --name=cifar10
    python -m experiments.data --name=array:volumes.npy --range=0,1 --out=slices.png

All files of a folder are checked; those that were are remembered, so that training starts at once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import app, flags
from PIL import Image, ImageDraw, ImageFont

from diffusion import data
from diffusion.io import files
from experiments import display, image_files, inputs
from experiments.command import run
from experiments.paths import define_path

READING = ("size", "crop", "channels", "range", "data_dir", "class_names_in", "bad_files")


def define_flags(argv: Sequence[str]) -> None:
    """Flags of this command; defined when it runs, since other commands have some of the same names."""
    del argv
    flags.DEFINE_string("name", None, "A data set of TFDS, folder:PATH, array:PATH or datasets:PATH.")
    flags.DEFINE_string("split", "train", "Which split: train, test, for folders and arrays also all and validation.")
    define_reading_flags()
    define_path("out", None, "Also write a grid of images to this file, a row for each class.")
    flags.DEFINE_integer("columns", 8, "Images in a row of it.", lower_bound=1)
    flags.DEFINE_integer("rows", 20, "Rows of it, at most.", lower_bound=1)


def define_reading_flags() -> None:
    """The flags that say how a data set is read, for `opened`; also those of other commands on data sets."""
    flags.DEFINE_list("size", None, "Height and width, or one number for both, as --config.data.size.")
    flags.DEFINE_enum("crop", "center", data.CROPS, "What to do with images of another size.")
    flags.DEFINE_integer("channels", None, "1, 3, or 4 with transparency; default: the images' own. Of arrays: theirs.")
    flags.DEFINE_list("range", None, "Of arrays: the smallest and the largest value, as --config.data.range.")
    flags.DEFINE_enum("class_names_in", "folders", data.CLASS_NAMES_IN, "Where a folder has the names of its classes.")
    flags.DEFINE_enum("bad_files", "raise", data.BAD_FILES, "What to do with files of a folder that cannot be read.")
    define_path("data_dir", None, "Where TFDS keeps its data sets.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    f = flags.FLAGS
    if not f.name:
        raise ValueError("--name is missing: pass a data set, --name=folder:PATH, --name=mnist5k or --name=cifar10")
    if f.out:
        if Path(f.out).suffix.lower() not in (".png", ".webp"):
            raise ValueError(f"--out={f.out} must end in .png or .webp")
        files.check_writable(Path(f.out).parent)
    source = opened(f.name, f.split)
    print(data.describe(source))
    if f.out:
        picked = examples(source, f.rows, f.columns)
        image_files.save(Path(f.out), sheet(source, picked))
        of = f" of {source.num_classes:,} classes" if source.num_classes > len(picked) else ""
        part = display.note(source.images.shape[1:])
        print(f"{f.out}: {sum(map(len, picked))} images, {len(picked)} rows{of}{f'; they show {part}' if part else ''}")


def reading() -> dict[str, Any]:
    """The flags of `define_reading_flags` as fields of `config.data`.

    Raises:
      ValueError: a flag has a wrong value.
    """
    f = flags.FLAGS
    options: dict[str, Any] = {name: f[name].value for name in READING}
    if options["range"] is not None:
        options["range"] = value_range(options["range"])
    try:
        options["size"] = options["size"] and tuple(map(int, options["size"]))
    except ValueError:
        raise ValueError(
            f"--size={','.join(f.size)} must be one number or two, as in --size=64 or --size=48,64"
        ) from None
    if options["size"] and len(options["size"]) == 1:
        options["size"] *= 2
    return options


def opened(name: str, split: str, flag: str = "--name") -> data.Source:
    """A split of the data set that `flag` names, read as the flags say.

    Raises:
      ValueError, OSError: a flag has a wrong value, or the data set cannot be read; the message names the flag.
    """
    options = reading()
    value_range = options.pop("range")
    try:
        return inputs.load(name, split, memory_limit=0, value_range=value_range, **options)
    except (ValueError, OSError) as e:  # fields of a config are flags here
        text = str(e).replace("--config.data.held_out", "--split").replace("--config.data.name", flag)
        raise (ValueError if isinstance(e, ValueError) else OSError)(text.replace("--config.data.", "--")) from e


def value_range(given: Sequence[str]) -> tuple[float, ...]:
    """The numbers of --range=0,1 or --range="(0.0, 1.0)".

    Raises:
      ValueError: they are no two numbers.
    """
    try:
        first, last = (float(each.strip(" ()")) for each in given)
    except ValueError:
        raise ValueError(f"--range={','.join(given)} must be two numbers, as in --range=0,1") from None
    return first, last


def examples(source: data.Source, rows: int, columns: int) -> list[np.ndarray]:
    """Numbers of images to show: a row for each of the first classes, or of all images; evenly spread over each."""
    spread = lambda found, n: found[np.unique(np.linspace(0, len(found) - 1, n).round().astype(int))]  # noqa: E731
    if source.num_classes:
        of_class = [np.flatnonzero(source.labels == label) for label in range(min(source.num_classes, rows))]
        return [spread(found, columns) if len(found) else found for found in of_class]
    chosen = spread(np.arange(len(source.labels)), 4 * columns)
    return [chosen[start : start + columns] for start in range(0, len(chosen), columns)]


def sheet(source: data.Source, picked: Sequence[np.ndarray]) -> Image.Image:
    """The picked images, a row for each list of numbers, with the name of the class on its left."""
    columns = max(map(len, picked))
    found = [display.as_images(source.images[numbers], source.value_range) for numbers in picked]
    shown = np.full((len(picked), columns, *found[0].shape[1:]), 255, np.uint8)
    for row, images in zip(shown, found, strict=True):
        row[: len(images)] = images
    grid = image_files.grid(shown.reshape(-1, *shown.shape[2:]), columns)
    names = [name if len(name) <= 24 else f"{name[:21]}..." for name in source.class_names[: len(picked)]]
    if not names:
        return grid
    # The font of matplotlib has more letters than that of Pillow.
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 12)
    margin = int(max(font.getlength(name) for name in names)) + 10
    whole = Image.new(grid.mode, (grid.width + margin, grid.height), "white")
    whole.paste(grid, (margin, 0))
    draw, height = ImageDraw.Draw(whole), (grid.height - 2) / len(picked)
    for i, name in enumerate(names):
        draw.text((margin - 4, (i + 0.5) * height), name, "black", font, "rm")
    return whole


if __name__ == "__main__":
    run(main, define_flags)
