"""The toy of JiT: points of a plane in D dimensions, and networks that predict x0, eps or the velocity.

    python -m experiments.studies.toy                 minutes on two CPU cores
    python -m experiments.studies.toy --seeds=0 --dimensions=2,512 --steps=300

Points z of a spiral in 2 dimensions become x0 = Q z, with a random Q [D, 2] of orthonormal columns that the network
does not know. An MLP of 5 layers, 256 wide with ReLU, is trained on each of the predictions x0, eps and flow, with the
error measured in each of the three spaces, on the linear path. After Li & He 2025 (2511.13720), whose statement it
tests: x0 lies in a plane, which a network narrower than D can represent; eps and the velocity fill all D dimensions,
more than the 256 of the network, which cannot let them through. All nine pairs are measured at the largest D, and at
the others the three predictions with the error in the velocity.

distance: sliced distance (`diffusion.metrics.sliced`) between samples, projected to the plane, and as many new points;
the reference is that of new points from others. outside: mean square of a sample's distance from the plane, where the
points of the spiral have a mean square of about 1 in it and 0 outside.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from diffusion import grids, loss, optimize, process, sample, train
from diffusion.metrics.sliced import sliced_distance
from experiments import command
from experiments.bench.tables import table
from experiments.studies import cells

PREDICTIONS = ("x0", "eps", "flow")
WIDTH, LAYERS = 256, 5
PATH = process.Linear()
COUNT = 500  # samples of a network
SHOWN = 300  # of them are kept in the file, for the figure


def define_flags(argv: Sequence[str]) -> None:
    """Defines the flags of all studies and those of this one."""
    cells.define_flags(argv)
    flags.DEFINE_list("dimensions", ["2", "16", "512"], "D: dimensions of the space that holds the plane.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Of the plane, the network and its training.")
    flags.DEFINE_integer("steps", 1000, "Training steps of a network.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 128, "Points in a step.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    f = flags.FLAGS
    cells.perform(argv, study(whole("dimensions"), whole("seeds"), f.steps, f.batch_size))


def whole(name: str) -> list[int]:
    """The numbers of a flag that is a list of them.

    Raises:
      ValueError: they are not whole numbers.
    """
    given = flags.FLAGS[name].value
    if not given or not all(each.strip().isdecimal() for each in given):
        raise ValueError(f"--{name}={','.join(given)} must be whole numbers with commas between them")
    return [int(each) for each in given]


def study(dimensions: Sequence[int], seeds: Sequence[int], steps: int, batch_size: int) -> cells.Study:
    """The study, for `cells.perform`.

    Raises:
      ValueError: a space has fewer than 2 dimensions.
    """
    if min(dimensions) < 2:
        raise ValueError(f"--dimensions={min(dimensions)} must be at least 2, those of the plane")
    largest = max(dimensions)
    return cells.Study(
        name="toy",
        settings={"steps": steps, "batch_size": batch_size, "width": WIDTH, "layers": LAYERS},
        cells=[
            {"dimensions": d, "prediction": prediction, "loss_in": space, "seed": seed}
            for seed in seeds
            for d in sorted(dimensions)
            for prediction in PREDICTIONS
            for space in (PREDICTIONS if d == largest else ("flow",))
        ],
        measure=lambda cell: measure(**cell, steps=steps, batch_size=batch_size),
        figure=figure,
        paragraph=paragraph,
    )


def spiral(key: jax.Array, n: int) -> jax.Array:
    """Points [n, 2] of a spiral of one and a half turns, with mean square about 1 and a little noise across it."""
    key_angle, key_noise = jax.random.split(key)
    angle = 3 * jnp.pi * jnp.sqrt(jax.random.uniform(key_angle, (n, 1)))  # about equally dense along the curve
    points = angle / (3 * jnp.pi) * jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], 1)
    return 2**0.5 * points + 0.02 * jax.random.normal(key_noise, points.shape)


def plane(key: jax.Array, d: int) -> jax.Array:
    """A random matrix [d, 2] of orthonormal columns."""
    return jnp.linalg.qr(jax.random.normal(key, (d, 2)))[0]


def init(key: jax.Array, d: int) -> list[tuple[jax.Array, jax.Array]]:
    """Weights and biases of the network: He's initialisation, and a last layer of zeros."""
    sizes = [d + 3, *[WIDTH] * (LAYERS - 1), d]
    keys = jax.random.split(key, LAYERS)
    scales = [*((2 / n) ** 0.5 for n in sizes[:-2]), 0.0]
    return [
        (scale * jax.random.normal(k, (a, b)), jnp.zeros(b))
        for k, scale, a, b in zip(keys, scales, sizes[:-1], sizes[1:], strict=True)
    ]


def apply(params: list[tuple[jax.Array, jax.Array]], xt: jax.Array, t: jax.Array, y: None = None) -> jax.Array:
    """The network, xt [B, D] -> prediction [B, D]; the time enters as t, sin 2 pi t and cos 2 pi t."""
    times = jnp.stack([t, jnp.sin(2 * jnp.pi * t), jnp.cos(2 * jnp.pi * t)], -1)
    z = jnp.concatenate([xt, times], -1)
    for weight, bias in params[:-1]:
        z = jax.nn.relu(z @ weight + bias[None])
    weight, bias = params[-1]
    return z @ weight + bias[None]


