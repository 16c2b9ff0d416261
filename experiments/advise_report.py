"""The advice of `experiments.advise` as a table with flags, and as a figure."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from diffusion.methods import spectrum
from experiments import display
from experiments.bench.tables import table

OF = {"image": "the image's energy", "recoverable": "what can be recovered"}
ROWS = {
    "noised": "noised image",
    "ideal": "E[x0 | xt] over\ntraining images",
    "combined": "best estimate",
    "network": "network",
}


def text(found: Mapping[str, Any]) -> str:
    """The table, and the flags of a training with the advised patch sizes."""
    rows, sizes = found["levels"], [p for p in found["patch_sizes"] if p > 1]
    names = ["ideal", "combined", *(["network"] if found["network"] else [])]
    heads = ["times", "known", *(f"error, {name}" for name in names), "images", *(f"P={p}" for p in sizes), "largest"]
    cells = []
    for row in rows:
        held = row["held_out"]
        lost = held["lost"][found["of"]]
        fine = [p for p in found["patch_sizes"] if p == 1 or lost[str(p)] < found["share"]]
        cells.append(
            [
                f"{row['snr']:.4g}",
                f"{row['times']:.0%}",
                f"{known(held):.1%}",
                *(f"{held['error'][name]:.4f}" for name in names),
                f"{np.exp(held['entropy']):.1f}",
                *(f"{lost[str(p)]:.1%}" for p in sizes),
                f"P={max(fine)}",
            ]
        )
    shape = "x".join(map(str, found["size"]))
    and_network = " and the network's prediction" if found["network"] else ""
    own = ", with the class known" if found["conditional"] else ""
    other = f" of the path {found['path']}, not of the trainings below" if found["path"] else ""
    return (
        f"{found['data']}: {found['held_out']:,} held-out images of {shape}, noised; posterior over {found['train']:,} "
        f"training images{own}.\n\n"
        + table("SNR", heads, cells)
        + f"\n\ntimes: share of the training times{other} near this SNR. known: share of the image's energy, "
        "without the mean image, that\ncan be recovered. error: mean square error of a value, in [-1, 1]; ideal: of "
        "the posterior mean over the training images;\ncombined: of its best linear combination, frequency by "
        "frequency, with the noised "
        f"image{and_network}. images: how many training\nimages share the posterior, exp(entropy). P=...: what can "
        f"be recovered and is finer\nthan a grid of PxP patches, as a share of {OF[found['of']]}. largest: that "
        f"loses less than {found['share']:.0%}.\n\n" + "\n\n".join(advice(found, int(n)) for n in found["advice"])
    )


def known(held: Mapping[str, Any]) -> float:
    """The share of the energy of images that can be recovered."""
    return float(np.sum(held["recoverable"]) / np.sum(held["energy"]))


def advice(found: Mapping[str, Any], experts: int) -> str:
    """Patch sizes and the flags of a training, for so many experts."""
    chosen = found["advice"][str(experts)]
    sizes, splits = chosen["patch_sizes"], chosen["snr_splits"]
    if len(sizes) == 1:
        fewer = "" if experts == 1 else f"; {experts} experts would cost as much"
        return (
            f"One network: P={sizes[0]} loses {chosen['lost'][0]:.1%}, on {chosen['cost']:.3g} of the positions of "
            f"P=1{fewer}:\n    {_flags(found, sizes[0])}"
        )
    edges = [np.inf, *splits, 0]
    lines = [f"{len(sizes)} experts, on {chosen['cost']:.3g} of the positions of P=1, averaged over the times:"]
    listed = ", ".join(map(str, splits)) + ("," if len(splits) == 1 else "")
    for i, p in enumerate(sizes):
        name = f"expert {i}, SNR {edges[i + 1]:g} to {edges[i]:g}, {chosen['times'][i]:.0%} of the times"
        lines.append(f"  {name}: P={p} loses {chosen['lost'][i]:.1%}")
        lines.append(
            f"    {_flags(found, p, f'--config.process.snr_splits=({listed})', f'--config.process.split={i}')}"
        )
    return "\n".join(lines)


def _flags(found: Mapping[str, Any], patch_size: int, *of_expert: str) -> str:
    """The command of a training, its network's patches of this size."""
    training = found["training"]["experts" if of_expert else "one"]
    argv = [*training, f"--config.model.patch_size={patch_size}", *of_expert]
    if found["workdir"]:  # that run's own folder is taken
        split = of_expert[-1].rpartition("=")[2] if of_expert else ""
        argv.append(f"--workdir={found['workdir']}_patch{patch_size}{'_split' * bool(split)}{split}")
    return shlex.join(["python", "-m", "experiments.train", *argv])


