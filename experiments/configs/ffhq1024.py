"""Faces (FFHQ) at 1024x1024 with 4x4 patches, as Patch Diffusion published it (2207.04316).

    python -m experiments.train --config=experiments/configs/ffhq1024.py --config.data.name=folder:PATH

For accelerators; PATH holds the 70,000 images of FFHQ.
"""

from diffusion.models.unet import UNet
from experiments.config import Config, Data, Process, Sample, Train


def get_config() -> Config:
    return Config(
        name="ffhq1024",
        data=Data(name="folder:ffhq", size=(1024, 1024), flip=True, channels=3, labels=False),
        model=UNet(
            patch_size=4,
            num_channels=128,
            channel_mult=(1.0, 2.0, 2.0, 4.0, 4.0, 4.0),
            num_head_channels=64,
            clock="index",
            dtype="bfloat16",
        ),
        process=Process(
            path="vp",
            betas="linear0.025",
            weighting="sqrt_snr",
            variance="learned_sigmoid",
            vlb_weight=1.0,
            times="grid",
        ),
        train=Train(
            steps=780_000,
            batch_size=32,
            learning_rate=1e-4,
            warmup=5000,
            schedule="constant",
            clip=None,
            ema=(0.9999,),
            log_every=100,
            sample_every=10_000,
            save_every=5000,
        ),
        sample=Sample(count=1000, respacing="250", sampler="ancestral", clip=True, batch_size=4),
    )
