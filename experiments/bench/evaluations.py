"""Samples of a trained run for a number of evaluations of the network: what samplers cost, and what is measured."""

import dataclasses
from typing import Any

import jax
import numpy as np

from experiments import inputs, report, sampling
from experiments.checks import reset
from experiments.config import Sample
from experiments.run_dir import Trained

# Samplers with two evaluations a step, but one on the last; all others have one.
TWICE = ("heun", "edm")
# The numbers of a report that are kept, where there are features for the data.
METRICS = ("distance", "ratio", "agreement", "precision", "recall")


def steps_for(sampler: str, evaluations: int) -> int:
    """The steps of a sampler for so many evaluations, or one less where a step takes two."""
    return (evaluations + 1) // 2 if sampler in TWICE else evaluations


def evaluated(sampler: str, steps: int) -> int:
    """How many evaluations so many steps of a sampler take."""
    return 2 * steps - 1 if sampler in TWICE else steps


def with_evaluations(given: Sample, evaluations: int, **chosen: Any) -> Sample:
    """The fields of sampling with those `chosen` and steps for so many evaluations.

    A chosen sampler has no other options than those chosen. All else stays as it is, if it has an effect: guidance and
    thresholds, and of the grid shift, last time and rho; one step has no last time.
    """
    if "sampler" in chosen:
        options = (f for f in dataclasses.fields(Sample) if "sampler" in f.metadata.get("only", {}))
        chosen = {f.name: f.default for f in options} | chosen
    steps = steps_for(chosen.get("sampler", given.sampler), evaluations)
    return reset(given, steps=steps, respacing=None, last=given.last if steps > 1 else None, **chosen)


def measured(run: Trained, count: int) -> dict[str, Any]:
    """`METRICS` of samples of a run, and the seconds that they took, compilation left out."""
    parts, members = run.parts()
    labels, size = inputs.equal_shares(count, run.spec.num_classes), min(run.config.sample.batch_size, count)
    sample = sampling.sample_fn(parts, members=members, finite=True)
    jax.block_until_ready(sample(run.params, np.arange(size), labels[:size]))  # compiles
    images, seconds, finite = report.collect(sample, run.params, labels, size)
    features = report.features_for(run.config, run.spec.shape)
    found = report.quality(run.config, images, labels if run.spec.num_classes else None, features)
    kept = {name: found[name] for name in METRICS if found.get(name) is not None}
    return kept | {"seconds": seconds, "non_finite": int((~finite).sum())}
