"""Plots the figures of the blog (piantedosi.github.io/diffusion_model) for a trained run.

    python -m experiments.train --config=experiments/configs/blog.py
    python -m experiments.blog_figures --workdir=runs/blog

Writes into WORKDIR/figures: a digit as noise is added, a sample as noise is removed, and samples in n and in n / 10
steps, with and without scaling the step by 1.5; one PNG each, and blog.png with all of them.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from diffusion import process
from diffusion.io import files
from experiments import command, image_files, inputs, parts, report, sampling
from experiments.config import Config
from experiments.parts import DataSpec
from experiments.run_dir import RunDir

flags.declare_key_flag("workdir")

# The blog's step size, how many images a strip and a side of a grid hold, and inches per image.
_OVERSTEP, _FRAMES, _SIDE, _INCHES = 1.5, 6, 5, 0.9


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    command.start()
    for path in figures(command.workdir()):
        print(path)


def figures(workdir: Path) -> list[Path]:
    """Plots all figures of the run in `workdir`; returns their paths, the combined one last.

    Raises:
      ValueError: the run is not on the blog's path.
      OSError: there is no run, or its folder cannot be written.
    """
    run = RunDir(workdir)
    config, spec = run.stored()
    if config.process.path != "geometric":
        raise ValueError(
            f"{workdir} was trained on the {config.process.path} path, but the blog's figures need the geometric one: "
            "train with --config=experiments/configs/blog.py"
        )
    config = with_sample(config, sampler="ddim", eta=0.0, shift=1.0, last=None, respacing=None)
    folder = workdir / "figures"
    files.check_writable(folder)
    params, step = run.weights()
    print(f"sampling from step {step} of {workdir}")

    n = config.process.steps
    labels = inputs.equal_shares(_SIDE**2, spec.num_classes)
    strips = {
        "noising": partial(plot_strip, title="Noising", **noising(config, spec)),
        "denoising": partial(plot_strip, title="Denoising", **denoising(config, spec, params, labels[:1])),
    }
    grids = {}
    for steps in (n, max(n // 10, 1)):
        for name, overstep in {"without": 1.0, "with": _OVERSTEP}.items():
            resolved = parts.resolve(with_sample(config, steps=steps, overstep=overstep), spec)
            sample = sampling.sample_fn(resolved, finite=True)
            images, *_ = report.collect(sample, params, labels, config.sample.batch_size)
            title = f"{name} step scaling{f' of {overstep:g}' if overstep != 1 else ''}, n = {steps}"
            grids[f"{name}_step_scaling_{steps}"] = partial(plot_grid, images=images, title=title)
    return write(folder, strips, grids)


def with_sample(config: Config, **fields: Any) -> Config:
    """The config with other fields of `sample`."""
    return replace(config, sample=replace(config.sample, **fields))


def noising(config: Config, spec: DataSpec) -> dict[str, Any]:
    """A held-out digit after some numbers of noising steps, the same noise each time."""
    run, count = parts.resolve(config, spec), steps_shown(config.process.steps)
    x0 = parts.to_float(run, inputs.source(config, "test").images[:1])
    eps = jax.random.normal(jax.random.key(config.sample.seed), x0.shape)
    t = jnp.asarray(count / config.process.steps)
    xt = process.noise(run.path, x0.repeat(len(count), 0), t, eps.repeat(len(count), 0))
    return {"images": np.asarray(parts.to_uint8(run, xt)), "names": [f"n = {i}" for i in count]}


def denoising(config: Config, spec: DataSpec, params: Any, labels: np.ndarray) -> dict[str, Any]:
    """One sample on its way from noise, in as many steps as the noising has."""
    n = config.process.steps
    run, count = parts.resolve(with_sample(config, steps=n, overstep=_OVERSTEP), spec), steps_shown(n)
    _, frames = sampling.sample_fn(run, len(count))(params, np.zeros(1, int), labels)
    return {"images": np.asarray(frames)[:, 0], "names": [f"n = {i}" for i in n - count]}


def steps_shown(n: int) -> np.ndarray:
    """The numbers of steps, 0 to n, whose images make a strip: those that `diffusion.sample` keeps."""
    return np.linspace(0, n, min(_FRAMES, n + 1)).round().astype(int)


def plot_strip(figure: Any, images: np.ndarray, names: Sequence[str], title: str) -> None:
    """Images side by side, each under its name."""
    figure.suptitle(title)
    for axes, image, name in zip(figure.subplots(1, len(images)), images, names, strict=True):
        axes.imshow(image_files.grid(image[None], 1, gap=0), cmap="gray", vmin=0, vmax=255)
        axes.set_title(name, fontsize="small")
        axes.set_axis_off()


def plot_grid(figure: Any, images: np.ndarray, title: str) -> None:
    """Images in a square."""
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots()
    axes.imshow(image_files.grid(images, _SIDE), cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()


def write(folder: Path, strips: dict[str, Any], grids: dict[str, Any]) -> list[Path]:
    """Writes one PNG of every figure, and blog.png with all of them: strips on top, grids in a square below."""
    from matplotlib.figure import Figure  # the object, not pyplot: it needs no screen

    wide, square = (_INCHES * (_FRAMES + 1), _INCHES * 2), (_INCHES * _SIDE, _INCHES * (_SIDE + 0.5))
    everything = Figure((wide[0] * 1.4, 2 * wide[1] + 2 * square[1]), layout="constrained")
    parts = everything.subfigures(3, 1, height_ratios=[wide[1], wide[1], 2 * square[1]])
    panels = [*parts[:2], *parts[2].subfigures(2, 2).flat]
    paths = []
    for panel, (name, plot) in zip(panels, (strips | grids).items(), strict=True):
        plot(panel)
        alone = Figure(wide if name in strips else square, layout="constrained")
        plot(alone)
        paths.append(save(folder / f"{name}.png", alone))
    return [*paths, save(folder / "blog.png", everything)]


def save(path: Path, figure: Any) -> Path:
    """Writes a matplotlib figure."""
    files.atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return path


if __name__ == "__main__":
    command.run(main)
