"""Writes report.html of a run: curves, samples, and what was measured, in one file that needs no network.

    python -m experiments.page --workdir=runs/mnist

Training writes it at its end. For a run that is still training, or that stopped, this command shows what there is.
"""

import base64
import dataclasses
import html
import io
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from PIL import Image

from diffusion.io import files
from diffusion.metrics.features import digits, inception
from diffusion.metrics.report import LINES
from experiments import charts, command, display, report
from experiments.config import Config, to_dict
from experiments.log import Log
from experiments.parts import DataSpec
from experiments.run_dir import RunDir

flags.declare_key_flag("workdir")

WIDEST, TALLEST = 1280, 4000  # pixels; larger images are reduced
PREVIEWS = 6
CLASSES = 30  # at most so many have a bar each, those with the lowest values
UNMEASURED = ("step", "seconds")  # columns of the log that are no curves
TITLES = {
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "images_per_second": "Training images per second",
    "mse": "Mean square error of the prediction",
}

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1b1f24;
       background: #fff; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; padding-top: .5rem; border-top: 1px solid #d0d7de; }
img { max-width: 100%; height: auto; }
figure { margin: 0 0 1rem; }
figcaption, small { color: #57606a; font-size: .875rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.wide { width: 100%; max-width: 34rem; }
.sharp { image-rendering: pixelated; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .5rem; border-bottom: 1px solid #d0d7de; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
td small { display: block; white-space: normal; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .75rem; background: #f6f8fa; border-radius: 6px;
      font-size: .875rem; }
.note { padding: .5rem .75rem; background: #fff8c5; border-radius: 6px; }
"""


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    folder = RunDir(command.workdir())
    if not folder.is_run:
        raise FileNotFoundError(f"there is no run in {folder.path}: pass the --workdir of experiments.train")
    print(f"written: {write(folder)}")


def write(folder: RunDir) -> Path:
    """Writes report.html of a run from its files; those that are not there are left out. Returns its path."""
    text = page(folder)
    files.atomic_write(folder.page, lambda file: file.write(text.encode()))
    return folder.page


def page(folder: RunDir) -> str:
    """The page, as XHTML that browsers also read as HTML."""
    config, spec = folder.stored()
    found, rows = folder.report(), Log(folder.metrics).rows()
    sections = [
        _summary(folder, config, found, rows),
        *_samples(folder, config, spec, found or {}),
        *_numbers(found or {}, spec.class_names),
        *_closer(folder),
        *_curves(rows),
        *_previews(folder),
        _config(config),
        _commands(folder, found),
    ]
    title = f"{folder.path.resolve().name}, {config.data.name}"
    return (
        '<!DOCTYPE html>\n<html lang="en" xmlns="http://www.w3.org/1999/xhtml">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _summary(folder: RunDir, config: Config, found: Mapping[str, Any] | None, rows: Sequence[Mapping]) -> str:
    if found is None:
        step = max((row["step"] for row in rows), default=0)
        words = (
            f"Step {step} of {config.train.steps}: this run is training, or was stopped. The newest checkpoint is that "
            f"of step {folder.latest_step or 0}; the command that started the run continues it from there."
        )
    else:
        words = report.paragraph(folder.path, found).split("\nNext: ")[0]
    about = f"Config {config.name}, data {config.data.name}. {words}"
    return f"<h1>{html.escape(folder.path.resolve().name)}</h1>\n<p>{html.escape(about)}</p>"


def _samples(folder: RunDir, config: Config, spec: DataSpec, found: Mapping[str, Any]) -> Iterator[str]:
    if not folder.samples_image.exists():
        return
    yield "<h2>Samples</h2>"
    part = display.note(spec.shape)
    count = f"{found['sample_count']:,} samples" if "sample_count" in found else "the samples"
    yield _figure(
        folder.samples_image,
        f"Grid of samples of the run {folder.path.resolve().name}",
        f"The first of {count}; all are in samples.npz."
        + (f" Columns are the classes {', '.join(spec.class_names)}." if 1 < spec.num_classes <= 20 else "")
        + (f" Images show {part}." if part else ""),
    )
    if folder.film_strip.exists():
        yield _figure(
            folder.film_strip,
            "A row for each of the first samples, from noise on the left to the sample on the right",
            "The first samples on their way from noise, one row each.",
        )


def _numbers(found: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    if "unmeasured" in found or "patch_distance" in found or "distance" in found:
        yield "<h2>Metrics</h2>"
    if "unmeasured" in found:
        words = "Not compared in features" if "patch_distance" in found else "Nothing was measured"
        yield f'<p class="note">{words}: {html.escape(found["unmeasured"])}.</p>'
    if not {"distance", "patch_distance"} & set(found):
        return
    features = found.get("features", digits.NAME)
    on = f", in {found.get('feature_count', 64):.0f} features of {html.escape(features)}" if "distance" in found else ""
    yield (
        f"<p>{found.get('measured', found['sample_count']):,} samples against real images, both those of the training "
        f"and held-out ones{on}. “Real images” is what "
        "as many real images reach in the place of the samples. Below a value: its 95 % bootstrap interval.</p>"
    )
    if found.get("sample_non_finite"):
        words = report.non_finite(found["sample_non_finite"], found["sample_count"])
        yield f'<p class="note">{html.escape(words)}</p>'
    if found.get("measured", report.ENOUGH) < report.ENOUGH:
        yield f'<p class="note">{html.escape(report.caution(found["measured"], "--config.sample.count"))}</p>'
    yield (
        '<table>\n<thead><tr><th scope="col">Metric</th><th scope="col" class="number">Samples</th>'
        '<th scope="col" class="number">Real images</th></tr></thead>\n<tbody>'
    )
    for line, after in zip(LINES, (*LINES[1:], None), strict=True):
        if line.key in found and not line.key.endswith("reference"):
            name = line.inception if features == inception.NAME and line.inception else line.name.strip()
            ends = [found.get(f"{line.key}_{end}") for end in ("low", "high")]
            interval = "" if None in ends else f"<small>{' to '.join(format(end, line.form) for end in ends)}</small>"
            real = found.get(after.key) if after and after.key.endswith("reference") else None
            cells = [format(found[line.key], line.form) + interval, "" if real is None else format(real, line.form)]
            yield (
                f"<tr><td>{html.escape(name[0].upper() + name[1:])}<small>{html.escape(line.meaning)}</small></td>"
                + "".join(f'<td class="number">{each}</td>' for each in cells)
                + "</tr>"
            )
    yield "</tbody></table>"
    classes = {i: found[f"agreement_{i}"] for i in range(len(names)) if f"agreement_{i}" in found}
    if classes:
        lowest = sorted(sorted(classes, key=classes.get)[:CLASSES])
        words = "Agreement by class" + (f", the lowest {CLASSES}" if len(classes) > CLASSES else "")
        listed = ", ".join(f"{names[i]} {classes[i]:.1%}" for i in lowest)
        svg = charts.shares([names[i] for i in lowest], [classes[i] for i in lowest])
        yield f'<div class="columns">{_chart(svg, f"{words}: {listed}", f"{words}.")}</div>'


def _closer(folder: RunDir) -> Iterator[str]:
    """What numbers alone do not show: copies and seams."""
    if folder.nearest_image.exists():
        yield "<h2>Nearest training images</h2>"
        yield _figure(
            folder.nearest_image,
            "Samples in the upper row, each above the training image that is nearest to it",
            "Of the first 1,000 samples those that are nearest to a training image, and below each that image. Nearest "
            "by pixels; of training images that are not in memory at most 5,000 are searched.",
        )
    if folder.seam_image.exists():
        yield "<h2>Seams</h2>"
        yield _figure(
            folder.seam_image,
            "Maps of the mean square difference between neighbouring pixels, of samples and of real images",
            "Where neighbouring pixels differ. A grid of lines on the left that the right does not have is the grid of "
            "patches.",
            sharp=False,
        )


def _curves(rows: Sequence[Mapping[str, float]]) -> Iterator[str]:
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in UNMEASURED]
    if not names:
        return
    yield '<h2>Training</h2>\n<div class="columns">'
    of = {
        name: tuple(np.array(x, float) for x in zip(*((r["step"], r[name]) for r in rows if name in r), strict=True))
        for name in names
    }
    quarters = sorted(name for name in names if name.startswith("loss_q"))
    together = [name for name in ("loss", "held_out_loss") if name in names]
    groups = [("Loss", {name.replace("_", " "): of[name] for name in together})] if together else []
    if quarters:
        numbers = [int(name.removeprefix("loss_q")) for name in quarters]  # an expert has some of them
        labels = [f"{i / 4:g} to {(i + 1) / 4:g}" for i in numbers]
        lines = {label: of[name] for label, name in zip(labels, quarters, strict=True)}
        groups.append(("Loss by quarter of the range of times, from the least noise on", lines))
    others = [name for name in names if name not in {*together, *quarters}]
    groups += [(TITLES.get(name, name.replace("_", " ")), {name: of[name]}) for name in others]
    for title, lines in groups:
        last = [f"{values[-1]:.4g} at step {steps[-1]:.0f}" for steps, values in lines.values()]
        if len(lines) > 1:
            last = [f"{name}: {each}" for name, each in zip(lines, last, strict=True)]
        words, log = f"{title}: {'; '.join(last)}", title != TITLES["images_per_second"]
        yield _chart(charts.curves(lines, log=log, ordered=len(lines) > 2), words, f"{words}.")
    yield "</div>"


def _previews(folder: RunDir) -> Iterator[str]:
    found = sorted(folder.previews.glob("*.png"))
    if not found:
        return
    chosen = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, PREVIEWS).round().astype(int))]
    yield '<h2>Samples during training</h2>\n<div class="columns">'
    for path in chosen:
        yield _figure(path, f"Samples after training step {int(path.stem)}", f"Step {int(path.stem):,}.")
    yield "</div>"


def _config(config: Config) -> str:
    values, usual = to_dict(config), to_dict(dataclasses.replace(Config(), model=type(config.model)()))
    rows = []
    for section, fields in values.items():
        for name, value in fields.items() if isinstance(fields, dict) else [("", fields)]:
            default = usual[section].get(name) if isinstance(fields, dict) else usual[section]
            dotted, text = f"{section}.{name}".strip("."), html.escape(json.dumps(value))
            shown = text if value == default else f"<strong>{text}</strong>"
            rows.append(f"<tr><td>{html.escape(dotted)}</td><td>{shown}</td></tr>")
    return (
        "<h2>Config</h2>\n<details><summary>All fields; bold: other than the default</summary>\n<table><tbody>\n"
        + "\n".join(rows)
        + "\n</tbody></table></details>"
    )


def _commands(folder: RunDir, found: Mapping[str, Any] | None) -> str:
    lines, where = [], shlex.quote(str(folder.path))
    if folder.command.exists():
        lines += ["# trains, and continues where it stopped", folder.command.read_text().strip()]
    if found and "split" not in found:
        base = " --base_samples=runs/NAME/samples.npz" if found.get("condition") else " --num_samples=64 --trajectory"
        lines += ["# more samples", f"python -m experiments.sample --workdir={where}{base}"]
        lines += ["# the metrics again", f"python -m experiments.evaluate --workdir={where}"]
    lines += ["# this page again", f"python -m experiments.page --workdir={where}"]
    return f"<h2>Commands</h2>\n<pre>{html.escape(chr(10).join(lines))}</pre>"


def _chart(svg: str, alt: str, caption: str) -> str:
    return _embedded(base64.b64encode(svg.encode()).decode(), "svg+xml", alt, caption, "wide")


def _figure(path: Path, alt: str, caption: str, *, sharp: bool = True) -> str:
    """An image file, with a caption; `sharp`: pixels stay squares when it is enlarged."""
    data, kind = path.read_bytes(), "png"
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # it is a file of this run
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.width > WIDEST or image.height > TALLEST:
                scale = min(WIDEST / image.width, TALLEST / image.height)
                size = tuple(max(round(side * scale), 1) for side in image.size)
                file, kind = io.BytesIO(), "webp"
                image.resize(size, Image.Resampling.LANCZOS).save(file, "WEBP", quality=90)
                data = file.getvalue()
    except OSError as e:
        raise ValueError(f"{path} is damaged ({e}): delete it, and the report is written without it") from e
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return _embedded(base64.b64encode(data).decode(), kind, alt, caption, "sharp" if sharp else "")


def _embedded(encoded: str, kind: str, alt: str, caption: str, style: str) -> str:
    return (
        f'<figure><img class="{style}" alt="{html.escape(alt)}" src="data:image/{kind};base64,{encoded}"/>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


if __name__ == "__main__":
    command.run(main)
