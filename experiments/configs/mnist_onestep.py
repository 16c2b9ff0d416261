"""Digits in one evaluation of the network: pixel MeanFlow on the network of the main job.

python -m experiments.train --config=experiments/configs/mnist_onestep.py

A step costs twice one of the main job: guidance for the target, and the derivative along the flow. The network
sees t and t - r themselves, not a thousand times them, so that this derivative is small. Guidance is learned for scales
of 1 to 3 and costs no second evaluation: --config.sample.guidance is chosen after training, too.
`experiments.bench.steps` puts the run beside the main job.
"""

import dataclasses

from experiments.config import Config, Objective, Process, Sample
from experiments.configs import mnist


def get_config() -> Config:
    base = mnist.get_config()
    return dataclasses.replace(
        base,
        name="mnist_onestep",
        model=dataclasses.replace(base.model, times=2, clock="1 - t"),
        process=Process(path="linear", prediction="x0", times="logit_normal", times_mean=0.4),
        objective=Objective(kind="mean_flow", to_data=0.25, scale_max=3.0),
        train=dataclasses.replace(base.train, steps=2600),
        sample=Sample(steps=1, sampler="mean_flow", guidance=1.5),
    )
