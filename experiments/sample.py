"""Samples from a trained run; the run's stored config says everything about the network.

    python -m experiments.sample --workdir=runs/mnist --num_samples=64 --steps=50 --guidance=2 --labels=0,1,2
    python -m experiments.sample --workdir=runs/mnist --num_samples=10 --trajectory
    python -m experiments.sample --workdir=runs/unet_split0,runs/unet_split1            with SNR experts
    python -m experiments.sample --workdir=runs/large --base_samples=runs/small/samples.npz    super-resolution
    python -m experiments.sample --workdir=runs/mnist --sampler=unipc --steps=12               another sampler
    python -m experiments.sample --workdir=runs/large --guide_workdir=runs/small --guidance=2  autoguidance
    python -m experiments.sample --workdir=runs/mine --sample_size=128,192 --window_stride=32  larger than in training
    python -m experiments.sample --workdir=runs/large --fsdp=8                       a network split over 8 devices

Writes samples.npz (arr_0 [N, *S, C] of the data's type, uint8 of images, arr_1 labels) and samples.png; with
--trajectory also a film strip and an animation from noise to sample. Sample i depends on the seed and its number i
alone, not on the batch size. If samples hold NaN or infinite values, the files are written all the same, and the exit
status is 1.
"""

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from absl import app, flags

from diffusion import data, layers, sharding
from diffusion.methods import windows
from experiments import command, figures, image_files, inputs, processes, report, sampling
from experiments.checks import reset, without_guidance
from experiments.config import Config, Sample
from experiments.parts import DataSpec, Parts
from experiments.paths import define_path
from experiments.run_dir import RunDir, Trained, noising, trained

flags.declare_key_flag("workdir")
_OUTDIR = define_path("outdir", None, "Where to write; default: a new folder WORKDIR/samples/NUMBER.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "How many samples; default 64.", lower_bound=1)
_LABELS = flags.DEFINE_list("labels", None, "Classes, by number or name, used in turn; default: all of them.")
_CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Training step to sample from; default: the newest.")
_EMA = flags.DEFINE_float("ema", None, "Which of a run's averages, by its decay; default: the first of its list.")
_BASE_SAMPLES = define_path(
    "base_samples", None, "The low-resolution images that a super-resolution run enlarges: samples.npz of another run."
)
_CONDITION_NOISE = flags.DEFINE_float(
    "condition_noise", None, "Standard deviation of noise on them; default: the run's."
)
_GUIDE_WORKDIR = define_path(
    "guide_workdir", None, "Autoguidance: a weaker run on the same data and path, from which --guidance leads away."
)
_GUIDE_EMA = flags.DEFINE_float(
    "guide_ema",
    None,
    "Autoguidance: which of the averages of the run (or of --guide_workdir), by its decay, is the weaker one.",
)
_GUIDE_CHECKPOINT = flags.DEFINE_integer(
    "guide_checkpoint", None, "Autoguidance: the training step of the weaker one; default: as the run, or the newest."
)
_SAMPLE_SIZE = flags.DEFINE_list(
    "sample_size", None, "Size H,W of samples larger than the images of the training, by overlapping windows."
)
_WINDOW_STRIDE = flags.DEFINE_integer(
    "window_stride", None, "With --sample_size: pixels between windows; default: half a window.", lower_bound=1
)
_FSDP = flags.DEFINE_integer("fsdp", 1, "Devices over which the parameters are split.", lower_bound=1)
_TRAJECTORY = flags.DEFINE_bool("trajectory", False, "Also show how the first samples emerge from noise.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Allow writing over earlier samples in --outdir.")

# The animation has so many frames at most.
_ANIMATION_FRAMES = 60
_NO_RHO = {name: getattr(Sample, name) for name in ("rho", "sigma_min", "sigma_max")}


def _define_sample_flags() -> dict[str, flags.FlagHolder]:
    """A flag for every field of `config.sample` that has an explanation; None is the run's value."""
    kinds = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool, str: flags.DEFINE_string}
    holders = {}
    for each in dataclasses.fields(Sample):
        if "help" in each.metadata:
            kind = next(k for k in (get_args(each.type) or (each.type,)) if k in kinds)
            holders[each.name] = kinds[kind](each.name, None, f"{each.metadata['help']} Default: the run's.")
    return holders


SAMPLE_FLAGS = _define_sample_flags()


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    with processes.joined():
        command.start()
        sample(mesh_of_flags(), command.workdirs())