def measure(
    dimensions: int, prediction: str, loss_in: str, seed: int, *, steps: int, batch_size: int
) -> dict[str, Any]:
    """Trains a network, samples from it, and compares the samples with new points."""
    names = ("plane", "init", "train", "sample", "new")
    keys = dict(zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True))
    q = plane(keys["plane"], dimensions)
    optimizer = optimize.adamw(2e-3, steps=steps, warmup=min(100, steps // 10), clip=1.0)
    weight = None if loss_in == prediction else loss.measured_in(loss_in, prediction)

    def loss_fn(params: Any, key: jax.Array, q: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_points, key_loss = jax.random.split(key)
        x0 = spiral(key_points, batch_size) @ q.T
        values, _ = loss.loss(key_loss, partial(apply, params), PATH, x0, prediction=prediction, weight=weight)
        return values.mean(), {}

    step = train.make_step(loss_fn, optimizer, ema_decay=0.99)

    @jax.jit
    def trained(key: jax.Array, state: train.State, q: jax.Array) -> train.State:
        return jax.lax.fori_loop(0, steps, lambda _, state: step(key, state, q)[0], state)

    @jax.jit
    def samples(params: Any, key: jax.Array) -> jax.Array:
        each = sample.sample_keys(key, jnp.arange(COUNT))
        # Where alpha = 0 a prediction of eps does not determine x0.
        grid = grids.uniform_grid(25, 0.999 if prediction == "eps" else 1.0)
        x1 = sample.initial_noise(each, (dimensions,))
        sampler = sample.heun()
        return sample.sample(each, partial(apply, params), PATH, x1, grid, prediction=prediction, sampler=sampler)

    state = train.init_state(init(keys["init"], dimensions), optimizer, ema_decay=0.99)
    x = np.asarray(samples(trained(keys["train"], state, q).ema, keys["sample"]), np.float64)
    new, other = (np.asarray(spiral(key, COUNT), np.float64) for key in jax.random.split(keys["new"]))
    inside = x @ np.asarray(q, np.float64)
    finite = bool(np.isfinite(x).all())
    return {
        "distance": sliced_distance(inside, new) if finite else None,
        "reference": sliced_distance(other, new),
        "outside": float(np.square(x - inside @ np.asarray(q, np.float64).T).sum(1).mean()) if finite else None,
        "samples": np.round(inside[:SHOWN], 3).tolist(),
    }


def paragraph(rows: Sequence[cells.Row]) -> str:
    """The numbers as a table, means over seeds and the range of them, and what they say."""
    lines = []
    for (d, prediction, space), found in cells.groups(rows, "dimensions", "prediction", "loss_in").items():
        lines.append([f"D={d}, {prediction}, error in {space}", _mean(found, "distance"), _mean(found, "outside")])
    reference = np.mean([row["reference"] for row in rows])
    seeds = len({row["seed"] for row in rows})
    return (
        f"Means of {seeds} seeds, smallest and largest; the distance of new points from others is {reference:.4f}.\n\n"
        + table("cell", ["distance", "outside"], lines)
    )


def _mean(rows: Sequence[cells.Row], name: str) -> str:
    values = [np.inf if row[name] is None else row[name] for row in rows]
    return f"{np.mean(values):.3g} ({min(values):.3g} .. {max(values):.3g})"


def figure(rows: Sequence[cells.Row]) -> Figure:
    """Samples in the plane: by D with the error in the velocity, and by the space of the error at the largest D."""
    found = cells.groups(rows, "prediction", "dimensions", "loss_in")
    dimensions = sorted({row["dimensions"] for row in rows})
    columns = [(d, "flow") for d in dimensions] + [(dimensions[-1], space) for space in ("x0", "eps")]
    drawn = Figure(figsize=(1.9 * len(columns), 2.05 * len(PREDICTIONS) + 0.3), layout="constrained", dpi=110)
    axes = drawn.subplots(len(PREDICTIONS), len(columns), squeeze=False)
    for i, prediction in enumerate(PREDICTIONS):
        for j, (d, space) in enumerate(columns):
            axis, own = axes[i, j], found[prediction, d, space]
            points = np.array([[np.nan if v is None else v for v in p] for p in own[0]["samples"]])
            axis.scatter(*points.T, s=2, color=f"C{i}")
            if not (np.abs(points) < 2).all(1).any():
                axis.text(0, 0, "all lie\nfar outside", ha="center", va="center", fontsize="small", color=f"C{i}")
            axis.set(xlim=(-2, 2), ylim=(-2, 2), xticks=[], yticks=[], aspect="equal")
            axis.set_xlabel(f"distance {_mean(own, 'distance').split()[0]}", fontsize="small")
            if i == 0:
                axis.set_title(f"D = {d}, error in {space}", fontsize="small")
            if j == 0:
                axis.set_ylabel(f"predicts {prediction}")
    return drawn


if __name__ == "__main__":
    command.run(main, define_flags)
