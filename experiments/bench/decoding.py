"""Images per second of a folder of JPEGs that are decoded when they are read, as for a training on more than memory.

    python -m experiments.bench.decoding
    python -m experiments.bench.decoding --images=20000 --rounds=3

`--images` JPEGs of 256x256, of noise with the spectrum of photographs, are read in batches of 64 in random order: by
`diffusion.data` (threads, a batch ahead), by Pillow alone in one process, by a process with Pillow per core, which pass
no pixels on: the roof, and by Grain (pip install grain; without it these rows are left out), once with its threads and
once with a process per core. Every program gives the same pixels.
"""

import contextlib
import importlib.util
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from diffusion import data
from experiments import command
from experiments.bench import commands, peers, tables, timing
from experiments.progress import Bar

SIZE, BATCH, QUALITY = 256, 64, 90
PILLOW, ROOF = "Pillow, one process", "Pillow, a process per core"


def define_flags(argv: list[str]) -> None:
    """The flags of all benchmarks, and how many images."""
    commands.define_flags(argv)
    flags.DEFINE_integer("images", 20_000, "JPEGs of 256x256; each program reads all of them.", lower_bound=BATCH)


def main(argv: Sequence[str]) -> None:
    command.start()
    commands.perform(argv, partial(run, images=flags.FLAGS.images, rounds=flags.FLAGS.rounds), report)


def run(*, images: int, rounds: int) -> dict[str, Any]:
    """All measurements, ready for JSON.

    Raises:
      AssertionError: two programs do not read the same pixels.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        files = write_images(Path(folder), images)
        source = data.load(f"folder:{folder}", "all", size=SIZE, channels=3, memory_limit=0)
        count = images // BATCH * BATCH
        order = np.random.default_rng(0).permutation(images)[:count]
        programs = {"diffusion.data": partial(ours, source, order), PILLOW: partial(pillow, files, order)}
        pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(timing.cores()))
        programs[ROOF] = partial(pillows, pool, files, order)
        if importlib.util.find_spec("grain"):
            programs["Grain, threads"] = partial(grains, files, order, 0)
            programs[f"Grain, {timing.cores()} processes"] = partial(grains, files, order, timing.cores())
        sums = {name: program() for name, program in programs.items()}
        errors = {name: float(abs(found - sums[PILLOW])) for name, found in sums.items()}
        return {
            "machine": timing.machine() | {"pillow": Image.__version__},
            "images": count,
            "errors": peers.check_same("Pillow", errors),
            "programs": timing.compare(programs, count, rounds),
        }


def write_images(folder: Path, n: int) -> list[Path]:
    """n JPEGs, of noise whose power falls with the square of the frequency, as that of photographs does."""
    rng, files = np.random.default_rng(0), []
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None])
    falling = 1 / np.maximum(frequency, 1 / SIZE)
    with Bar(n, "writing", "image") as progress:
        for i in range(n):
            if i < 200:  # the others are files with the same contents
                noise = np.fft.rfft2(rng.standard_normal((3, SIZE, SIZE))) * falling
                x = np.fft.irfft2(noise, (SIZE, SIZE)).transpose(1, 2, 0)
                x = np.clip(128 + 50 * x / x.std(), 0, 255).astype(np.uint8)
            path = folder / f"{i:06d}.jpg"
            if i < 200:
                Image.fromarray(x).save(path, quality=QUALITY)
            else:
                path.write_bytes(files[i % 200].read_bytes())
            files.append(path)
            progress.update()
    return files


def ours(source: data.Source, order: np.ndarray) -> int:
    """The sum of all pixels, from batches that are read ahead as in a training."""
    steps = len(order) // BATCH
    read: Callable[[int], np.ndarray] = lambda i: source.images[order[i * BATCH : (i + 1) * BATCH]]  # noqa: E731
    return sum(int(x.sum()) for _, x in data.prefetch(read, 0, steps))


def pillow(files: Sequence[Path], order: np.ndarray) -> int:
    """The same in one process, an image at a time."""
    total = 0
    for i in range(0, len(order), BATCH):
        total += int(np.stack([decoded(files[j]) for j in order[i : i + BATCH]]).sum())
    return total


def pillows(pool: Any, files: Sequence[Path], order: np.ndarray) -> int:
    """The same in the processes of a pool, which return sums alone."""
    return sum(pool.starmap(pillow, [(files, part) for part in np.array_split(order, timing.cores())]))


def grains(files: Sequence[Path], order: np.ndarray, processes: int) -> int:
    """The same by Grain, with its threads, or with worker processes."""
    import grain

    picked = [files[i] for i in order]
    batches = grain.MapDataset.source(picked).map(decoded).batch(BATCH).to_iter_dataset()
    if processes:
        batches = batches.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers=processes))
    return sum(int(x.sum()) for x in batches)


def decoded(path: Path) -> np.ndarray:
    """uint8 [H, W, 3] of a file."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def report(result: dict[str, Any]) -> str:
    """A table."""
    rows = [
        [name, f"{row['per_second']:.0f}", tables.over(row, PILLOW), tables.over(row, ROOF)]
        for name, row in result["programs"].items()
    ]
    heads = ["images/s", "over one process", "over a process per core"]
    where = tables.where(result["machine"], ("pillow",))
    title = f"{result['images']:,} JPEGs of {SIZE}x{SIZE}"
    return "\n\n".join([where, tables.table(title, heads, rows), peers.agreement(result["errors"])])


if __name__ == "__main__":
    command.run(main, define_flags)
