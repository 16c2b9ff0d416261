"""The blog's model and recipe as published: noise predicted per overlapping patch, one attention-only transformer.

python -m experiments.train --config=experiments/configs/blog.py
"""

from diffusion.models.blog import Blog
from experiments.config import Config, Data, Process, Sample, Train


def get_config() -> Config:
    return Config(
        name="blog",
        data=Data(name="mnist5k", low=-0.5, high=255 / 256 - 0.5, labels=False),
        model=Blog(patch_size=18, stride=10, depth=3, heads=20, head_dim=100),
        process=Process(
            path="geometric", rate=0.99, steps=500, prediction="eps", loss_in=None, patches=True, times="grid"
        ),
        train=Train(
            steps=4500,
            batch_size=5,
            repeat=100,
            learning_rate=1e-4,
            warmup=0,
            schedule="constant",
            b2=0.999,
            adam_eps=1e-7,
            clip=None,
            ema=(0.0,),
            label_drop=0.0,
            log_every=5,
            sample_every=150,
            save_every=50,
            eval_every=50,
            eval_count=800,
            patience=5,
        ),
        sample=Sample(count=250, steps=500, overstep=1.5, batch_size=125),
    )
