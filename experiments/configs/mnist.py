"""The main job: a class-conditional vision transformer learns to draw digits.

python -m experiments.train
"""

from experiments.config import Config, Data, Model, Process, Sample, Train


def get_config() -> Config:
    return Config(
        name="mnist",
        data=Data(name="mnist5k", shift=1),
        model=Model(
            patch_size=10,
            stride=6,
            width=128,
            depth=6,
            heads=4,
            norm="rms",
            mlp="swiglu",
            qk_norm=True,
            positions=("learned", "rotary"),
        ),
        process=Process(path="linear", prediction="x0", loss_in="flow", times="logit_normal", times_mean=0.0),
        train=Train(
            steps=2400,
            batch_size=64,
            learning_rate=2e-3,
            warmup=100,
            ema=0.995,
            sample_every=400,
            save_every=400,
        ),
        sample=Sample(steps=50, guidance=2.0),
    )
