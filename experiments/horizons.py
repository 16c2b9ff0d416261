"""How good samples are with averages of several horizons of one run.

    python -m experiments.train --config.train.ema_power="(0.05, 0.1)" --workdir=runs/mnist
    python -m experiments.horizons --workdir=runs/mnist

For each width the average is made from the run's snapshots (`experiments.average`), as many samples are made of it as
at the end of the training, from the same noise, and measured as there. Writes horizons.json and horizons.png into
--outdir; called again, it measures only the widths that the file lacks.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from matplotlib.figure import Figure

from diffusion import averages
from diffusion.io import files, snapshots
from experiments import average, command, inputs, parts, report, sampling
from experiments.paths import define_path
from experiments.run_dir import RunDir, digest

WIDTHS = ("0.02", "0.04", "0.06", "0.08", "0.1", "0.13", "0.16", "0.2", "0.25")
# What is drawn, of what was measured, and in which direction it is better.
NUMBERS = {
    "ratio": "lower",
    "distance": "lower",
    "patch_distance": "lower",
    "agreement": "higher",
    "precision": "higher",
    "recall": "higher",
}


def define_flags(argv: Sequence[str]) -> None:
    """Flags of this command; defined when it runs, since other commands have some of the same names."""
    del argv
    flags.declare_key_flag("workdir")
    flags.DEFINE_list("sigma_rel", list(WIDTHS), "Widths of the averages.")
    flags.DEFINE_integer("step", None, "The training step at which they are taken; default: that of the last snapshot.")
    flags.DEFINE_integer(
        "num_samples", None, "Samples for each; default: as many as at the end of the training.", lower_bound=1
    )
    define_path("outdir", None, "Where to write; default: WORKDIR/averages.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    command.start()
    f, folder = flags.FLAGS, RunDir(command.workdir())
    outdir = Path(f.outdir) if f.outdir else folder.averages
    rows = study(folder, outdir, widths(f.sigma_rel), f.step, f.num_samples)
    best = {name: (min if NUMBERS[name] == "lower" else max)(rows, key=lambda row: row[name]) for name in shown(rows)}
    words = "; ".join(f"{name} {row[name]:.3g} at {row['sigma_rel']:g}" for name, row in best.items())
    print(f"best: {words or 'nothing was measured'}.\nWritten to {outdir}: horizons.json, horizons.png")


def widths(given: Sequence[str]) -> list[float]:
    """The numbers of --sigma_rel.

    Raises:
      ValueError: one is no number, or out of range.
    """
    try:
        numbers = [float(each) for each in given]
    except ValueError:
        raise ValueError(f"--sigma_rel={','.join(given)} must list numbers, as in 0.05,0.1") from None
    for number in numbers:
        averages.gamma_of(number)
    return numbers


def study(
    folder: RunDir, outdir: Path, sigma_rels: Sequence[float], step: int | None = None, count: int | None = None
) -> list[dict[str, Any]]:
    """Rows of horizons.json, one for each width, in their order; measures those that it lacks.

    Raises:
      ValueError: the run stored no averages, or the file is of another run, step, number of samples or seed.
    """
    config, spec = folder.stored()
    steps, _ = average.stored(folder)
    sample = dataclasses.replace(config.sample, count=count or config.sample.count)
    config = dataclasses.replace(average.without_power(config), sample=sample)
    run = parts.resolve(config, spec)
    own = digest([folder.stored()[0]], snapshots.read(folder.averages, max(steps), 0))
    about = {"step": step or max(steps), "count": config.sample.count, "sample": dataclasses.asdict(config.sample)}
    about |= {"digest": own, "workdir": str(folder.path.resolve())}
    files.check_writable(outdir)
    path = outdir / "horizons.json"
    rows = _read(path, about)
    make = sampling.sample_fn(run, finite=True)
    labels = inputs.equal_shares(config.sample.count, spec.num_classes)
    features = report.features_for(config, spec.shape)
    for sigma_rel in sigma_rels:
        if sigma_rel in rows:
            continue
        found = average.reconstruct(folder, sigma_rel, step)
        params = average.like_network(run, found.params)
        images, seconds, finite = report.collect(make, params, labels, config.sample.batch_size)
        values = report.quality(
            config, images, labels if spec.num_classes else None, features, report.patches(config, spec)
        )
        rows[sigma_rel] = {
            "sigma_rel": sigma_rel,
            "fit_error": found.error,
            "sample_seconds": seconds,
            "non_finite": int((~finite).sum()),
            **values,
        }
        text = json.dumps({**about, "rows": [rows[each] for each in sorted(rows)]}, indent=2) + "\n"
        files.atomic_write(path, lambda file, text=text: file.write(text.encode()))
        print(
            f"sigma_rel {sigma_rel:g}: " + ", ".join(f"{n} {rows[sigma_rel][n]:.3g}" for n in shown([rows[sigma_rel]]))
        )
    ordered = [rows[each] for each in sorted(rows)]
    figure = plot(ordered)
    files.atomic_write(outdir / "horizons.png", lambda file: figure.savefig(file, format="png"))
    return ordered


def shown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the numbers that all rows have."""
    return [name for name in NUMBERS if rows and all(row.get(name) is not None for row in rows)]


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Each number over the width of the average."""
    names = shown(rows)
    figure = Figure(figsize=(3.2 * max(len(names), 1), 2.9), layout="constrained", dpi=110)
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        axes.plot([row["sigma_rel"] for row in rows], [row[name] for row in rows], marker="o", markersize=3)
        axes.set(
            title=f"{name.replace('_', ' ')} ({NUMBERS[name]} is better)", xlabel="width of the average, sigma_rel"
        )
        axes.title.set_fontsize("medium")
        axes.grid(alpha=0.3)
    return figure


def _read(path: Path, about: dict[str, Any]) -> dict[float, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        rows = {row["sigma_rel"]: row for row in stored.pop("rows")}
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e}): delete it, and all widths are measured again") from e
    if stored.get("digest") != about["digest"]:
        raise ValueError(
            f"{path} is of the run {stored.get('workdir', 'in an unknown folder')}, another one than that in "
            f"{about['workdir']}: pass another --outdir"
        )
    if stored != json.loads(json.dumps(about)) | {"workdir": stored.get("workdir")}:  # which may have been moved
        raise ValueError(
            f"{path} is of step {stored.get('step')} with {stored.get('count')} samples, or of other settings of the "
            f"sampler; asked for are step {about['step']} and {about['count']} samples: pass another --outdir"
        )
    return rows


if __name__ == "__main__":
    command.run(main, define_flags)
