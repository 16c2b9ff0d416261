"""JiT-B/16 at 256x256 on ImageNet, the published recipe (Li & He 2025, 2511.13720): 131 M parameters, 600 epochs.

    python -m experiments.train --config=experiments/configs/jit_b16.py --config.data.data_dir=...

For accelerators; global batch 1024. ImageNet must have been prepared by TFDS, or use --config.data.name=folder:PATH.
Times here run from data (0) to noise (1), the paper's the other way: its P_mean of -0.8 is +0.8, its guidance
interval [0.1, 1] is [0, 0.9].
"""

from diffusion.models.vit import ViT
from experiments.config import Config, Data, Process, Sample, Train

EPOCH = 1_281_167 // 1024


def get_config() -> Config:
    return Config(
        name="jit_b16",
        data=Data(name="imagenet2012", size=(256, 256), flip=True, channels=3),
        model=ViT(
            patch_size=16,
            width=768,
            depth=12,
            heads=12,
            bottleneck=128,
            norm="rms",
            mlp="swiglu",
            qk_norm=True,
            positions=("sincos", "rotary"),
            class_tokens=32,
            class_tokens_from=4,
            clock="1 - t",
            dtype="bfloat16",
        ),
        process=Process(prediction="x0", loss_in="flow", times="logit_normal", times_mean=0.8, times_std=0.8),
        train=Train(
            steps=600 * EPOCH,
            batch_size=1024,
            learning_rate=2e-4,
            warmup=5 * EPOCH,
            schedule="constant",
            b2=0.95,
            clip=None,
            ema=(0.9999,),
            log_every=100,
            sample_every=10 * EPOCH,
            save_every=EPOCH,
        ),
        sample=Sample(steps=50, sampler="heun", guidance=2.9, guidance_high=0.9),
    )
