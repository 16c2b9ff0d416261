"""Charts with matplotlib, without its state: curves as SVG, maps as images."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

POINTS = 300  # of a curve; more cannot be told apart


def curves(series: Mapping[str, tuple[np.ndarray, np.ndarray]], *, log: bool = False, ordered: bool = False) -> str:
    """SVG of lines (steps [N], values [N]) over training steps, with a legend where there are several.

    Long lines are averaged to `POINTS` points. `log` draws positive values on a logarithmic axis; `ordered` takes
    colours along a scale, for lines that have an order.
    """
    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(series))) if ordered else [None] * len(series)
    positive = all((values > 0).all() for _, values in series.values())
    for (name, (steps, values)), colour in zip(series.items(), colours, strict=True):
        steps, values = averaged(steps), averaged(values)
        axes.plot(steps, values, label=name, color=colour, linewidth=1.4, marker="." if len(steps) < 4 else None)
    if log and positive:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize="small")
    return _svg(figure)


def shares(names: Sequence[str], values: Sequence[float]) -> str:
    """SVG of a horizontal bar for each share, 0 to 1, with its name."""
    figure = Figure(figsize=(5.2, 0.7 + 0.24 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(range(len(names)), values, color="C0")
    axes.bar_label(bars, [f"{value:.1%}" for value in values], padding=3, fontsize="small")
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    axes.set_xlim(0, 1.13)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def heat_maps(maps: Sequence[np.ndarray], titles: Sequence[str]) -> Image.Image:
    """Maps [H, W] of values from 0 on side by side, with one scale."""
    figure = Figure(figsize=(3.2 * len(maps) + 0.6, 3.4), layout="constrained", dpi=120)
    most = max(float(each.max()) for each in maps) or 1.0
    for i, (values, title) in enumerate(zip(maps, titles, strict=True)):
        axes = figure.add_subplot(1, len(maps), i + 1)
        drawn = axes.imshow(values, cmap="magma", vmin=0, vmax=most, interpolation="nearest")
        axes.set_title(title, fontsize="medium")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(drawn, ax=figure.axes, shrink=0.75, label="mean square difference")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    with Image.open(file) as image:
        return image.convert("RGB")


def averaged(values: np.ndarray) -> np.ndarray:
    """Values [N], or the means of `POINTS` equal stretches of them if they are more."""
    if len(values) <= POINTS:
        return np.asarray(values)
    edges = np.linspace(0, len(values), POINTS + 1).astype(int)
    return np.add.reduceat(np.asarray(values, float), edges[:-1]) / np.diff(edges)


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    with rc_context({"svg.hashsalt": "patch-diffusion"}):  # so that equal runs have equal files
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
