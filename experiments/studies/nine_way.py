"""The nine-way table: predicting x0, eps or the velocity, with the error measured in each of them, by patch size.

    python -m experiments.studies.nine_way                                 72 cells: 6 hours on two CPU cores
    python -m experiments.studies.nine_way --networks=vit --patch_sizes=4,14 --seconds=60

After Li & He 2025 (2511.13720), table 2: on large patches only x0 is predicted well, whatever the loss. Here digits of
28x28 are learned by a vision transformer and by Patch Diffusion's U-Net, on patches of 2, 4, 7 and 14 pixels. All cells
train for the same time, compilation apart, at a constant rate, so that the time alone decides how many steps they take.
On a CPU that is processor time over cores, which other programs on the machine hardly change. All are on the linear
path, with the same times, batches and sampler, without guidance. Conversions of the error divide by at least 0.05, as
JiT's do (`loss.measured_in`).

ratio: Frechet distance of the samples in features of the digits' classifier, over that of as many real digits.
agreement: share of samples that the classifier reads as their label. error: mean square error of x0_hat on held-out
digits, at the SNRs of `SNR`, whatever was predicted: what the advice of `experiments.advise` is about.
"""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from diffusion import data, predict, process
from diffusion.models.unet import UNet
from diffusion.models.vit import ViT
from experiments import command, inputs, objective, parts, report, sampling
from experiments.bench.tables import table
from experiments.bench.timing import cores
from experiments.config import AnyNetwork, Config, Data, Process, Sample, Train
from experiments.studies import cells
from experiments.studies.toy import PREDICTIONS, whole

SNR = (64.0, 4.0, 0.25, 1 / 64)
NETWORKS = ("vit", "unet")


def define_flags(argv: Sequence[str]) -> None:
    """Defines the flags of all studies and those of this one."""
    cells.define_flags(argv)
    flags.DEFINE_list("networks", list(NETWORKS), "vit, unet or both.")
    flags.DEFINE_list("patch_sizes", ["2", "4", "7", "14"], "Patch sizes P.")
    flags.DEFINE_list("seeds", ["0"], "Of the network and its training.")
    flags.DEFINE_float("seconds", 240.0, "Time of each training, compilation apart.", lower_bound=0)
    flags.DEFINE_integer("samples", 500, "Samples to measure, a tenth of them of each digit.", lower_bound=20)


def main(argv: Sequence[str]) -> None:
    f = flags.FLAGS
    if unknown := sorted(set(f.networks) - set(NETWORKS)):
        raise ValueError(f"--networks={','.join(f.networks)}: {unknown} are not among {', '.join(NETWORKS)}")
    cells.perform(argv, study(f.networks, whole("patch_sizes"), whole("seeds"), f.seconds, f.samples))


def study(
    networks: Sequence[str], patch_sizes: Sequence[int], seeds: Sequence[int], seconds: float, samples: int
) -> cells.Study:
    """The study, for `cells.perform`.

    Raises:
      ValueError: a patch size does not divide 28.
    """
    if bad := [p for p in patch_sizes if p < 1 or 28 % p]:
        raise ValueError(f"--patch_sizes={bad} do not divide the 28 pixels of a digit")
    return cells.Study(
        name="nine_way",
        settings={"seconds": seconds, "samples": samples},
        cells=[
            {"network": network, "patch_size": p, "prediction": prediction, "loss_in": space, "seed": seed}
            for seed in seeds
            for network in networks
            for p in patch_sizes
            for prediction in PREDICTIONS
            for space in PREDICTIONS
        ],
        measure=lambda cell: measure(config_of(**cell, samples=samples), seconds),
        figure=figure,
        paragraph=paragraph,
    )


def config_of(network: str, patch_size: int, prediction: str, loss_in: str, seed: int, samples: int) -> Config:
    """The run of a cell."""
    networks: dict[str, AnyNetwork] = {
        "vit": ViT(patch_size=patch_size, width=128, depth=6, heads=4, norm="rms", mlp="swiglu", qk_norm=True,
                   positions=("learned", "rotary")),
        "unet": UNet(patch_size=patch_size, num_channels=48, channel_mult=(1.0, 2.0), num_res_blocks=1,
                     attention_resolutions=(), num_head_channels=48),
    }  # fmt: skip
    return Config(
        name=f"{network}{patch_size}_{prediction}_{loss_in}",
        seed=seed,
        data=Data(name="mnist5k"),
        model=networks[network],
        process=Process(path="linear", prediction=prediction, loss_in=loss_in, times="logit_normal", times_mean=0.8),
        # The time ends the training: `steps` is only what a constant rate must lie below.
        train=Train(steps=1_000_000, batch_size=64, learning_rate=1e-3, warmup=100, schedule="constant", ema=(0.995,)),
        sample=Sample(count=samples, steps=50, sampler="heun", batch_size=min(samples, 250)),
    )


