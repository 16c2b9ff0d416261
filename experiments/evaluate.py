"""Measures images against real ones.

    python -m experiments.evaluate --workdir=runs/mnist
    python -m experiments.evaluate --samples=samples.npz --json

Reads arr_0 uint8 [N, H, W, C] and, where there is one, arr_1 [N], the labels that the samples should have: the layout
of `experiments.sample` and of guided-diffusion. Without --workdir they are compared with digits. Images that are not
digits are compared in the features of EfficientNet-Lite0, or with --inception in those of FID. The numbers are
explained in `diffusion.metrics`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from diffusion.metrics.features import digits, inception
from experiments import command, image_files, report
from experiments.config import Config
from experiments.run_dir import RunDir

flags.declare_key_flag("workdir")
_SAMPLES = flags.DEFINE_string("samples", None, "File of images; default: samples.npz of --workdir.")
_INCEPTION = flags.DEFINE_string(
    "inception",
    None,
    "File with the published weights of Inception-v3, pt_inception-2015-12-05-6726825d.pth: gives FID.",
)
_JSON = flags.DEFINE_bool("json", False, "Print the numbers as JSON.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    command.start()
    config, path, labelled, shape = Config(), Path(_SAMPLES.value or ""), True, (28, 28, 1)
    if not _SAMPLES.value:
        folder = RunDir(command.workdir())
        config, spec = folder.stored()
        path, labelled, shape = folder.samples, bool(spec.num_classes), spec.shape
    features = report.fid_features(_INCEPTION.value) if _INCEPTION.value else report.features_for(config, shape)
    images, labels = image_files.read_npz(path)
    try:
        values = report.quality(config, images, labels if labelled else None, features)
    except (TypeError, ValueError) as e:
        raise type(e)(f"{path}: {e}") from e
    print(json.dumps({"samples": str(path), **values}, indent=2) if _JSON.value else table(path, values))


def table(path: Path, values: dict[str, float]) -> str:
    """The numbers, a line each, with what to compare them to."""
    real = "real digits" if values.get("features", digits.NAME) == digits.NAME else "real images"
    distance = "FID" if values.get("features") == inception.NAME else "feature distance"
    rows = [
        (distance, f"{values['distance']:.2f}", "Frechet; lower is better"),
        (f"  of {real}", f"{values['reference']:.2f}", f"the reference: as many {real} in their place"),
        ("  ratio", f"{values['ratio']:.2f}", "1: as good as real"),
        ("kernel distance", f"{values['kernel_distance']:.4f}", f"lower is better; {real} fall below 0"),
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
    title = f"{values['measured']:,} images of {path}, against {real}, on {values.get('features', digits.NAME)}"
    return "\n".join([title, "", *lines])


if __name__ == "__main__":
    command.run(main)
