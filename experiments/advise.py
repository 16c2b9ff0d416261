"""How large patches can be for a data set: what of its images can be known at each noise level, and how fine that is.

    python -m experiments.advise --data=mnist5k
    python -m experiments.advise --data=folder:PATH --size=32 --share=0.02 --experts=3
    python -m experiments.advise --workdir=runs/mnist           beside a trained network, on the data of its run

Patch Diffusion's argument (Luhman & Luhman 2022, 2207.04316): the best prediction of x0 is blurry at most noise levels,
so a grid with one position for each patch is fine enough there. Held-out images are noised to several SNRs, and the
exact posterior mean over the training images (`diffusion.methods.ideal`) is compared with them, frequency by frequency
(`diffusion.methods.spectrum`). At little noise that mean is one training image, since held-out images are not among
them; what can be recovered is therefore measured as what the best combination of the mean, the noised image itself and,
with --workdir, the network's prediction explains of the image, which is a lower bound. "finite" numbers are those of
noised training images instead, for which the mean is exact.

Patches lose what can be recovered and is finer than their grid, as a share of the energy of the image without the mean
image (--of=recoverable: of what can be recovered, which stays the same when little can be known). A network on patches
still predicts every pixel, in its channels, so this is a bound for the grid alone.

Writes advice.json and advice.png into --outdir, by default a new folder advice/NUMBER, of a run WORKDIR/advice/NUMBER,
and prints a table, patch sizes, and the commands of trainings with them: of a U-Net on patches, whose path it then is,
or of the network of --workdir. A network works on 1 / P^2 of the positions, which is what is minimised over the
thresholds between experts.
"""

import dataclasses
import importlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from diffusion import predict, process
from diffusion.data import Source
from diffusion.data.values import is_plain
from diffusion.io import files
from diffusion.methods import ideal, spectrum
from experiments import advise_report, command, data, inputs, sampling
from experiments.checks import without_guidance
from experiments.config import Config, Data, fields, network_name
from experiments.configs import patch_unet_mnist
from experiments.parts import resolve
from experiments.paths import define_path
from experiments.progress import Bar
from experiments.run_dir import Trained, trained

PATHS = {"linear": process.Linear, "cosine": process.Cosine}
OF = ("image", "recoverable")


class Options(NamedTuple):
    """What is measured, and what is advised from it."""

    snr: tuple[float, ...] = (256, 64, 16, 4, 1, 1 / 4, 1 / 16, 1 / 64, 1 / 256)
    count: int = 500  # held-out images
    most: int = 50_000  # training images
    share: float = 0.05
    of: str = "image"
    experts: int = 2
    labels: bool = True
    batch_size: int = 100
    block_size: int = 1024


class Network(NamedTuple):
    """A trained network: x0_hat [B, *S, C] from (xt, t [B], y [B]), its path, and its range of values."""

    x0_hat: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    path: process.Path
    value_range: tuple[float, float]
    conditional: bool