def measure(config: Config, seconds: float) -> dict[str, Any]:
    """Trains for so many seconds, samples, and measures the samples and the denoising error."""
    source = inputs.source(config)
    run = parts.resolve(config, inputs.data_spec(config, source))
    params = parts.init_params(run)
    state, key = objective.init_state(run, params), parts.key(config.seed, "train")
    first = inputs.batch(config, source, 0)
    step = jax.jit(objective.make_step(run), donate_argnums=1).lower(key, state, first).compile()
    start, batches = clock(), data.prefetch(lambda i: inputs.batch(config, source, i), 0, config.train.steps)
    with contextlib.closing(batches):
        for i, batch in batches:
            state, metrics = step(key, state, batch)
            jax.block_until_ready(metrics["loss"])
            steps = i + 1
            if clock() - start >= seconds:
                break
    labels = inputs.equal_shares(config.sample.count, run.spec.num_classes)
    sample = sampling.sample_fn(run, finite=True)
    made, _, finite = report.collect(sample, state.ema[0], labels, config.sample.batch_size)
    found = report.quality(config, made, labels, report.DIGIT_FEATURES)
    return {
        "steps": steps,
        "ratio": found["ratio"],
        "agreement": found["agreement"],
        "finite": float(finite.mean()),
        "error": dict(zip(map(str, SNR), denoising_error(config, run, state.ema[0]), strict=True)),
    }


def clock() -> float:
    """Seconds: of all cores together over their number on a CPU, else as they pass."""
    if jax.default_backend() == "cpu":
        return time.process_time() / cores()
    return time.perf_counter()


def denoising_error(config: Config, run: parts.Parts, params: Any) -> list[float]:
    """The mean square error of x0_hat on the held-out digits at each of `SNR`."""
    held_out = inputs.source(config, config.data.held_out)
    x0, y = parts.to_float(run, jnp.asarray(held_out.images[:])), jnp.asarray(held_out.labels)

    @jax.jit
    def error(params: Any, t: jax.Array) -> jax.Array:
        times = jnp.full(len(x0), t)
        xt = process.noise(run.path, x0, times, jax.random.normal(jax.random.key(1), x0.shape))
        denoise = sampling.denoiser(run, params)
        return jnp.square(predict.predictor(denoise, run.path, run.prediction, y)(xt, times).x0 - x0).mean()

    return [float(error(params, t)) for t in process.times_of_snr(run.path, SNR)]


def paragraph(rows: Sequence[cells.Row]) -> str:
    """The ratios as a table, a line for each prediction and space of the error."""
    found = cells.groups(rows, "network", "patch_size", "prediction", "loss_in")
    columns = list(cells.groups(rows, "network", "patch_size"))
    lines = [
        [f"{prediction}, error in {space}", *(_summary(found[*c, prediction, space]) for c in columns)]
        for prediction, space in cells.groups(rows, "prediction", "loss_in")
    ]
    seeds = len({row["seed"] for row in rows})
    return (
        "Ratio of the Frechet distance of samples to that of real digits, and how often the classifier reads their "
        f"label{f', means of {seeds} seeds' if seeds > 1 else ''}.\n\n"
        + table("predicts", [f"{network} {p}" for network, p in columns], lines)
    )


def _summary(rows: Sequence[cells.Row]) -> str:
    return f"{_mean(rows, 'ratio'):.3g} x, {_mean(rows, 'agreement'):.0%}"


def _mean(rows: Sequence[cells.Row], name: str) -> float:
    return float(np.mean([np.inf if row[name] is None else row[name] for row in rows]))


def figure(rows: Sequence[cells.Row]) -> Figure:
    """A 3 x 3 map of ratios for each network and patch size, with one scale."""
    found = cells.groups(rows, "network", "patch_size", "prediction", "loss_in")
    networks = list(dict.fromkeys(row["network"] for row in rows))
    sizes = sorted({row["patch_size"] for row in rows})
    values = [v for row in rows if (v := row["ratio"]) is not None] or [1.0]
    scale = LogNorm(min(values), max(values) * 1.001)
    drawn = Figure(figsize=(2.3 * len(sizes) + 1.2, 2.3 * len(networks) + 0.5), layout="constrained", dpi=110)
    drawn.get_layout_engine().set(h_pad=0.12)
    axes = drawn.subplots(len(networks), len(sizes), squeeze=False)
    for i, network in enumerate(networks):
        for j, p in enumerate(sizes):
            axis = axes[i, j]
            ratios = np.array([[_mean(found[network, p, a, b], "ratio") for b in PREDICTIONS] for a in PREDICTIONS])
            shown = axis.imshow(ratios, norm=scale, cmap="viridis_r")
            for (k, m), ratio in np.ndenumerate(ratios):
                axis.text(m, k, f"{ratio:.3g}", ha="center", va="center", fontsize="small",
                          color="white" if scale(ratio) > 0.5 else "black")  # fmt: skip
            axis.set_xticks(range(3), PREDICTIONS)
            axis.set_yticks(range(3), PREDICTIONS if j == 0 else [""] * 3)
            axis.set_title(f"{network}, P = {p}", fontsize="small")
            axis.set_xlabel("error in", fontsize="small")
            if j == 0:
                axis.set_ylabel("predicts", fontsize="small")
    drawn.colorbar(shown, ax=axes, label="distance over that of real digits", shrink=0.8)
    return drawn


if __name__ == "__main__":
    command.run(main, define_flags)
