"""LSUN bedrooms at 256x256 with 2x2, 4x4 or 8x8 patches, as Patch Diffusion published them (2207.04316).

    python -m experiments.train --config=experiments/configs/lsun.py:4 --config.data.data_dir=...

For accelerators. LSUN must have been prepared by TFDS, or use --config.data.name=folder:PATH.
"""

from diffusion.models.unet import UNet
from experiments.config import Config, Data, Process, Sample, Train

# Patch size to width, multipliers, blocks, batch, steps.
SIZES = {
    "2": (128, (1.0, 2.0, 2.0, 4.0, 4.0), 2, 128, 335_000),
    "4": (256, (1.0, 1.0, 2.0, 2.0), 2, 256, 275_000),
    "8": (256, (1.0, 1.5, 2.0), 3, 512, 215_000),
}


def get_config(variant: str = "4") -> Config:
    if variant not in SIZES:
        raise ValueError(f"lsun:{variant}: patches are of size {', '.join(SIZES)}, as in lsun.py:4")
    num_channels, channel_mult, num_res_blocks, batch_size, steps = SIZES[variant]
    return Config(
        name=f"lsun{variant}",
        data=Data(name="lsun/bedroom", size=(256, 256), channels=3, held_out="validation", labels=False),
        model=UNet(
            patch_size=int(variant),
            num_channels=num_channels,
            channel_mult=channel_mult,
            num_res_blocks=num_res_blocks,
            num_head_channels=64,
            clock="index",
            dtype="bfloat16",
        ),
        process=Process(
            path="vp",
            weighting="sqrt_snr",
            variance="learned_sigmoid",
            vlb_weight=1.0,
            times="grid",
        ),
        train=Train(
            steps=steps,
            batch_size=batch_size,
            learning_rate=1e-4,
            warmup=5000,
            schedule="constant",
            clip=None,
            ema=(0.9999,),
            log_every=100,
            sample_every=10_000,
            save_every=5000,
        ),
        sample=Sample(count=10_000, respacing="250", sampler="ancestral", clip=True, batch_size=64),
    )
