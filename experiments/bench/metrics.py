"""Metrics against the programs that are usual for them: precision to coverage against prdc, Frechet against SciPy.

    python -m experiments.bench.metrics --rounds=3

Precision, recall, density and coverage: of as many random real features as fakes, against the package `prdc`
(pip install prdc; without it ours is timed alone). Frechet distance: from features to the distance, against
`numpy.cov` and `scipy.linalg.sqrtm` of the product of both covariances, as pytorch-fid computes it. Both programs are
first shown to give the same numbers. Then they take turns in one process on the same cores (`timing`).
"""

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
from absl import flags

from diffusion.metrics.moments import frechet, gaussian, moments
from diffusion.metrics.neighbours import neighbourhoods
from experiments import command
from experiments.bench import commands, peers, tables, timing

K = 5
NAMES = ("precision", "recall", "density", "coverage")


def define_flags(argv: list[str]) -> None:
    """The flags of all benchmarks, and the sizes of the two comparisons."""
    commands.define_flags(argv)
    flags.DEFINE_integer("neighbours", 10_000, "Real features, and fakes, of precision to coverage.", lower_bound=10)
    flags.DEFINE_integer("images", 50_000, "Real features, and fakes, of the Frechet distance.", lower_bound=2)
    flags.DEFINE_integer("features", 2048, "How many features each has for the Frechet distance.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    command.start()
    sizes = {name: flags.FLAGS[name].value for name in ("neighbours", "images", "features", "rounds")}
    commands.perform(argv, partial(run, **sizes), report)


def run(*, neighbours: int, images: int, features: int, rounds: int) -> dict[str, Any]:
    """All measurements, ready for JSON.

    Raises:
      AssertionError: the two programs do not compute the same.
    """
    rng = np.random.default_rng(0)
    real, fake = (rng.normal(i / 10, 1, (neighbours, 64)).astype(np.float32) for i in range(2))
    programs, errors = {"ours": partial(neighbourhoods, real, fake, K)}, {}
    if importlib.util.find_spec("prdc"):
        programs["prdc"] = partial(published_neighbours, real, fake)
        found, expected = programs["ours"](), programs["prdc"]()
        errors |= {name: abs(getattr(found, name) - expected[name]) for name in NAMES}
    pairs = timing.compare(programs, neighbours**2, rounds)
    x, y = (rng.normal(i / 10, 1 + i / 10, (images, features)).astype(np.float32) for i in range(2))
    programs = {"ours": partial(distance, x, y), "SciPy": partial(published_distance, x, y)}
    found, expected = (program() for program in programs.values())
    errors["Frechet distance"] = abs(found - expected) / expected
    return {
        "machine": timing.machine() | {"numpy": np.__version__, "scipy": scipy.__version__},
        "errors": peers.check_same("the published program", errors),
        "sizes": {"neighbours": neighbours, "images": images, "features": features},
        "neighbours": pairs,
        "frechet": timing.compare(programs, 1, rounds),
    }


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of features [N, F]."""
    return frechet(gaussian(moments(a)), gaussian(moments(b)))


def published_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The same by the square root of a product that is not symmetric."""
    (m, s), (n, z) = ((np.mean(x, 0, np.float64), np.cov(x.astype(np.float64), rowvar=False)) for x in (a, b))
    return float(np.square(m - n).sum() + np.trace(s + z - 2 * scipy.linalg.sqrtm(s @ z).real))


def published_neighbours(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """Precision to coverage by prdc, which prints."""
    import prdc

    with contextlib.redirect_stdout(io.StringIO()):
        return prdc.compute_prdc(real, fake, K)


def report(result: dict[str, Any]) -> str:
    """Two tables."""
    n, sizes = result["sizes"]["neighbours"], result["sizes"]
    titles = {
        "neighbours": f"precision to coverage, {n} x {n} x 64",
        "frechet": f"Frechet distance, {sizes['images']} x {sizes['features']}",
    }
    found = []
    for name, title in titles.items():
        rows = []
        for program, row in result[name].items():
            faster = ", ".join(f"{ratio:.2f} x {other}" for other, ratio in row["speed_over"].items())
            rows.append([program, f"{np.median(row['timings']):.2f} s", faster])
        found.append(tables.table(title, ["time", "speed over"], rows))
    where = tables.where(result["machine"], ("numpy", "scipy"))
    return "\n\n".join([where, *found, peers.agreement(result["errors"])])


if __name__ == "__main__":
    command.run(main, define_flags)
