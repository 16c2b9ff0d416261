"""Evaluations against quality: what every sampler reaches with 5 to 250 evaluations of the network.

    python -m experiments.bench.samplers --json=samplers.json --plot=samplers.png     the exact mixture: minutes
    python -m experiments.bench.samplers --workdir=runs/mnist --json=samplers.json --plot=samplers.png
                                                                                      and 1,000 digits each: hours

On a mixture of Gaussians the denoiser is known, so that all error is the sampler's:

    error = W_1(samples, data),    of sorted samples against quantiles of the mixture,             (1)
    flow  = rms(sample - where the exact flow takes the same start), of samplers without noise     (2)

in float64, along even times and along EDM's grid. Samplers with noise do not get below `floor`, (1) of as many
independent draws. With --workdir the samples of a trained run are measured
(`experiments.report`), with its guidance, shift and last time, and the seconds that they took. A sampler with two
evaluations a step takes half as many steps; its last step has one. Each result is added to the file --json at once,
and the same command goes on where it stopped.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from diffusion import sample as samplers
from diffusion import solvers
from diffusion.grids import rho_grid, uniform_grid
from diffusion.process import Linear, expand
from experiments import command, report
from experiments.bench import commands, tables, timing
from experiments.bench.evaluations import METRICS, measured, steps_for, with_evaluations
from experiments.config import Sample
from experiments.paths import define_path
from experiments.run_dir import Trained, digest, trained

MEANS, STDS, SHARES = np.array([-1.2, 0.3, 1.1]), np.array([0.15, 0.1, 0.2]), np.array([0.3, 0.3, 0.4])
EVALUATIONS = ("5", "10", "15", "20", "30", "50", "100", "250")
GRIDS, HIGH, LOW = ("even times", "EDM's grid"), 80.0, 0.002


class Method(NamedTuple):
    """A sampler of the study: fields of `config.sample`, and whether it adds noise."""

    fields: dict[str, Any]
    noisy: bool = False


METHODS = {
    "euler": Method({"sampler": "euler"}),
    "ddim": Method({"sampler": "ddim"}),
    "heun": Method({"sampler": "heun"}),
    "dpmpp_2m": Method({"sampler": "dpmpp_2m"}),
    "unipc 2": Method({"sampler": "unipc"}),
    "unipc 3": Method({"sampler": "unipc", "order": 3}),
    "adams_bashforth 2": Method({"sampler": "adams_bashforth"}),
    "adams_bashforth 3": Method({"sampler": "adams_bashforth", "order": 3}),
    "edm": Method({"sampler": "edm"}),
    "edm churn 20": Method({"sampler": "edm", "churn": 20.0}, noisy=True),
    "dpmpp_2m_sde": Method({"sampler": "dpmpp_2m_sde"}, noisy=True),
    "ancestral": Method({"sampler": "ancestral"}, noisy=True),
}


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    command.start()
    f = flags.FLAGS
    methods, evaluations = chosen(f.methods, f.evaluations)
    if f.plot and not Path(f.plot).parent.is_dir():
        raise ValueError(f"--plot={f.plot}: there is no folder {Path(f.plot).parent}; create it first")
    workdirs = command.workdirs() if command.has_workdir() else []
    run = trained(workdirs) if workdirs else None
    sizes = {"mixture_samples": f.mixture_samples, "num_samples": f.num_samples}
    result = opened(f.json, sizes, run, workdirs)
    if run is not None:  # what does not fit fails before anything is sampled
        report.features_for(run.config, run.spec.shape)
        for name, count in itertools.product(methods, evaluations):
            with_method(run, METHODS[name], count).parts()
    keep = partial(commands.write_json, f.json)
    mixture(result, methods, evaluations, f.mixture_samples, keep)
    if run is not None:
        digits(result, run, methods, evaluations, f.num_samples, keep)
    print(described(result))
    if f.plot:
        plot(result, Path(f.plot))


def define_flags(argv: list[str]) -> None:
    """Defines the flags of this command."""
    del argv
    flags.declare_key_flag("workdir")
    define_path("json", None, "Write results to this file, and go on from those in it.")
    define_path("plot", None, "Also plot the results to this PNG.")
    flags.DEFINE_list("evaluations", list(EVALUATIONS), "Numbers of evaluations of the network.")
    flags.DEFINE_list("methods", [], f"Which samplers, default all: {'; '.join(METHODS)}.")
    flags.DEFINE_integer("mixture_samples", 16384, "Samples of the mixture.", lower_bound=16)
    flags.DEFINE_integer("num_samples", 1000, "Samples of the trained run.", lower_bound=1)


def chosen(methods: Sequence[str], evaluations: Sequence[str]) -> tuple[list[str], list[int]]:
    """The values of --methods, by default all, and of --evaluations.

    Raises:
      ValueError: there is no such method, or a number is none.
    """
    if not evaluations or not all(n.isdecimal() and int(n) >= 2 for n in evaluations):
        raise ValueError(f"--evaluations={','.join(evaluations)} must be numbers from 2 on with commas between them")
    if unknown := [name for name in methods if name not in METHODS]:
        raise ValueError(f"--methods={','.join(unknown)}: the methods are {'; '.join(METHODS)}")
    return list(methods) or list(METHODS), [int(n) for n in evaluations]


def opened(
    path: str | None, sizes: dict[str, int], run: Trained | None = None, workdirs: Sequence[Path] = ()
) -> dict[str, Any]:
    """What the file of an earlier call holds, or an empty result.

    Raises:
      ValueError: it is the result of another run or of other numbers of samples.
    """
    about = {"run": None, "workdir": [], "digest": None}
    if run is not None:
        about["run"], about["workdir"] = f"{run.config.name}, step {run.step}", [str(w.resolve()) for w in workdirs]
        about["digest"] = digest([run.config, *run.members], run.params)
    empty = {"machine": timing.machine(), **sizes, **about, "mixture": {}, "digits": {}}
    if not path or not Path(path).exists() or not Path(path).read_text():
        commands.check_json(path)
        return empty
    found = json.loads(Path(path).read_text())
    for name, value in sizes.items():
        if found.get(name) != value:
            raise ValueError(f"--json={path} holds results of {name}={found.get(name)}, not {value}: pass another file")
    if not found.get("run"):
        return found | about
    if run is not None and found.get("digest") != about["digest"]:
        where = ",".join(found.get("workdir", ["an unknown folder"]))
        raise ValueError(
            f"--json={path} holds results of {found['run']}, in {where}; the weights or the config in "
            f"{','.join(about['workdir'])} are others: pass another file"
        )
    return found


def denoise(xt: jax.Array, t: jax.Array, y: Any = None) -> jax.Array:
    """E[x0 | xt] of the mixture on the linear path, [1, N, 1]."""
    alpha, sigma = (expand(a, xt) for a in Linear()(t))
    means, stds, shares = (jnp.asarray(a).reshape(1, 1, 3) for a in (MEANS, STDS, SHARES))
    total = jnp.square(alpha * stds) + jnp.square(sigma)
    log_p = jnp.log(shares) - jnp.square(xt - alpha * means) / total / 2 - jnp.log(total) / 2
    x0 = means + alpha * jnp.square(stds) / total * (xt - alpha * means)
    return (jax.nn.softmax(log_p, -1) * x0).sum(-1, keepdims=True)


def quantiles(n: int) -> np.ndarray:
    """The n quantiles (i + 1/2) / n of the mixture, by bisection of its distribution function."""
    from scipy.stats import norm

    level, low, high = (np.arange(n) + 0.5) / n, np.full(n, -9.0), np.full(n, 9.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = (SHARES * norm.cdf((middle[:, None] - MEANS) / STDS)).sum(-1) < level
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return middle


def mixture(result: dict[str, Any], methods: Sequence[str], evaluations: Sequence[int], n: int, keep: Any) -> None:
    """Adds errors (1) and (2) on the mixture to the result: {grid: {method: {evaluations: {...}}}}."""
    from scipy.stats import norm

    with jax.enable_x64(True):
        data = quantiles(n)
        drawn = data[np.random.default_rng(0).integers(0, n, n)]
        result["floor"] = float(np.abs(np.sort(drawn) - data).mean())
        x1 = jnp.asarray(norm.ppf((np.arange(n) + 0.5) / n)).reshape(1, n, 1)  # even: all error is the sampler's
        for kind in GRIDS:
            for name in methods:
                method, rows = METHODS[name], result["mixture"].setdefault(kind, {}).setdefault(name, {})
                for count in evaluations:
                    if str(count) in rows:
                        continue
                    made = mixed(method, kind, steps_for(method.fields["sampler"], count), x1)
                    rows[str(count)] = {"error": float(np.abs(np.sort(made) - data).mean())}
                    if not method.noisy:
                        rows[str(count)]["flow"] = float(np.sqrt(np.square(made - data).mean()))
                    keep(result)


def mixed(method: Method, kind: str, steps: int, x1: jax.Array) -> np.ndarray:
    """Samples [N] of the mixture from the noise x1 [1, N, 1] of unit scale."""
    grid = rho_grid(Linear(), max(steps, 2), HIGH, LOW) if kind == GRIDS[1] else uniform_grid(steps)
    x1 = x1 * Linear()(jnp.asarray(grid[0]))[1]
    run = partial(samplers.sample, prediction="x0", sampler=sampler(method, len(grid) - 1))
    return np.asarray(jax.jit(lambda x: run(jax.random.key(0), denoise, Linear(), x, grid))(x1)).ravel()


def sampler(method: Method, steps: int) -> samplers.Sampler:
    """The sampler of a method."""
    given = Sample(steps=steps, **method.fields)
    options = {
        "euler": solvers.euler,
        "ddim": samplers.ddim,
        "heun": samplers.heun,
        "dpmpp_2m": samplers.dpmpp_2m,
        "unipc": lambda: solvers.unipc(given.order),
        "adams_bashforth": lambda: solvers.adams_bashforth(given.order),
        "edm": lambda: solvers.edm(given.churn / steps),
        "dpmpp_2m_sde": solvers.dpmpp_2m_sde,
        "ancestral": samplers.ancestral,
    }
    return options[given.sampler]()


def digits(
    result: dict[str, Any], run: Trained, methods: Sequence[str], evaluations: Sequence[int], n: int, keep: Any
) -> None:
    """Adds metrics and seconds of samples of the run to the result: {method: {evaluations: {...}}}."""
    for name in methods:
        rows = result["digits"].setdefault(name, {})
        for count in evaluations:
            if str(count) not in rows:
                rows[str(count)] = measured(with_method(run, METHODS[name], count), n)
                keep(result)


def with_method(run: Trained, method: Method, evaluations: int) -> Trained:
    """The run with another sampler: its guidance and thresholds, and even times but for its shift and last time."""
    even = {name: getattr(Sample, name) for name in ("rho", "sigma_min", "sigma_max")}
    found = with_evaluations(run.config.sample, evaluations, **even, **method.fields)
    return run._replace(config=dataclasses.replace(run.config, sample=found))


def described(result: dict[str, Any]) -> str:
    """Tables: a row per sampler, a column per number of evaluations."""
    found = [f"mixture: as many independent draws have an error of {result['floor']:.1e}"]
    for kind, rows in result["mixture"].items():
        found.append(_table(f"mixture, {kind}: error", rows, "error", "{:.1e}"))
    for metric in (*METRICS, "seconds"):
        if any(metric in row for rows in result["digits"].values() for row in rows.values()):
            found.append(_table(f"samples: {metric}", result["digits"], metric, "{:.3g}"))
    return "\n\n".join([tables.where(result["machine"]), *found])


def _table(title: str, rows: dict[str, dict[str, dict[str, float]]], metric: str, form: str) -> str:
    counts = sorted({int(count) for row in rows.values() for count in row})
    cells = [
        [name, *(form.format(row[str(n)][metric]) if metric in row.get(str(n), {}) else "-" for n in counts)]
        for name, row in rows.items()
    ]
    return tables.table(title, [str(n) for n in counts], cells)


def plot(result: dict[str, Any], path: Path) -> None:
    """One panel for each grid on the mixture and, with a run, for its distance and its agreement, over evaluations."""
    from matplotlib.figure import Figure  # the object, not pyplot: it needs no screen

    panels = [
        (f"Exact mixture, {kind}", "distance W1 to the data", rows, "error") for kind, rows in result["mixture"].items()
    ]
    for metric, words in (("ratio", "feature distance / that of real images"), ("agreement", "label as given")):
        if any(metric in row for rows in result["digits"].values() for row in rows.values()):
            panels.append((f"Samples of {result['run']}", words, result["digits"], metric))
    figure = Figure((4.6 * len(panels), 4.2), layout="constrained")
    for axes, (title, words, rows, metric) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        for name, row in rows.items():
            counts = sorted(int(n) for n in row if metric in row[n])
            line = "--" if METHODS[name].noisy else "-"
            axes.plot(counts, [row[str(n)][metric] for n in counts], line, marker=".", label=name)
        axes.set(title=title, xlabel="evaluations of the network", ylabel=words, xscale="log")
        if metric != "agreement":
            axes.set_yscale("log")
        if metric == "error":
            axes.axhline(result["floor"], color="grey", linewidth=0.8, linestyle=":", label="independent draws")
        counts = sorted({int(n) for row in rows.values() for n in row})
        axes.set_xticks(counts, [str(n) for n in counts], fontsize="small")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, format="png", dpi=120)


if __name__ == "__main__":
    command.run(main, define_flags)
