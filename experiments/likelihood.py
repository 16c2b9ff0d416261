"""The likelihood of images under a trained run: bits per dimension, an upper bound, step by step.

    python -m experiments.likelihood --workdir=runs/patch_unet_mnist
    python -m experiments.likelihood --workdir=runs/unet_split0,runs/unet_split1 --num_samples=100 --respacing=100

Every step of the chain is evaluated on every image, in the order of the data set, as it is: nothing is mirrored or
moved. Writes likelihood.json, likelihood.npz (total, prior [N]; terms, x0_mse, eps_mse [T, N]; labels [N]) and
likelihood.png, the bits of each step, into --outdir. Image i's bits depend on the seed and i alone.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from diffusion import grids, vlb
from diffusion.io import files
from diffusion.sample import sample_keys
from experiments import command, inputs, sampling
from experiments.checks import without_guidance
from experiments.parts import chain_of, key, to_float
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
    run = trained(workdirs, f.checkpoint, f.ema)
    folder = command.output_folder(workdirs[0] / "likelihood", "likelihood.json", f.outdir, f.overwrite)
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
    plain = dataclasses.replace(without_guidance(run.config.sample), clip=clip, threshold=None)
    run = run._replace(config=dataclasses.replace(run.config, sample=plain))
    parts, members = run.parts()
    if parts.value_range != (-1, 1):
        raise ValueError(f"the run has images in {list(parts.value_range)}, but likelihoods need [-1, 1]")
    if not parts.spec.plain:
        raise ValueError(
            f"likelihoods count the bits of uint8 in 0 .. 255, and the run has {parts.spec.dtype} in "
            f"{parts.spec.value_range}: there are none for it"
        )
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
            prediction=parts.prediction,
            variance=parts.variance,
        )

    batches, size = [], min(batch_size, n)
    with Bar(n, "measuring", "image") as progress:
        for start in range(0, n, size):
            index = np.arange(start, start + size)
            at = index % n  # the last batch is filled up
            found = bits(run.params, index, jnp.asarray(source.images[at]), jnp.asarray(source.labels[at]))
            batches.append([np.asarray(a)[..., : n - start] for a in found])
            progress.update(min(size, n - start))
            progress.note(f"{progress.rate():.1f} images/s")
    found = vlb.Likelihood(*(np.concatenate(each, -1) for each in zip(*batches, strict=True)))
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
