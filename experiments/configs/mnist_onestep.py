"""Digits in one evaluation of the network: pixel MeanFlow on the network of the main job.

python -m experiments.train --config=experiments/configs/mnist_onestep.py

A step costs 1.8 times one of the main job: guidance for the target, and the derivative along the flow. The network
sees t and t - r themselves, not a thousand times them, so that this derivative is small. Guidance is learned for scales
of 1 to 3 and costs no second evaluation: --config.sample.guidance is chosen after training, too.
`experiments.bench.steps` puts the run beside the main job.
"""

from diffusion.models.vit import ViT
from experiments.config import Config, Data, Objective, Process, Sample, Train


def get_config() -> Config:
    return Config(
        name="mnist_onestep",
        data=Data(name="mnist5k"),
        model=ViT(
            patch_size=10,
            stride=6,
            width=128,
            depth=6,
            heads=4,
            norm="rms",
            mlp="swiglu",
            qk_norm=True,
            positions=("learned", "rotary"),
            class_tokens=4,
            class_tokens_from=2,
            mlp_ratio=3.75,
            times=2,
            clock="1 - t",
        ),
        process=Process(path="linear", prediction="x0", times="logit_normal", times_mean=0.4),
        objective=Objective(kind="mean_flow", to_data=0.25, scale_max=3.0),
        train=Train(
            steps=2600,
            batch_size=64,
            optimizer="muon",
            learning_rate=3e-3,
            matrix_rate=0.03,
            warmup=100,
            ema=(0.996,),
            sample_every=1000,
            save_every=1000,
        ),
        sample=Sample(steps=1, sampler="mean_flow", guidance=1.5),
    )
