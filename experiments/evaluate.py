"""Measures images of digits against real ones.

    python -m experiments.evaluate --workdir=runs/mnist
    python -m experiments.evaluate --samples=samples.npz --json

Reads arr_0 uint8 [N, 28, 28, 1] and, where there is one, arr_1 [N], the labels that the samples should have: the layout
of `experiments.sample` and of guided-diffusion. The numbers are explained in `diffusion.metrics`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from experiments import command, image_files, report
from experiments.config import Config
from experiments.paths import define_path
from experiments.run_dir import RunDir

flags.declare_key_flag("workdir")
_SAMPLES = define_path("samples", None, "File of images; default: samples.npz of --workdir.")
_JSON = flags.DEFINE_bool("json", False, "Print the numbers as JSON.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    command.start()
    config, path, labelled = Config(), Path(_SAMPLES.value or ""), True
    if not _SAMPLES.value:
        folder = RunDir(command.workdir())
        config, spec = folder.stored()
        path, labelled = folder.samples, bool(spec.num_classes)
    features = report.features_for(config)
    if features is None:
        raise ValueError(
            f"{folder.path} was trained on {config.data.name}, and there are features for 28x28 digits only"
        )
    images, labels = image_files.read_npz(path)
    try:
        values = report.quality(config, images, labels if labelled else None, features)
    except (TypeError, ValueError) as e:
        raise type(e)(f"{path}: {e}") from e
    print(json.dumps({"samples": str(path), **values}, indent=2) if _JSON.value else table(path, values))


def table(path: Path, values: dict[str, float]) -> str:
    """The numbers, a line each, with what to compare them to."""
    rows = [
        ("feature distance", f"{values['distance']:.2f}", "Frechet; lower is better"),
        ("  of real digits", f"{values['reference']:.2f}", "the reference: as many real digits in their place"),
        ("  ratio", f"{values['ratio']:.2f}", "1: as good as real"),
        ("kernel distance", f"{values['kernel_distance']:.4f}", "lower is better; real digits fall below 0"),
        ("precision", f"{values['precision']:.1%}", "samples that look like real ones"),
        ("recall", f"{values['recall']:.1%}", "real ones that look like some sample"),
        ("nearest ratio", f"{values['nearest_ratio']:.2f}", "about 1: no copies of training images; 0: copies"),
    ]
    if "agreement" in values:
        rows.append(("agreement", f"{values['agreement']:.1%}", "a classifier reads the label as given"))
    for name, value in values.items():
        if name.startswith("agreement_"):
            rows.append((f"  of {name.removeprefix('agreement_')}", f"{value:.1%}", ""))
    lines = [f"{name:<18}{value:>10}   {meaning}".rstrip() for name, value, meaning in rows]
    if values["measured"] < report.ENOUGH:
        lines += ["", report.caution(values["measured"], "experiments.sample --num_samples")]
    return "\n".join([f"{values['measured']:,} images of {path}, against real digits", "", *lines])


if __name__ == "__main__":
    command.run(main)
