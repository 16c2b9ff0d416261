"""The likelihood of images under a trained run: bits per dimension, by the variational bound or by the flow's equation.

    python -m experiments.likelihood --workdir=runs/patch_unet_mnist
    python -m experiments.likelihood --workdir=runs/unet_split0,runs/unet_split1 --num_samples=100 --respacing=100
    python -m experiments.likelihood --workdir=runs/mnist --ode --num_samples=100

For a run on a chain it is an upper bound, step by step. Every step of the chain is evaluated on every image, in the
order of the data set, as it is: nothing is mirrored or moved. Writes likelihood.json, likelihood.npz (total, prior
[N]; terms, x0_mse, eps_mse [T, N]; labels [N]) and likelihood.png, the bits of each step, into --outdir. Image i's bits
depend on the seed and i alone.

With --ode, for a run on any path, they are those of the deterministic sampler's density
(`diffusion.methods.flow_likelihood`), of images with uniform noise of the width of a level, whose mean is a bound too;
no guidance, no clipping. The number is computed a second time with half as many steps; how much it changes bounds the
error of the steps (of fourth order: about 15 times). likelihood.npz then holds total, prior, change and halved [N]. A
network must know the noise down to --first: one that predicts x0 and saw few times near 0, as that of the main job, has
errors there which its velocity divides by t, and then needs more bits than the images themselves.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from diffusion import data, grids, vlb
from diffusion.io import files
from diffusion.methods import flow_likelihood
from diffusion.sample import sample_keys
from experiments import command, inputs, sampling
from experiments.checks import without_guidance
from experiments.parts import Parts, chain_of, key, to_float
from experiments.paths import define_path
from experiments.progress import Bar
from experiments.run_dir import Trained, trained


def define_flags(argv: Sequence[str]) -> None:
    """Flags of this command; defined when it runs, since other commands have some of the same names."""
    del argv
    flags.declare_key_flag("workdir")
    flags.DEFINE_string("split_name", "test", "Split of the run's data set, such as train or test.")
    flags.DEFINE_integer("num_samples", None, "How many images, from the first one on; default: all.", lower_bound=1)
    flags.DEFINE_string("respacing", "", "Steps of the chain to take: all by default, or 250, 10,15,20, ddim25.")
    flags.DEFINE_bool("clip", True, "Clip estimates of the image to its range, as published programs do.")
    flags.DEFINE_bool("ode", False, "By the equation of the flow, for any path, instead of the bound of a chain.")
    flags.DEFINE_integer("ode_steps", 64, "With --ode: steps, of four evaluations; an even number.", lower_bound=2)
    flags.DEFINE_integer("probes", 1, "With --ode: random signs for the trace, each a derivative.", lower_bound=1)
    flags.DEFINE_float("first", 1e-3, "With --ode: the time, a little above 0, at which the flow starts.")
    flags.DEFINE_integer("batch_size", 100, "Images at a time.", lower_bound=1)
    flags.DEFINE_integer("checkpoint", None, "Training step to measure; default: the newest.")
    flags.DEFINE_float("ema", None, "Which of a run's averages, by its decay; default: the first of its list.")
    define_path("outdir", None, "Where to write; default: a new folder WORKDIR/likelihood/NUMBER.")
    flags.DEFINE_bool("overwrite", False, "Allow writing over earlier results in --outdir.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    command.start()
    workdirs, f = command.workdirs(), flags.FLAGS
    if f.ode:
        command.refuse_given(("respacing", "clip"), "with --ode")
    else:
        command.refuse_given(("ode_steps", "probes", "first"), "without --ode")
    run = trained(workdirs, f.checkpoint, f.ema)
    folder = command.output_folder(workdirs[0] / "likelihood", "likelihood.json", f.outdir, f.overwrite)
    if f.ode:
        options = {"steps": f.ode_steps, "probes": f.probes, "first": f.first}
        values = measure_flow(run, folder, split=f.split_name, count=f.num_samples, batch_size=f.batch_size, **options)
        print(
            f"{values['bits_per_dim']:.4f} bits per dimension (standard error {values['standard_error']:.4f}) over "
            f"{values['count']} images, by the flow in {values['steps']} steps; in half as many it is "
            f"{values['halved']:.4f}.\nWritten to {folder}: likelihood.json, likelihood.npz"
        )
        if values["bits_per_dim"] > 8:
            print(
                "More than the 8 bits of the values themselves: near the data the velocity of this network is not that "
                f"of a density. It may have seen few times down to --first={f.first}."
            )
        return
    options = {"clip": f.clip, "count": f.num_samples, "batch_size": f.batch_size}
    values = measure(run, folder, split=f.split_name, respacing=f.respacing, **options)
    print(
        f"{values['bits_per_dim']:.4f} bits per dimension (standard error {values['standard_error']:.4f}) over "
        f"{values['count']} images: {values['prior']:.4f} for the start of the chain, "
        f"{values['between']:.4f} for the steps between, {values['decoder']:.4f} for the last one, to the pixels.\n"
        f"Written to {folder}: likelihood.json, likelihood.npz, likelihood.png"
    )


def measure(
    run: Trained,
    folder: Path,
    *,
    split: str = "test",
    count: int | None = None,
    respacing: str = "",
    clip: bool = True,
    batch_size: int = 100,
) -> dict[str, Any]:
    """Measures `count` images of a split of the run's data set; writes the files that the module names into `folder`.

    Raises:
      ValueError: the run's path is not a chain, its images are not in [-1, 1], or the respacing is wrong.
    """
    run, parts, members = unguided(run, clip)
    chain = grids.respaced_grid(respacing, len(chain_of(parts)) - 1)
    source = inputs.source(run.config, split)
    n = min(len(source.labels), count or len(source.labels))
    files.check_writable(folder)
    image_key = key(parts.sample_seed, "likelihood")

    @jax.jit
    def bits(params: Any, index: jax.Array, images: jax.Array, y: jax.Array) -> vlb.Likelihood:
        keys = sample_keys(image_key, index)
        conditioning = sampling.conditioning(parts, keys, sampling.low_resolution(parts, images))
        return vlb.bits_per_dim(
            keys,
            sampling.denoiser(parts, params, conditioning, members),
            parts.path,
            to_float(parts, images),
            chain,
            y if parts.spec.num_classes else None,
            prediction=parts.denoiser_prediction,
            variance=parts.variance,
        )

    found = vlb.Likelihood(*in_batches(bits, run.params, source, n, batch_size))
    values = {
        "count": n,
        "split": split,
        "steps": len(chain) - 1,
        "bits_per_dim": float(found.total.mean()),
        "standard_error": float(found.total.std() / math.sqrt(max(n - 1, 1))),
        "prior": float(found.prior.mean()),
        "between": float(found.terms[:-1].sum(0).mean()),
        "decoder": float(found.terms[-1].mean()),
    }
    text = json.dumps(values, indent=2) + "\n"
    files.atomic_write(folder / "likelihood.json", lambda file: file.write(text.encode()))
    arrays = {**found._asdict(), "labels": source.labels[:n]}
    files.atomic_write(folder / "likelihood.npz", lambda file: np.savez(file, **arrays))
    files.atomic_write(folder / "likelihood.png", partial(plot, chain[:-1], found))
    return values


def measure_flow(
    run: Trained,
    folder: Path,
    *,
    split: str = "test",
    count: int | None = None,
    steps: int = 64,
    probes: int = 1,
    first: float = 1e-3,
    batch_size: int = 100,
) -> dict[str, Any]:
    """`measure` by the equation of the flow, for a run on any path; writes likelihood.json and likelihood.npz.

    Raises:
      ValueError: the run's images are not in [-1, 1], it is one of super-resolution, or an option is out of range.
    """
    run, parts, members = unguided(run, clip=False)
    if parts.superres:
        raise ValueError("the flow of a super-resolution run is not implemented; on a chain leave out --ode")
    if steps % 2:
        raise ValueError(f"--ode_steps={steps} must be even: the likelihood is computed with half as many, too")
    start = float(parts.grid[0]) if parts.prediction == "eps" else 1.0  # where eps determines x0
    if not 0 < first < start:
        raise ValueError(f"--first={first} must lie between 0 and {start}")
    times = flow_likelihood.rising_times(steps, first, start)
    source = inputs.source(run.config, split)
    n = min(len(source.labels), count or len(source.labels))
    files.check_writable(folder)
    image_key = key(parts.sample_seed, "likelihood")

    @jax.jit
    def bits(params: Any, index: jax.Array, images: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        keys = sample_keys(image_key, index)
        both = [
            flow_likelihood.bits_per_dim(
                keys,
                sampling.denoiser(parts, params, members=members),
                parts.path,
                to_float(parts, images),
                grid,
                y if parts.spec.num_classes else None,
                prediction=parts.prediction,
                probes=probes,
            )
            for grid in (times, times[::2])
        ]
        return both[0].total, both[0].prior, both[0].change, both[1].total

    total, prior, change, halved = in_batches(bits, run.params, source, n, batch_size)
    values = {
        "count": n,
        "split": split,
        "steps": steps,
        "probes": probes,
        "bits_per_dim": float(total.mean()),
        "standard_error": float(total.std() / math.sqrt(max(n - 1, 1))),
        "halved": float(halved.mean()),
        "largest_change_when_halved": float(np.abs(total - halved).max()),
    }
    text = json.dumps(values, indent=2) + "\n"
    files.atomic_write(folder / "likelihood.json", lambda file: file.write(text.encode()))
    arrays = {"total": total, "prior": prior, "change": change, "halved": halved, "labels": source.labels[:n]}
    files.atomic_write(folder / "likelihood.npz", lambda file: np.savez(file, **arrays))
    return values


def unguided(run: Trained, clip: bool) -> tuple[Trained, Parts, tuple[Parts, ...]]:
    """The run without guidance, its parts and those of experts.

    Raises:
      ValueError: there are no bits to count.
    """
    plain = dataclasses.replace(without_guidance(run.config.sample), clip=clip, threshold=None, floor=0.0)
    run = run._replace(config=dataclasses.replace(run.config, sample=plain))
    parts, members = run.parts()
    if parts.value_range != (-1, 1):
        raise ValueError(f"the run has images in {list(parts.value_range)}, but likelihoods need [-1, 1]")
    if not parts.spec.plain:
        raise ValueError(
            f"likelihoods count the bits of uint8 in 0 .. 255, and the run has {parts.spec.dtype} in "
            f"{parts.spec.value_range}: there are none for it"
        )
    return run, parts, members


def in_batches(bits: Callable[..., Any], params: Any, source: data.Source, n: int, size: int) -> list[np.ndarray]:
    """What `bits` gives for the first n images, arrays [..., n], `size` images at a time."""
    batches, size = [], min(size, n)
    with Bar(n, "measuring", "image") as progress:
        for start in range(0, n, size):
            index = np.arange(start, start + size)
            at = index % n  # the last batch is filled up
            found = bits(params, index, jnp.asarray(source.images[at]), jnp.asarray(source.labels[at]))
            batches.append([np.asarray(a)[..., : n - start] for a in found])
            progress.update(min(size, n - start))
            progress.note(f"{progress.rate():.1f} images/s")
    return [np.concatenate(each, -1) for each in zip(*batches, strict=True)]


def plot(t: np.ndarray, found: vlb.Likelihood, file: Any) -> None:
    """Plots the bits of each step, and the error of the estimates, over time."""
    from matplotlib.figure import Figure  # the object, not pyplot: it needs no screen

    figure = Figure((10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(t, np.maximum(found.terms.mean(1), 1e-12))
    left.set(title=f"{found.total.mean():.3f} bits per dimension, step by step", ylabel="bits per dimension")
    right.semilogy(t, found.x0_mse.mean(1), label="of the image")
    right.semilogy(t, found.eps_mse.mean(1), label="of the noise")
    right.set(title="Squared error of the estimates")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("time, from data to noise")
        axes.grid(alpha=0.3)
    figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    command.run(main, define_flags)