def define_flags(argv: Sequence[str]) -> None:
    """Flags of this command; defined when it runs, since other commands have some of the same names."""
    del argv
    flags.declare_key_flag("workdir")
    defaults = Options()
    flags.DEFINE_string("data", None, "A data set of TFDS, folder:PATH, array:PATH or datasets:PATH.")
    flags.DEFINE_string("split", "test", "The held-out images, which are noised.")
    data.define_reading_flags()
    flags.adopt_module_key_flags(data)
    flags.DEFINE_list(
        "snr", [f"{s:g}" for s in defaults.snr], "Levels of noise, (alpha / sigma)^2 with data in [-1, 1]."
    )
    flags.DEFINE_integer("count", defaults.count, "How many held-out images, at most.", lower_bound=2)
    flags.DEFINE_integer("most", defaults.most, "How many training images, at most, at random.", lower_bound=2)
    flags.DEFINE_float("share", defaults.share, "The share that patches may lose.", 0, 1)
    flags.DEFINE_enum("of", defaults.of, OF, "A share of what: the image's energy, or what can be recovered of it.")
    flags.DEFINE_integer("experts", defaults.experts, "Networks with a range of SNR each.", lower_bound=1)
    flags.DEFINE_bool("labels", defaults.labels, "The class of an image is known, as to a conditional network.")
    flags.DEFINE_enum("path", None, list(PATHS), "Whose times are uniform; default: that of the training it advises.")
    flags.DEFINE_integer("batch_size", defaults.batch_size, "Noised images at a time.", lower_bound=1)
    define_path("outdir", None, "Where to write; default: a new folder advice/NUMBER, of a run WORKDIR/advice/NUMBER.")
    flags.DEFINE_bool("overwrite", False, "Allow writing over earlier advice in --outdir.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    command.start()
    f = flags.FLAGS
    options = Options(**{name: f[name].value for name in Options._fields if name in f and name != "snr"})
    options = options._replace(snr=levels(f.snr))
    if command.has_workdir():
        command.refuse_given(("data", *data.READING, "path", "labels"), "beside --workdir, whose own are taken")
        workdir = command.workdirs()[0]
        run = trained(command.workdirs())
        network, config = of_run(run), run.config
        train, held_out = (inputs.source(run.config, split) for split in ("train", f.split))
        options, path, parent = options._replace(labels=network.conditional), network.path, workdir / "advice"
    elif f.data:
        network, workdir, parent = None, None, Path("advice")
        train, held_out = (data.opened(f.data, split, "--data") for split in ("train", f.split))
        config = to_train(train, Data(name=f.data, held_out=f.split, labels=f.labels, **data.reading()))
        path = PATHS[f.path]() if f.path else resolve(config, inputs.data_spec(config, train)).path
    else:
        raise ValueError("--data is missing: pass a data set, --data=mnist5k or --data=folder:PATH, or --workdir")
    outdir = command.output_folder(parent, "advice.json", f.outdir, f.overwrite)
    found, shown = measure(train, held_out, path, options, network)
    found = {
        "data": config.data.name,
        "path": f.path,
        **found,
        "training": advised(config),
        "workdir": workdir and str(workdir),
    }
    text = json.dumps(found, indent=2) + "\n"
    files.atomic_write(outdir / "advice.json", lambda file: file.write(text.encode()))
    figure = advise_report.figure(found, shown)
    files.atomic_write(outdir / "advice.png", lambda file: figure.savefig(file, format="png"))
    print(f"{advise_report.text(found)}\n\nWritten to {outdir}: advice.json, advice.png")


def to_train(images: Source, of_data: Data) -> Config:
    """The config of a U-Net on patches for these images."""
    config = patch_unet_mnist.get_config()
    config.data = of_data
    if not is_plain(str(images.dtype), images.value_range):  # the variational term counts the levels of uint8
        config.process.vlb_weight, config.process.variance = 0.0, "fixed_small"
    return config


def advised(config: Config) -> dict[str, list[str]]:
    """The arguments of a training with this config but for its patches, which do not overlap, and its thresholds: of
    "one" network, and of each of the "experts", which can have even times alone.
    """
    process = dataclasses.replace(config.process, snr_splits=(), split=None)
    even = {} if process.times == "grid" else {"times": "uniform", "times_mean": 0.0, "times_std": 1.0}
    kinds = {"one": process, "experts": dataclasses.replace(process, **even)}
    model = dataclasses.replace(config.model, **({"stride": None} if hasattr(config.model, "stride") else {}))
    found = {kind: arguments(dataclasses.replace(config, process=p, model=model)) for kind, p in kinds.items()}
    return {kind: [a for a in argv if not a.startswith("--config.model.patch_size=")] for kind, argv in found.items()}


def arguments(config: Config) -> list[str]:
    """The arguments of `experiments.train` that give this config: a shipped file and the fields that differ."""
    stem = {"vit": "mnist", "unet": "patch_unet_mnist", "blog": "blog"}[network_name(config.model)]
    base = importlib.import_module(f"experiments.configs.{stem}").get_config()
    found = [f"--config=experiments/configs/{stem}.py"]
    for name in fields(config):
        section, _, field = name.rpartition(".")
        value, own = (getattr(getattr(c, section) if section else c, field) for c in (config, base))
        if value != own:
            flag = f"--{'no' if value is False else ''}config.{name}"
            found.append(flag if isinstance(value, bool) else f"{flag}={value}")
    return found


def levels(given: Sequence[str]) -> tuple[float, ...]:
    """The SNRs of --snr, falling.

    Raises:
      ValueError: they are not two or more positive numbers.
    """
    try:
        snr = tuple(sorted({float(each) for each in given}, reverse=True))
    except ValueError:
        snr = ()
    if len(snr) < 2 or not all(0 < s < math.inf for s in snr):
        raise ValueError(f"--snr={','.join(given)} must be two or more positive numbers, as in --snr=16,4,1,0.25")
    return snr


def of_run(run: Trained) -> Network:
    """The network of a run, or its experts, without guidance and thresholds.

    Raises:
      ValueError: it is one of super-resolution.
    """
    plain = dataclasses.replace(without_guidance(run.config.sample), clip=False, threshold=None, floor=0.0)
    run = run._replace(config=dataclasses.replace(run.config, sample=plain))
    parts, members = run.parts()
    if parts.superres:
        raise ValueError("--workdir is a run of super-resolution, whose network needs another image; pass another one")
    conditional = parts.spec.num_classes > 0

    @jax.jit
    def x0_hat(params: Any, xt: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        denoise = sampling.denoiser(parts, params, members=members)
        return predict.predictor(denoise, parts.path, parts.prediction, y if conditional else None)(xt, t).x0

    return Network(lambda xt, t, y: x0_hat(run.params, xt, t, y), parts.path, parts.value_range, conditional)


def measure(
    train: Source, held_out: Source, path: process.Path, options: Options, network: Network | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What can be recovered at each SNR, and the advice, ready for JSON; and images [L, *S, C] to be shown.

    Raises:
      ValueError: no patch size divides the images, the splits differ in shape, or the path does not reach an SNR.
    """
    *size, _ = shape = train.images.shape[1:]
    if tuple(held_out.images.shape[1:]) != tuple(shape):
        raise ValueError(f"training images have the shape {tuple(shape)}, held-out ones {held_out.images.shape[1:]}")
    patch_sizes = [p for p in range(1, min(size) // 2 + 1) if all(s % p == 0 for s in size)]
    if len(patch_sizes) < 2:
        raise ValueError(f"no patch size divides images of {tuple(size)}: pass another --size")
    low, high = network.value_range if network else (-1.0, 1.0)
    labels = options.labels and train.num_classes > 0
    kept, noised = (_rows(source, n) for source, n in ((train, options.most), (held_out, options.count)))
    finite = kept._replace(images=kept.images[: options.count], labels=kept.labels[: options.count])
    first, last = train.value_range
    to_float = lambda x: low + (high - low) * ((x.astype(jnp.float32) - first) / (last - first))  # noqa: E731
    images, classes = jnp.asarray(kept.images), jnp.asarray(kept.labels)

    @jax.jit
    def posterior(images: jax.Array, xt: jax.Array, alpha: jax.Array, sigma: jax.Array, y: jax.Array) -> Any:
        given = {"labels": classes, "y": y} if labels else {}
        return ideal.data_posterior(images, xt, alpha, sigma, decode=to_float, block_size=options.block_size, **given)

    means = _mean_images(images, classes, posterior, noised.labels if labels else None)
    times = process.times_of_snr(path, options.snr)
    rows, shown = [], {"truth": None, "noised": [], "ideal": [], "combined": [], "network": []}
    with Bar(2 * len(options.snr), "measuring", "level") as bar:
        for snr, t, weight in zip(options.snr, times, time_shares(path, options.snr), strict=True):
            row = {"snr": snr, "times": weight}
            for name, source in (("held_out", noised), ("finite", finite)):
                own = network if name == "held_out" else None
                truth, estimates, entropy = _estimates(
                    source, path, t, to_float, posterior, images, means, own, options
                )
                row[name] = _numbers(truth, estimates, entropy, patch_sizes)
                if name == "held_out":
                    for kind, image in _shown(truth, estimates, row[name]["gains"]).items():
                        shown[kind] = image if kind == "truth" else [*shown[kind], image]
                row[name].pop("gains")
                bar.update()
            rows.append(row)
            bar.note(f"SNR {snr:g}")
    advice = {str(n): suggest(rows, patch_sizes, options, n) for n in sorted({1, options.experts})}
    found = {
        "size": list(size),
        "train": len(kept.labels),
        "held_out": len(noised.labels),
        "conditional": labels,
        "network": network is not None,
        "share": options.share,
        "of": options.of,
        "patch_sizes": patch_sizes,
        "levels": rows,
        "advice": advice,
    }
    return found, shown


def time_shares(path: process.Path, snr: Sequence[float]) -> list[float]:
    """The share of the times 0 .. 1 that is nearest to each SNR, on a logarithmic scale."""
    middles = [math.sqrt(a * b) for a, b in itertools.pairwise(snr)]
    edges = np.concatenate([[0.0], process.times_of_snr(path, middles), [1.0]])
    return np.diff(edges).tolist()


def suggest(
    rows: Sequence[dict[str, Any]], patch_sizes: Sequence[int], options: Options, experts: int
) -> dict[str, Any]:
    """Thresholds and patch sizes of at most so many experts, from the least noise on, of the least cost.

    An expert's patches are the largest that lose less than the share of the options over its levels; a level counts by
    its share of the times. The cost is the mean of 1 / P^2 over the times, and 1 for P = 1 everywhere.
    """
    weights = np.array([row["times"] for row in rows])
    recovered, energy = (
        weights[:, None] * np.array([row["held_out"][name] for row in rows]) for name in ("recoverable", "energy")
    )
    of = energy if options.of == "image" else recovered

    def largest(part: slice) -> tuple[int, float]:
        losses = {p: spectrum.lost(recovered[part].sum(0), p, of[part].sum(0)) for p in patch_sizes}
        p = max(p for p in patch_sizes if p == 1 or losses[p] < options.share)
        return p, losses[p]

    best = None
    for n in range(1, min(experts, len(rows)) + 1):  # fewer, if more gain nothing
        for cuts in itertools.combinations(range(1, len(rows)), n - 1):
            parts = [slice(a, b) for a, b in itertools.pairwise([0, *cuts, len(rows)])]
            chosen = [largest(part) for part in parts]
            cost = sum(weights[part].sum() / p**2 for part, (p, _) in zip(parts, chosen, strict=True))
            if best is None or cost < 0.999 * best["cost"]:
                splits = [float(f"{math.sqrt(rows[c - 1]['snr'] * rows[c]['snr']):.2g}") for c in cuts]
                best = {
                    "snr_splits": splits,
                    "patch_sizes": [p for p, _ in chosen],
                    "lost": [loss for _, loss in chosen],
                    "times": [float(weights[part].sum()) for part in parts],
                    "cost": float(cost),
                }
    return best


def _rows(source: Source, most: int) -> Source:
    """At most so many images of a source, at random, in memory."""
    chosen = np.random.default_rng(0).permutation(len(source.labels))[:most]
    return source._replace(images=np.asarray(source.images[chosen]), labels=np.asarray(source.labels[chosen]))


def _mean_images(
    images: jax.Array, classes: jax.Array, posterior: Callable[..., Any], held_out: np.ndarray | None
) -> jax.Array:
    """The mean training image of each class [classes, *S, C], or of all [1, *S, C]: E[x0 | xt] at alpha = 0.

    Raises:
      ValueError: there are no training images of a class that is held out.
    """
    n = 1
    if held_out is not None:
        if missing := sorted(set(held_out.tolist()) - set(np.asarray(classes).tolist())):
            raise ValueError(f"there are no training images of the held-out classes {missing}: pass --nolabels")
        n = int(max(classes.max(), held_out.max())) + 1
    nothing = jnp.zeros((n, *images.shape[1:]))
    return posterior(images, nothing, jnp.zeros(n), jnp.ones(n), jnp.arange(n))[0]


def _estimates(
    source: Source,
    path: process.Path,
    t: float,
    to_float: Callable[[jax.Array], jax.Array],
    posterior: Callable[..., ideal.DataPosterior],
    images: jax.Array,
    means: jax.Array,
    network: Network | None,
    options: Options,
) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """The images of a source, estimates of them from noised ones, all without the mean image, and the mean entropy."""
    n, size = len(source.labels), min(options.batch_size, len(source.labels))
    batches, entropies = [], []
    for start in range(0, n, size):
        at = np.arange(start, start + size) % n  # the last batch is filled up
        x0, y = to_float(jnp.asarray(source.images[at])), jnp.asarray(source.labels[at])
        # The noise of an image is the same at all levels.
        eps = jax.random.normal(jax.random.fold_in(jax.random.key(0), start), x0.shape)
        times = jnp.full(size, t, jnp.float32)
        xt, (alpha, sigma) = process.noise(path, x0, times, eps), path(times)
        mean, entropy = posterior(images, xt, alpha, sigma, y)
        common = means[y if len(means) > 1 else jnp.zeros_like(y)]
        found = {"truth": x0, "noised": xt / process.expand(alpha, xt), "ideal": mean}
        if network:
            found["network"] = network.x0_hat(xt, times, y)
        found = {name: np.asarray(x - common)[: n - start] for name, x in found.items()}
        batches.append(found | {"mean": np.asarray(common)[: n - start]})
        entropies.append(np.asarray(entropy)[: n - start])
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return whole.pop("truth"), whole, float(np.concatenate(entropies).mean())


def _numbers(
    truth: np.ndarray, estimates: dict[str, np.ndarray], entropy: float, patch_sizes: Sequence[int]
) -> dict[str, Any]:
    """Errors, energies by band, and what patches lose, from images and estimates without the mean image."""
    names = [name for name in estimates if name != "mean"]
    found = spectrum.moments(truth, [estimates[name] for name in names])
    energy, values = spectrum.recoverable(found), truth[0].size
    own = {name: found.gram[:, i, i] / found.count for i, name in enumerate(names)}
    without = {name: found.energy / found.count + own[name] - 2 * found.cross[:, i] / found.count
               for i, name in enumerate(names)}  # fmt: skip

    def losses(recovered: np.ndarray) -> dict[str, dict[str, float]]:
        of = {"image": found.energy / found.count, "recoverable": recovered}
        return {name: {str(p): spectrum.lost(recovered, p, of[name]) for p in patch_sizes} for name in OF}

    numbers = {
        "entropy": entropy,
        "error": {name: float(without[name].sum() / values) for name in names if name != "noised"}
        | {"combined": float((found.energy / found.count - energy).sum() / values)},
        "energy": (found.energy / found.count).tolist(),
        "recoverable": energy.tolist(),
        "energy_of": {name: own[name].tolist() for name in names if name != "noised"},
        "lost": losses(energy),
        "gains": (names, spectrum.gains(found)),
    }
    if "network" in names:  # what the network alone says of the same
        alone = spectrum.recoverable(spectrum.moments(truth, [estimates["network"]]))
        numbers |= {"recoverable_network": alone.tolist(), "lost_network": losses(alone)}
    return numbers


def _shown(
    truth: np.ndarray, estimates: dict[str, np.ndarray], gains: tuple[list[str], np.ndarray]
) -> dict[str, np.ndarray]:
    """One image, of median energy, and the estimates of it, [*S, C], with the mean image."""
    names, weights = gains
    energy = np.square(truth).sum(tuple(range(1, truth.ndim)))
    i = int(np.argsort(energy)[len(energy) // 2])
    chosen = {name: estimates[name][i : i + 1] for name in names}
    chosen |= {"truth": truth[i : i + 1], "combined": spectrum.combined(weights, [chosen[name] for name in names])}
    return {name: x[0] + estimates["mean"][i] for name, x in chosen.items()}


if __name__ == "__main__":
    command.run(main, define_flags)