def sample(mesh: jax.sharding.Mesh, workdirs: Sequence[Path]) -> None:
    """Makes the samples that the flags ask for, on the devices of a mesh, and writes them."""
    run = trained(workdirs, _CHECKPOINT.value, _EMA.value, on_host=True)
    weaker = weaker_run(run, workdirs)
    run = run._replace(config=overridden(run.config, run.spec, autoguided=weaker is not None))
    with flags_of_sample():
        parts, members = larger(*run.parts())
    weak = None
    if weaker is not None:
        weak, run = larger(weaker.parts()[0], ())[0], run._replace(params=(run.params, weaker.params))
    low, labels = base_samples(run.config, run.spec)
    make = sampling.sample_fn(parts, members=members, finite=True, weak=weak)
    few = [a[:1] for a in (labels, labels, low) if a is not None]
    jax.eval_shape(make, run.params, *few)
    outdir = None
    if processes.first():
        outdir = command.output_folder(workdirs[0] / "samples", "samples.npz", _OUTDIR.value, _OVERWRITE.value)
    run = run._replace(params=sharding.put(run.params, sharding.of_state(mesh, run.params)))
    print(f"making {len(labels)} samples from step {run.step} of {' and '.join(map(str, workdirs))}")
    images, seconds, finite = report.collect(make, run.params, labels, run.config.sample.batch_size, low)
    if outdir is not None:
        report.save(outdir / "samples.npz", outdir / "samples.png", images, labels, parts.spec)
    if _TRAJECTORY.value:
        trajectory(run, parts, members, labels, low, outdir, weak)
    processes.wait("finished")
    if outdir is not None:
        names = ", ".join(sorted(p.name for p in outdir.iterdir()))
        print(f"{report.minutes(seconds)}; written to {outdir}: {names}")
    if not finite.all():
        raise FloatingPointError(report.non_finite(int((~finite).sum()), len(finite)))


def mesh_of_flags() -> jax.sharding.Mesh:
    """All devices, of which --fsdp share a network."""
    try:
        return sharding.make_mesh(fsdp=_FSDP.value)
    except ValueError as e:
        raise ValueError(f"--{e}") from e


@contextlib.contextmanager
def flags_of_sample() -> Iterator[None]:
    """Fields of `config.sample` are named as the flags of this command in messages."""
    try:
        yield
    except ValueError as e:
        raise ValueError(str(e).replace("--config.sample.", "--")) from e


def weaker_run(run: Trained, workdirs: Sequence[Path]) -> Trained | None:
    """The weaker run that --guide_workdir, --guide_ema and --guide_checkpoint name; None without them. What they leave
    out is as in the run itself, if it is the same folder.

    Raises:
      ValueError: it has the same weights, other data or another path, there is no such average, or the run is one of
        experts.
    """
    holders = (_GUIDE_WORKDIR, _GUIDE_EMA, _GUIDE_CHECKPOINT)
    given = [f"--{holder.name}={holder.value}" for holder in holders if holder.value is not None]
    if not given:
        return None
    flag, folder, decay, step = " ".join(given), _GUIDE_WORKDIR.value, _GUIDE_EMA.value, _GUIDE_CHECKPOINT.value
    if run.members or run.config.condition.size:
        raise ValueError(f"{flag}: autoguidance is for one run without experts and without super-resolution")
    own = Path(folder) if folder is not None else workdirs[0]
    config, spec = RunDir(own).stored()
    decays = config.train.ema
    if decay is not None and decay not in decays:
        raise ValueError(f"--guide_ema={decay}: {own} has averages with the decays {', '.join(map(str, decays))}")
    if spec != run.spec or noising(config) != noising(run.config):
        raise ValueError(
            f"{flag} was trained on other data or on another path than {workdirs[0]}, which it cannot guide"
        )
    if (config.data.low, config.data.high) != (run.config.data.low, run.config.data.high):
        raise ValueError(f"{flag} has other values of black and white, data.low and high, than {workdirs[0]}")
    if own.resolve() == workdirs[0].resolve():
        step = _CHECKPOINT.value if step is None else step
        decay = _EMA.value if decay is None else decay
    weaker = trained([own], step, decay, on_host=True)
    if same_weights(run.params, weaker.params):
        raise ValueError(
            f"{flag} has the weights of the run itself, which guide nowhere: pass another --guide_workdir, an average "
            "--guide_ema that is wider, or an earlier --guide_checkpoint"
        )
    return weaker


