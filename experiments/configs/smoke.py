"""Everything the main job does, in seconds: for tests, notebooks and benchmarks.

python -m experiments.train --config=experiments/configs/smoke.py
"""

from diffusion.models.vit import ViT
from experiments.config import Config, Data, Sample, Train


def get_config() -> Config:
    return Config(
        name="smoke",
        data=Data(shift=1),
        model=ViT(patch_size=7, width=32, depth=2, heads=2, positions=("learned", "rotary")),
        train=Train(steps=8, batch_size=16, warmup=2, log_every=2, sample_every=4, save_every=4),
        sample=Sample(count=100, steps=4, guidance=2.0, batch_size=50),
    )