def figure(found: Mapping[str, Any], shown: Mapping[str, Any]) -> Figure:
    """Estimates of one image at falling SNR; below, what can be recovered, and what patches lose of it."""
    levels = found["levels"]
    snr = [row["snr"] for row in levels]
    kinds = [kind for kind in ROWS if shown[kind]]
    drawn = Figure(figsize=(1.15 * (len(snr) + 2), 1.2 * len(kinds) + 3.9), layout="constrained", dpi=110)
    top, bottom = drawn.subfigures(2, 1, height_ratios=(1.2 * len(kinds), 3.6))
    axes = top.subplots(len(kinds), len(snr) + 1, squeeze=False)
    for i, kind in enumerate(kinds):
        for j, image in enumerate([shown["truth"], *shown[kind]]):
            axis = axes[i, j]
            axis.set_xticks([])
            axis.set_yticks([])
            if j == 0 and i:
                axis.axis("off")
            else:
                _draw(axis, image)
            if i == 0:
                axis.set_title("image" if j == 0 else f"SNR {snr[j - 1]:.3g}", fontsize="small")
        axes[i, 1].set_ylabel(ROWS[kind], fontsize="x-small")
    left, middle, right = bottom.subplots(1, 3)
    _detail(left, found, snr)
    _losses(middle, found, snr)
    _spectra(right, found)
    return drawn


def _draw(axis: Any, image: np.ndarray) -> None:
    x = display.as_images(np.clip(image, -1, 1)[None].astype(np.float32), (-1.0, 1.0))[0]
    axis.imshow(x[..., 0] if x.shape[-1] == 1 else x, cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def _detail(axis: Any, found: Mapping[str, Any], snr: Sequence[float]) -> None:
    """The share of the energy that can be recovered, of all frequencies and of those that patches cannot carry."""
    held = [row["held_out"] for row in found["levels"]]
    axis.plot(snr, [known(each) for each in held], color="black", marker=".", label="all")
    sizes = [p for p in found["patch_sizes"] if p > 1]
    for p, colour in zip(sizes, colormaps["viridis"](np.linspace(0, 0.9, len(sizes))), strict=True):
        fine = [each["lost"]["image"][str(p)] for each in held]
        axis.plot(snr, fine, color=colour, marker=".", label=f"finer than P={p}")
    _limit(axis, found, "image")
    axis.set(xscale="log", xlabel="SNR", title="share of the image's energy that can be recovered")
    axis.invert_xaxis()
    _finish(axis)


def _losses(axis: Any, found: Mapping[str, Any], snr: Sequence[float]) -> None:
    sizes = [p for p in found["patch_sizes"] if p > 1]
    for p, colour in zip(sizes, colormaps["viridis"](np.linspace(0, 0.9, len(sizes))), strict=True):
        for name, style in (("held_out", "-"), ("finite", ":")):
            lost = [row[name]["lost"]["recoverable"][str(p)] for row in found["levels"]]
            axis.plot(snr, lost, style, color=colour, marker=".", label=f"P={p}" if name == "held_out" else None)
    _limit(axis, found, "recoverable")
    axis.set(xscale="log", xlabel="SNR", title="share of what can be recovered\n(dotted: training images, noised)")
    axis.invert_xaxis()
    axis.set_yscale("log")
    axis.set_ylim(1e-3, 1)
    _finish(axis)


def _limit(axis: Any, found: Mapping[str, Any], of: str) -> None:
    if found["of"] == of:
        axis.axhline(found["share"], color="black", linewidth=0.8, linestyle="--")


def _spectra(axis: Any, found: Mapping[str, Any]) -> None:
    """Mean power of the coefficients of each band: of images, and of what can be recovered of them."""
    levels = found["levels"]
    counts = np.bincount(spectrum.bands(tuple(found["size"])).ravel())
    frequency = (np.arange(len(counts)) + 0.5) / len(counts)
    power = np.array(levels[0]["held_out"]["energy"]) / counts
    axis.semilogy(frequency, power, color="black", label="images")
    for row, colour in zip(levels, colormaps["plasma"](np.linspace(0, 0.9, len(levels))), strict=True):
        recovered = np.array(row["held_out"]["recoverable"]) / counts
        axis.semilogy(frequency, recovered, color=colour, linewidth=1, label=f"{row['snr']:.3g}")
    axis.set_ylim(power.min() / 100, None)
    for p in found["patch_sizes"][1:]:
        axis.axvline(1 / p, color="grey", linewidth=0.6, linestyle="--")
    axis.set(xlabel="frequency (1: finest; dashes: 1 / P)", title="power that can be recovered, by SNR")
    _finish(axis)


def _finish(axis: Any) -> None:
    axis.grid(alpha=0.3)
    axis.title.set_fontsize("small")
    axis.xaxis.label.set_fontsize("small")
    axis.yaxis.label.set_fontsize("small")
    axis.tick_params(labelsize="x-small")
    axis.legend(fontsize="xx-small", ncols=2 if len(axis.lines) > 6 else 1)
