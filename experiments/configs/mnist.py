"""The main job: a class-conditional vision transformer on overlapping patches learns to draw digits.

    python -m experiments.train

Patches of 10x10 every 6 pixels make 4x4 tokens without visible borders. Training draws more times of much noise, where
the class and the shape of a digit are decided; sampling adds a little noise at each step, which corrects errors of the
steps before. The last step leaves out the times near the data, of which training saw next to nothing. Muon learns as
much in 3,600 steps of 64 as AdamW in 9,000 of 32, in less time.
"""

from diffusion.models.vit import ViT
from experiments.config import Config, Data, Process, Sample, Train


def get_config() -> Config:
    return Config(
        name="mnist",
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
        ),
        process=Process(path="linear", prediction="x0", loss_in="flow", times="logit_normal", times_mean=0.8),
        train=Train(
            steps=3600,
            batch_size=64,
            optimizer="muon",
            learning_rate=3e-3,
            matrix_rate=0.03,
            warmup=100,
            ema=(0.996,),
            sample_every=1000,
            save_every=1000,
        ),
        sample=Sample(steps=100, last=0.2, sampler="ancestral", guidance=1.42, guidance_high=0.8),
    )
