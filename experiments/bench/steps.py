"""Quality against the number of evaluations of the network: trained runs beside each other.

    python -m experiments.bench.steps --runs=runs/mnist_onestep,runs/mnist
    python -m experiments.bench.steps --runs=runs/mnist --sampler=ddim --evaluations=4,10 --num_samples=500

Every run makes the same number of samples with its own sampler, or with --sampler if it learned to denoise, in so many
evaluations of the guided denoiser. Where guidance is not learned (`meanflow`) or distilled, each of them is two passes
through the network, which the table counts. Agreement is the share of samples that a classifier reads as their label
(digits only), ratio the Frechet distance over that of as many real images, as `experiments.evaluate` prints them.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from experiments import command, report
from experiments.bench import commands, tables, timing
from experiments.bench import evaluations as evaluations_of
from experiments.config import Config
from experiments.paths import define_path
from experiments.run_dir import Trained, trained


def define_flags(argv: list[str]) -> None:
    """Defines --runs, --evaluations, --num_samples, --sampler, --guidance and --json."""
    del argv
    define_path("json", None, "Also write the result to this file.")
    flags.DEFINE_list("runs", ["runs/mnist_onestep", "runs/mnist"], "Work directories of trained runs.")
    flags.DEFINE_list("evaluations", ["1", "2", "4", "10", "100"], "Evaluations of the guided denoiser per sample.")
    flags.DEFINE_integer("num_samples", 1000, "Samples of each run and number of evaluations.", lower_bound=20)
    flags.DEFINE_string("sampler", None, "Of runs that learned to denoise; default: each run's own.")
    flags.DEFINE_float("guidance", None, "Guidance scale of all runs; default: each run's own.")


def main(argv: Sequence[str]) -> None:
    command.start()
    values = flags.FLAGS
    wrong = [each for each in values.evaluations if not each.strip().isdecimal() or not int(each)]
    if wrong:
        raise ValueError(f"--evaluations={','.join(values.evaluations)}: {wrong} are not numbers from 1 up")
    commands.perform(
        argv,
        partial(
            run,
            [Path(each).expanduser() for each in values.runs],
            [int(each) for each in values.evaluations],
            values.num_samples,
            values.sampler,
            values.guidance,
        ),
        table,
    )


def run(
    workdirs: Sequence[Path],
    evaluations: Sequence[int],
    count: int,
    sampler: str | None = None,
    guidance: float | None = None,
) -> dict[str, Any]:
    """A row of numbers for each run and number of evaluations, ready for JSON.

    Raises:
      FileNotFoundError: there is no such run.
      ValueError: the sampler is unknown, or a run is one of arrays without features.
    """
    runs = [trained([workdir]) for workdir in workdirs]
    configs = [[with_evaluations(each.config, n, sampler, guidance) for n in evaluations] for each in runs]
    for each, changed in zip(runs, configs, strict=True):  # what is wrong fails before anything is sampled
        for config in changed:
            each._replace(config=config).parts()
        report.features_for(each.config, each.spec.shape)
    rows = [
        {"run": str(workdir), "evaluations": n, **measured(each._replace(config=config), count)}
        for workdir, each, changed in zip(workdirs, runs, configs, strict=True)
        for n, config in zip(evaluations, changed, strict=True)
    ]
    return {"machine": timing.machine(), "samples": count, "rows": rows}


def with_evaluations(
    config: Config, evaluations: int, sampler: str | None = None, guidance: float | None = None
) -> Config:
    """The config with steps for so many evaluations, or one less where a step takes two."""
    chosen = {} if guidance is None else {"guidance": guidance}
    if sampler is not None and config.objective.kind == "denoise":
        chosen["sampler"] = sampler
    found = evaluations_of.with_evaluations(config.sample, evaluations, **chosen)
    return dataclasses.replace(config, sample=found)


def measured(run: Trained, count: int) -> dict[str, Any]:
    """The numbers of samples of one run, and how often an image passes through its network."""
    c = run.config
    evaluated = evaluations_of.evaluated(c.sample.sampler, c.sample.steps)
    guided = c.objective.kind != "mean_flow" and run.spec.num_classes and c.sample.guidance not in (0, 1)
    about = {"sampler": c.sample.sampler, "passes": evaluated * (2 if guided else 1)}
    return about | evaluations_of.measured(run, count)


def table(result: dict[str, Any]) -> str:
    """One table of all rows."""
    rows = []
    for row in result["rows"]:
        agreement = f"{row['agreement']:.1%}" if "agreement" in row else "-"
        numbers = [f"{row['evaluations']}", f"{row['passes']}", agreement, f"{row['ratio']:.2f} x"]
        numbers += [f"{row['precision']:.2f}", f"{row['recall']:.2f}", f"{row['seconds']:.1f} s"]
        rows.append([f"{row['run']} ({row['sampler']})", *numbers])
    heads = ["evaluations", "passes", "agreement", "ratio", "precision", "recall", f"{result['samples']} samples"]
    return f"{tables.where(result['machine'])}\n\n{tables.table('run (sampler)', heads, rows)}"


if __name__ == "__main__":
    command.run(main, define_flags)
