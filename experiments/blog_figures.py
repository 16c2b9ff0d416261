"""Draws the figures of the blog (piantedosi.github.io/diffusion_model) from a trained run; it is the run's own config.

    python -m experiments.train --config=experiments/configs/blog.py
    python -m experiments.blog_figures --workdir=runs/blog

Writes into WORKDIR/figures: a digit losing itself in noise, a sample emerging from it, and what the network draws in n
steps and in n / 10, with and without scaling the step by 1.5; one PNG each, and blog.png with all of them.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from diffusion.io import files
from diffusion import process
from experiments import build, drawing, measure, image_files, runs, session
from experiments.config import Config

flags.declare_key_flag("workdir")

# The blog's step size, how many image_files a strip and a side of a grid hold, and inches per picture.
_OVERSTEP, _FRAMES, _SIDE, _INCHES = 1.5, 6, 5, 0.9


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    session.start()
    for path in figures(session.workdir()):
        print(path)


def figures(workdir: Path) -> list[Path]:
    """Draws all figures of the run in `workdir`; returns their paths, the combined one last.

    Raises:
      ValueError: the run is not on the blog's path.
      OSError: there is no run, or its folder cannot be written.
    """
    config, seen = build.stored(workdir)
    if config.process.path != "geometric":
        raise ValueError(
            f"{workdir} was trained on the {config.process.path} path, but the blog's figures need the geometric one: "
            "train with --config=experiments/configs/blog.py"
        )
    c = config.sample
    c.sampler, c.eta, c.shift, c.last, c.respacing = "ddim", 0.0, 1.0, None, None
    folder = workdir / "figures"
    files.check_writable(folder)
    params, step = runs.weights(workdir, config)
    print(f"drawing from step {step} of {workdir}")

    n = config.process.steps
    labels = measure.equal_share(_SIDE**2, seen.num_classes)
    strips = {
        "noising": partial(draw_strip, title="Noising", **noising(config)),
        "denoising": partial(draw_strip, title="Denoising", **denoising(config, seen, params, labels[:1])),
    }
    grids = {}
    for steps in (n, max(n // 10, 1)):
        for name, overstep in {"without": 1.0, "with": _OVERSTEP}.items():
            config.sample.steps, config.sample.overstep = steps, overstep
            drawn, _ = measure.collect(drawing.drawer(config, seen), params, labels, config.sample.batch_size)
            title = f"{name} step scaling{f' of {overstep:g}' if overstep != 1 else ''}, n = {steps}"
            grids[f"{name}_step_scaling_{steps}"] = partial(draw_grid, images=drawn, title=title)
    return write(folder, strips, grids)


def noising(config: Config) -> dict[str, Any]:
    """A held-out digit after some numbers of noising steps, the same noise each time."""
    count = steps_shown(config.process.steps)
    x0 = build.to_float(config, build.source(config, "test").images[:1])
    eps = jax.random.normal(jax.random.key(config.sample.seed), x0.shape)
    t = jnp.asarray(count / config.process.steps)
    xt = process.noise(build.path(config), x0.repeat(len(count), 0), t, eps.repeat(len(count), 0))
    return {"images": np.asarray(build.to_uint8(config, xt)), "names": [f"n = {i}" for i in count]}


def denoising(config: Config, seen: build.Seen, params: Any, labels: np.ndarray) -> dict[str, Any]:
    """One sample on its way from noise, in as many steps as it took to get there."""
    n = config.sample.steps = config.process.steps
    config.sample.overstep = _OVERSTEP
    count = steps_shown(n)
    _, frames = drawing.drawer(config, seen, len(count))(params, np.zeros(1, int), labels)
    return {"images": np.asarray(frames)[:, 0], "names": [f"n = {i}" for i in n - count]}


def steps_shown(n: int) -> np.ndarray:
    """The numbers of steps, 0 to n, whose image_files make a strip: those that `diffusion.sample` keeps."""
    return np.linspace(0, n, min(_FRAMES, n + 1)).round().astype(int)


def draw_strip(figure: Any, images: np.ndarray, names: Sequence[str], title: str) -> None:
    """Pictures side by side, each under its name."""
    figure.suptitle(title)
    for axes, image, name in zip(figure.subplots(1, len(images)), images, names, strict=True):
        axes.imshow(image_files.grid(image[None], 1, gap=0), cmap="gray", vmin=0, vmax=255)
        axes.set_title(name, fontsize="small")
        axes.set_axis_off()


def draw_grid(figure: Any, images: np.ndarray, title: str) -> None:
    """Pictures in a square."""
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots()
    axes.imshow(image_files.grid(images, _SIDE), cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()


def write(folder: Path, strips: dict[str, Any], grids: dict[str, Any]) -> list[Path]:
    """One PNG of every figure, and blog.png: the strips above each other, the grids in a square below."""
    from matplotlib.figure import Figure  # the object, not pyplot: it needs no screen

    wide, square = (_INCHES * (_FRAMES + 1), _INCHES * 2), (_INCHES * _SIDE, _INCHES * (_SIDE + 0.5))
    everything = Figure((wide[0] * 1.4, 2 * wide[1] + 2 * square[1]), layout="constrained")
    parts = everything.subfigures(3, 1, height_ratios=[wide[1], wide[1], 2 * square[1]])
    panels = [*parts[:2], *parts[2].subfigures(2, 2).flat]
    paths = []
    for panel, (name, draw) in zip(panels, (strips | grids).items(), strict=True):
        draw(panel)
        alone = Figure(wide if name in strips else square, layout="constrained")
        draw(alone)
        paths.append(save(folder / f"{name}.png", alone))
    return [*paths, save(folder / "blog.png", everything)]


def save(path: Path, figure: Any) -> Path:
    """Writes a matplotlib figure."""
    files.atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return path


if __name__ == "__main__":
    session.run(main)
