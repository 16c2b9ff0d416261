"""ImageNet at 256x256 with 4x4 patches and two experts, as Patch Diffusion published it (2207.04316).

    python -m experiments.train --config=experiments/configs/imagenet256.py:0 --config.data.data_dir=...
    python -m experiments.train --config=experiments/configs/imagenet256.py:1 --config.data.data_dir=...
    python -m experiments.sample --workdir=runs/imagenet256_split0,runs/imagenet256_split1 --num_samples=64

The second expert, of the noisier images, begins with the first one's averaged weights, at half its learning rate.
For accelerators. ImageNet must have been prepared by TFDS, or use --config.data.name=folder:PATH.
"""

from diffusion.models.unet import UNet
from experiments.config import Config, Data, Process, Sample, Train


def get_config(variant: str = "0") -> Config:
    if variant not in ("0", "1"):
        raise ValueError(f"imagenet256:{variant}: the experts are 0 and 1, as in imagenet256.py:0")
    second = variant == "1"
    return Config(
        name="imagenet256",
        data=Data(name="imagenet2012", size=(256, 256), flip=True, channels=3, held_out="validation"),
        model=UNet(
            patch_size=4,
            num_channels=256,
            channel_mult=(1.0, 2.0, 2.0, 2.0),
            num_res_blocks=3,
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
            snr_splits=(0.25,),
            split=int(variant),
        ),
        train=Train(
            steps=500_000,
            batch_size=256,
            learning_rate=5e-5 if second else 1e-4,
            warmup=10_000 if second else 5000,
            schedule="constant",
            clip=None,
            ema=(0.9999,),
            init_from="runs/imagenet256_split0" if second else None,
            log_every=100,
            sample_every=10_000,
            save_every=5000,
        ),
        sample=Sample(count=10_000, respacing="250", sampler="ancestral", guidance=1.5, threshold=0.995, batch_size=64),
    )