def same_weights(a: Any, b: Any) -> bool:
    """Whether parameters are those of one network, scanned or not, and equal."""
    a, b = layers.unstacked(a), layers.unstacked(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def overridden(config: Config, spec: DataSpec, autoguided: bool = False) -> Config:
    """The config with the flags that were given; `autoguided` if a weaker run guides.

    Raises:
      ValueError: a flag is out of range, or belongs to another kind of run.
    """
    given = {name: holder.value for name, holder in SAMPLE_FLAGS.items() if holder.value is not None}
    if "steps" in given and "respacing" in given:
        raise ValueError(f"--steps={given['steps']} and --respacing={given['respacing']} exclude each other: pass one")
    guided = [name for name in given if name.startswith("guidance")]
    if autoguided:
        if others := [name for name in guided if name not in ("guidance", "guidance_low", "guidance_high")]:
            raise ValueError(
                f"--{others[0]}={given[others[0]]} is of guidance by labels, and a weaker run guides: leave it out"
            )
        if given.get("guidance", 1) == 1:
            said = "--guidance=1.0 is no guidance" if "guidance" in given else "--guidance is missing"
            raise ValueError(f"{said}: pass how far to go from the weaker run, such as --guidance=2")
        # Scale and interval of the run are those of guidance by labels.
        everywhere = {name: getattr(Sample, name) for name in ("guidance_low", "guidance_high", "guidance_open")}
        config = dataclasses.replace(config, sample=dataclasses.replace(without_guidance(config.sample), **everywhere))
    elif guided and not spec.num_classes:
        raise ValueError(f"--{guided[0]}={given[guided[0]]} needs a run that was trained with labels; this one was not")
    # A flag replaces the fields of the run that exclude it.
    implied: dict[str, Any] = {}
    if "steps" in given:
        implied |= {"respacing": None} | ({"last": None} if given["steps"] == 1 else {})
    if "respacing" in given:
        implied |= {"shift": 1.0, "last": None, "steps": Sample.steps} | _NO_RHO
    if "rho" in given:
        implied |= {"shift": 1.0, "last": None, "respacing": None}
    elif {"shift", "last"} & set(given):
        implied |= _NO_RHO
    if "clip" in given:
        implied |= {"threshold": None}
    if "threshold" in given:
        implied |= {"clip": False}
    chosen = {name: given[name] for name in ("sampler", "guidance_kind") if name in given}
    kept = reset(config.sample, **chosen) if chosen else config.sample
    config = dataclasses.replace(config, sample=dataclasses.replace(kept, **(implied | given)))
    if _CONDITION_NOISE.value is None:
        return config
    if not config.condition.size:
        raise ValueError(f"--condition_noise={_CONDITION_NOISE.value} belongs to a super-resolution run; this is none")
    noise = dataclasses.replace(config.condition, sample_noise=_CONDITION_NOISE.value)
    return dataclasses.replace(config, condition=noise)


def larger(parts: Parts, members: Sequence[Parts]) -> tuple[Parts, Sequence[Parts]]:
    """The parts of the run and of its experts, for samples of --sample_size, if it is given.

    Raises:
      ValueError: windows do not tile this size, or the run is one of super-resolution.
    """
    given, stride, size = _SAMPLE_SIZE.value, _WINDOW_STRIDE.value, parts.spec.shape[:-1]
    if given is None:
        if stride is not None:
            raise ValueError(f"--window_stride={stride} needs --sample_size=H,W, the size of samples")
        return parts, members
    flag = f"--sample_size={','.join(given)}"
    if parts.superres:
        raise ValueError(f"{flag}: a super-resolution run enlarges images to the size of its own")
    whole = tuple(int(n) for n in given if n.strip().isdecimal())
    if len(whole) != len(given) or len(whole) != len(size):
        raise ValueError(f"{flag} must be {len(size)} numbers of pixels, as in {','.join(str(2 * n) for n in size)}")
    strides = tuple(stride or max(n // 2, 1) for n in size)
    for n, p, s in zip(whole, size, strides, strict=True):
        if s > p:
            raise ValueError(
                f"--window_stride={s} leaves pixels between windows of {p}: pass at most {p}, better {p // 2}"
            )
        if n < p or (n - p) % s:
            least = p + max(n - p, 0) // s * s
            raise ValueError(
                f"{flag}: windows of {p} pixels every {s} do not tile {n}; {least} and {least + s} they do, or pass "
                "another --window_stride"
            )

    def cut(each: Parts) -> Parts:
        model, spec = each.image_model, each.spec._replace(shape=(*whole, each.spec.shape[-1]))

        def apply(params: Any, xt: jax.Array, t: jax.Array, y: Any = None, *, key: jax.Array | None = None) -> Any:
            return windows.windows(partial(model.apply, params, key=key), size, strides)(xt, t, y)

        return each._replace(image_model=model._replace(apply=apply), spec=spec)

    return cut(parts), tuple(map(cut, members))


def base_samples(config: Config, spec: DataSpec) -> tuple[np.ndarray | None, np.ndarray]:
    """The low-resolution images of a super-resolution run, or None, and labels [N], as the flags say.

    Raises:
      ValueError: low-resolution images are missing, not used, or of another size; labels are wrong.
    """
    size, path, count = config.condition.size, _BASE_SAMPLES.value, _NUM_SAMPLES.value
    if not size:
        if path:
            raise ValueError(f"--base_samples={path}: this is not a super-resolution run")
        return None, parse_labels(_LABELS.value, count or 64, spec.class_names)
    if not path:
        raise ValueError(
            f"this run enlarges images of {size[0]}x{size[1]}: pass some, --base_samples=runs/NAME/samples.npz"
        )
    low, labels = image_files.read_npz(Path(path))
    if not len(low) or (labels is not None and len(labels) != len(low)):
        found = "no" if labels is None else len(labels)
        raise ValueError(f"--base_samples={path} holds {len(low)} images and {found} labels")
    if low.dtype != spec.dtype or low.shape[1:] != (*size, spec.shape[-1]):
        raise ValueError(
            f"--base_samples={path} holds {low.dtype} {low.shape}, but this run enlarges "
            f"{spec.dtype} {('N', *size, spec.shape[-1])}"
        )
    low = low[:count]
    if count is not None and len(low) < count:
        raise ValueError(f"--num_samples={count}: {path} holds only {len(low)} images")
    if _LABELS.value is None and labels is not None and spec.num_classes:
        if labels.min() < 0 or labels.max() >= spec.num_classes:
            raise ValueError(f"{path} has labels outside 0..{spec.num_classes - 1}, the classes of this run")
        return low, labels[: len(low)].astype(np.int32)
    return low, parse_labels(_LABELS.value, len(low), spec.class_names)


def parse_labels(given: Sequence[str] | None, count: int, class_names: Sequence[str]) -> np.ndarray:
    """Labels [count]: those given, in turn, or all classes in turn.

    Raises:
      ValueError: a label is not a class of this run, or the run has none.
    """
    if given is None:
        return inputs.equal_shares(count, len(class_names))
    if not class_names:
        raise ValueError(f"--labels={','.join(given)}: this run was trained without labels")
    # A name beats a number: of the classes 1, 2 and 10, --labels=2 is the second one.
    numbers = {str(i): i for i in range(len(class_names))} | {data.nfc(name): i for i, name in enumerate(class_names)}
    labels = [data.nfc(label.strip()) for label in given]
    wrong = [label for label in labels if label not in numbers]
    if wrong or not given:
        near = difflib.get_close_matches(wrong[0], class_names, 1) if wrong else []
        raise ValueError(
            f"--labels: {wrong} are not among the classes 0..{len(class_names) - 1} of this run"
            f"{f', of which {near[0]} is near' if near else ''}: {data.listed(class_names, 100)}"
        )
    return np.resize([numbers[label] for label in labels], count)


def trajectory(
    run: Trained,
    parts: Parts,
    members: Sequence[Parts],
    labels: np.ndarray,
    low: np.ndarray | None,
    outdir: Path | None,
    weak: Parts | None = None,
) -> None:
    """Writes trajectory.png, a row per sample, and trajectory.gif; without a folder it only takes part."""
    frames = figures.film(parts, run.params, labels, low, members, keep=_ANIMATION_FRAMES, weak=weak)
    if outdir is None:
        return
    image_files.save(outdir / "trajectory.png", figures.film_strip(frames))
    animation = [image_files.grid(frame, min(frames.shape[1], 5)) for frame in frames]
    image_files.save_animation(outdir / "trajectory.gif", animation)


if __name__ == "__main__":
    command.run(main)
