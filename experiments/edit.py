"""Edits images with a trained run; the pictures show what went in, and what came out.

    python -m experiments.edit --workdir=runs/mnist --init_images=runs/mnist/samples.npz --strength=0.6
    python -m experiments.edit --workdir=runs/mnist --init_images=digits/ --labels=3,7 --mask=mask.png
    python -m experiments.edit --workdir=runs/mnist --init_images=digit.png --labels=3 --measure=downscale:4
    python -m experiments.edit --workdir=runs/mnist --init_images=digit.png --labels=3 --invert

One of four (`diffusion.methods.edit`). --strength noises images to that share of the time and samples from there
(SDEdit): a small one keeps most of the image. --mask makes anew what is black in it (RePaint), pixels under white stay
exactly as they are. --measure takes from each image only what is measured of it, and samples images that would be
measured alike (posterior sampling): downscale:FACTOR, blur:PIXELS, or mask with --mask. --invert computes the noise of
which images are the samples, and the samples of it, whose difference from the images is the error of the inversion.

--init_images is an image, a folder of images, or a file like samples.npz, of the size and channels of the run. A run
with labels needs those of the images, in turn (--labels), unless the file has them. With --num_samples above their
number images are edited several times, each time with other noise. The flags of `experiments.sample` for the sampler
apply. Writes samples.npz, edit.png, whose rows are the stages of the edit, and edit.json, the settings and numbers,
into --outdir, by default a new folder WORKDIR/edits/NUMBER.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from diffusion.data import images as decoding
from diffusion.io import files
from diffusion.methods.edit import check_mask
from experiments import command, display, edits, image_files, report, sample, sampling
from experiments.checks import reset
from experiments.config import Config
from experiments.parts import DataSpec, Parts, to_data
from experiments.paths import define_path
from experiments.progress import Bar
from experiments.run_dir import Trained, trained

# Images in a row of edit.png, and rows of them.
_COLUMNS, _BLOCKS = 16, 4
# The options of each edit, and the samplers that --invert can retrace.
_OPTIONS = {
    "strength": (),
    "mask": ("resamples", "jump"),
    "measure": ("measurement_noise", "dps_scale"),
    "invert": ("first",),
}
_WITHOUT_NOISE = ("ddim", "heun", "dpmpp_2m", "euler", "unipc", "adams_bashforth", "edm")
# Flags of `experiments.sample` that no edit uses.
_OF_SAMPLE_ALONE = (
    "guide_workdir",
    "guide_ema",
    "guide_checkpoint",
    "sample_size",
    "window_stride",
    "trajectory",
    "base_samples",
    "condition_noise",
)


def define_flags(argv: Sequence[str]) -> None:
    """Flags of this command beside those of `experiments.sample`."""
    del argv
    for name in ("workdir", "outdir", "num_samples", "labels", "checkpoint", "ema", "overwrite", *sample.SAMPLE_FLAGS):
        flags.declare_key_flag(name)
    define_path("init_images", None, "Image, folder of images, or file like samples.npz.")
    flags.DEFINE_float("strength", None, "SDEdit: from which share of the time to sample, 0 to 1.")
    define_path("mask", None, "Image of the run's size, white where pixels are known, black where they are made anew.")
    flags.DEFINE_integer("resamples", 10, "With --mask: how often each stretch of steps is made.", lower_bound=1)
    flags.DEFINE_integer("jump", 10, "With --mask: steps of such a stretch.", lower_bound=1)
    flags.DEFINE_string("measure", None, "What is measured: downscale:FACTOR, blur:PIXELS, or mask.")
    flags.DEFINE_float("measurement_noise", 0.05, "With --measure: standard deviation of noise on it, white being 1.")
    flags.DEFINE_float("dps_scale", None, "With --measure: step of the published DPS; default: the variance of data.")
    flags.DEFINE_bool("invert", False, "Noise of which the images are samples, and back.")
    flags.DEFINE_float("first", 0.05, "With --invert: the time from which on noise is computed, a little above 0.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    command.start()
    f, workdirs = flags.FLAGS, command.workdirs()
    kind = chosen_kind()
    run = trained(workdirs, f.checkpoint, f.ema)
    config = sample.overridden(run.config, run.spec)
    run = run._replace(config=with_sampler(config))
    with sample.flags_of_sample():
        parts, members = run.parts()
    images, labels = given_images(run.config, run.spec)
    chosen = chosen_edit(kind, parts, run.config)
    outdir = command.output_folder(workdirs[0] / "edits", "samples.npz", f.outdir, f.overwrite)
    values = edit_images(run, parts, members, chosen, images, labels, outdir, settings(kind, run, workdirs))
    print("\n".join(f"{name.replace('_', ' ')}: {value:.4g}" for name, value in values.items()))
    print(f"rows of edit.png: {', '.join(chosen.names)}. Written to {outdir}: samples.npz, edit.png, edit.json")


def with_sampler(config: Config) -> Config:
    """The config with a sampler that has no noise, if --invert needs one and the run has another.

    Raises:
      ValueError: the flags ask for one with noise, or the run has no other.
    """
    f, c = flags.FLAGS, config.sample
    if not f.invert or (c.sampler in _WITHOUT_NOISE and not c.eta and not c.churn):
        return config
    for name in ("eta", "churn", "sampler"):
        if f[name].value:
            raise ValueError(
                f"--{name}={f[name].value} samples with noise, or by steps without a way back, and --invert needs the "
                "way back: pass --sampler=heun without it"
            )
    if config.objective.kind == "consistency":
        raise ValueError(
            "--invert needs a sampler without noise, and consistency runs have none: pass another --workdir"
        )
    sampler = "ddim" if config.objective.kind == "progressive" else "heun"
    return dataclasses.replace(config, sample=reset(c, sampler=sampler, eta=0.0, churn=0.0))


def chosen_kind() -> str:
    """Which edit the flags ask for: strength, mask, measure or invert.

    Raises:
      ValueError: it is none or several, or there is a flag that has no effect on it.
    """
    f = flags.FLAGS
    asked = {"strength": f.strength is not None, "measure": f.measure is not None, "invert": f.invert}
    asked["mask"] = f.mask is not None and f.measure != "mask"
    given = [name for name, value in asked.items() if value]
    if len(given) != 1:
        words = " and ".join(f"--{name}" for name in given) or "none"
        raise ValueError(f"pass one of --strength, --mask, --measure and --invert, not {words}")
    for kind, options in _OPTIONS.items():
        if kind != given[0]:
            command.refuse_given(options, f"without --{kind}")
    if f.invert:
        command.refuse_given(("seed", "shift", "last"), "with --invert, whose steps are even and without noise")
    command.refuse_given(_OF_SAMPLE_ALONE, "in experiments.edit")
    return given[0]


def chosen_edit(kind: str, parts: Parts, config: Config) -> edits.Edit:
    """The edit that the flags ask for, of the kind of `chosen_kind`.

    Raises:
      ValueError: a flag does not fit the run.
    """
    f = flags.FLAGS
    if parts.superres:
        raise ValueError("this run enlarges images, and editing needs one that makes them: pass another --workdir")
    if kind == "strength":
        return edits.sdedit(parts, f.strength)
    if kind == "invert":
        return edits.inversion(parts, f.first)
    mask = read_mask(f.mask, parts.spec) if f.mask is not None else None
    if kind == "mask":
        return edits.inpainting(parts, mask, f.jump, f.resamples)
    if config.sample.sampler == "mean_flow":
        raise ValueError(
            f"--measure={f.measure} corrects estimates of the image at one time, and the sampler mean_flow has none: "
            "pass --sampler=ddim --steps=50"
        )
    return edits.restoration(parts, edits.operator(f.measure, mask, parts.spec), f.measurement_noise, f.dps_scale)


def settings(kind: str, run: Trained, workdirs: Sequence[Path]) -> dict[str, Any]:
    """What edit.json says of how the edit was made."""
    f = flags.FLAGS
    names = [kind, *_OPTIONS[kind], *(["mask"] if f.measure == "mask" else []), "init_images"]
    of_sampler = dataclasses.asdict(run.config.sample)
    del of_sampler["count"]  # of the end of the training
    return {
        "edit": kind,
        **{name: f[name].value for name in names},
        "workdir": [str(workdir) for workdir in workdirs],
        "step": run.step,
        "ema": f.ema,
        "sample": of_sampler,
    }


def given_images(config: Config, spec: DataSpec) -> tuple[np.ndarray, np.ndarray | None]:
    """Images [N, *S, C] and their labels [N], N being --num_samples, or the number of images; None if nothing says
    which labels they have, and guidance=0 ignores them.

    Raises:
      FileNotFoundError, ValueError: there are no images, they do not fit the run, or labels are missing or wrong.
    """
    f = flags.FLAGS
    if not f.init_images:
        raise ValueError("--init_images is missing: pass an image, a folder of images, or a file like samples.npz")
    images, labels = read_images(Path(f.init_images), spec)
    count = f.num_samples or len(images)
    images = images[np.arange(count) % len(images)]
    if f.labels is not None or not spec.num_classes:
        return images, sample.parse_labels(f.labels, count, spec.class_names)
    if labels is None:
        if config.sample.guidance == 0:
            return images, None
        ignored = "" if config.objective.kind == "mean_flow" else ", or --guidance=0 to ignore classes"
        raise ValueError(
            f"--labels is missing: this run has {spec.num_classes} classes, and --init_images={f.init_images} does not "
            f"say which its images have; pass them in the order of the images, --labels=3,7{ignored}"
        )
    if labels.min() < 0 or labels.max() >= spec.num_classes:
        raise ValueError(f"{f.init_images} has labels outside 0..{spec.num_classes - 1}, the classes of this run")
    return images, labels[np.arange(count) % len(labels)].astype(np.int32)


def read_images(path: Path, spec: DataSpec) -> tuple[np.ndarray, np.ndarray | None]:
    """Images [N, *S, C] of a file or folder, in the order of their names, and labels [N] if it has them.

    Raises:
      FileNotFoundError, ValueError: there are none, or they are of another size, type or number of channels.
    """
    expected = f"this run has {spec.dtype} images of shape {spec.shape}"
    if path.suffix == ".npz":
        images, labels = image_files.read_npz(path)
        if images.dtype != spec.dtype or images.shape[1:] != spec.shape or not len(images):
            raise ValueError(f"--init_images={path} holds {images.dtype} {images.shape}, but {expected}")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"--init_images={path} holds {len(images)} images and {len(labels)} labels")
        return images, labels
    if not spec.plain or len(spec.shape) != 3:
        raise ValueError(f"--init_images={path} is no .npz file with the arrays arr_0, but {expected}")
    if not path.exists():
        raise FileNotFoundError(f"--init_images={path}: there is no such file or folder")
    found = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix.lower() in decoding.suffixes())
    if not found:
        raise ValueError(f"--init_images={path} holds no images: pass the folder in which they are")
    encoded = decoding.Encoded(
        f"--init_images={path}", len(found), lambda ids: [found[i].read_bytes() for i in ids], lambda i: found[i].name
    )
    for file, header in zip(found, decoding.headers(encoded), strict=True):
        if (header.height, header.width) != spec.shape[:2]:
            raise ValueError(f"{file} is {header.height}x{header.width}, but {expected}: resize it first")
        if spec.shape[2] == 1 and not header.grey:
            raise ValueError(f"{file} is a colour image, but {expected}: convert it to grey first")
    return np.asarray(decoding.decode(encoded, spec.shape[:2], "none", spec.shape[2], 1 << 40)), None


def read_mask(path: str, spec: DataSpec) -> np.ndarray:
    """The mask bool [1, *S, 1] in an image, or as arr_0 [*S] of a .npz: true where it is white.

    Raises:
      FileNotFoundError, ValueError: there is none, or it is of another size or has other values than black and white.
    """
    size = spec.shape[:-1]
    if Path(path).suffix == ".npz":
        values = image_files.read_npz(Path(path))[0]
    else:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--mask={path}: there is no such file")
        encoded = decoding.Encoded(f"--mask={path}", 1, lambda ids: [Path(path).read_bytes()], lambda i: path)
        (header,) = decoding.headers(encoded)
        values = np.asarray(decoding.decode(encoded, (header.height, header.width), "none", 1, 1 << 40))[0, ..., 0]
    if values.shape != size:
        raise ValueError(f"--mask={path} is of size {values.shape}, but the images of this run of {size}")
    most = 1 if values.dtype == bool else 255
    odd = values[(values != 0) & (values != most)]
    if odd.size:
        raise ValueError(
            f"--mask={path} has the value {odd.flat[0]}: a mask is white (255) where pixels are known and black (0) "
            "elsewhere; save it without smooth edges, as PNG"
        )
    mask = (values == most)[None, ..., None]
    check_mask(mask, (1, *spec.shape))
    if mask.all():
        raise ValueError(f"--mask={path} is white everywhere: paint black what is to be made anew")
    return mask


def edit_images(
    run: Trained,
    parts: Parts,
    members: Sequence[Parts],
    chosen: edits.Edit,
    images: np.ndarray,
    labels: np.ndarray | None,
    outdir: Path,
    about: dict[str, Any],
) -> dict[str, float]:
    """Edits images [N, *S, C] and writes samples.npz, edit.png and edit.json, which begins with `about`; returns the
    numbers in it.

    Raises:
      FloatingPointError: results are not finite; the files are written all the same.
    """
    do = edits.edit_fn(parts, chosen, members)
    given = np.zeros(len(images), np.int32) if labels is None else labels
    jax.eval_shape(do, run.params, given[:1], given[:1], images[:1])
    batches = []
    with Bar(len(images), "editing", "image") as bar:
        for batch in sampling.in_batches(do, run.params, given, run.config.sample.batch_size, images):
            batches.append(batch)
            bar.update(len(batch[-1]))
        seconds = bar.seconds()
    stages = [np.concatenate(each) for each in zip(*batches, strict=True)]
    finite = np.isfinite(stages[-1]).all(tuple(range(1, stages[-1].ndim)))
    shown = [np.asarray(to_data(parts, stage)) for stage in stages]
    image_files.save_npz(
        outdir / "samples.npz", report.of_type(shown[-1], parts.spec), labels if parts.spec.num_classes else None
    )
    image_files.save(outdir / "edit.png", picture([display.as_images(s, parts.spec.value_range) for s in shown]))
    low, high = parts.value_range
    numbers = chosen.numbers([(stage - low) / (high - low) for stage in stages]) if finite.all() else {}
    values = {"count": len(images), "seconds": seconds, **{name: float(value) for name, value in numbers.items()}}
    text = json.dumps(about | values, indent=2) + "\n"
    files.atomic_write(outdir / "edit.json", lambda file: file.write(text.encode()))
    if not finite.all():
        raise FloatingPointError(report.non_finite(int((~finite).sum()), len(finite)))
    return values


def picture(stages: Sequence[np.ndarray]) -> Any:
    """Stages [N, H, W, C] of the first images, one below the other, in blocks of `_COLUMNS` images."""
    n = min(len(stages[0]), _COLUMNS * _BLOCKS)
    columns = min(n, _COLUMNS)
    rows = []
    for start in range(0, n, columns):
        for stage in stages:
            row = stage[start : min(start + columns, n)]
            rows += [row, np.full((columns - len(row), *row.shape[1:]), 255, np.uint8)]
    return image_files.grid(np.concatenate(rows), columns)


if __name__ == "__main__":
    command.run(main, define_flags)
