"""A U-Net on 4x4 patches learns to make digits: Patch Diffusion (2207.04316) at a size for two CPU cores.

    python -m experiments.train --config=experiments/configs/patch_unet_mnist.py

With two experts, 0 for the cleaner and 1 for the noisier images:

    python -m experiments.train --config=experiments/configs/patch_unet_mnist.py:0
    python -m experiments.train --config=experiments/configs/patch_unet_mnist.py:1
    python -m experiments.sample --workdir=runs/patch_unet_mnist_split0,runs/patch_unet_mnist_split1
"""

from diffusion.models.unet import UNet
from experiments.config import Config, Data, Process, Sample, Train


def get_config(variant: str = "") -> Config:
    if variant not in ("", "0", "1"):
        raise ValueError(f"patch_unet_mnist:{variant}: the experts are 0 and 1, as in patch_unet_mnist.py:0")
    config = Config(
        name="patch_unet_mnist",
        data=Data(name="mnist5k"),
        model=UNet(
            patch_size=4,
            num_channels=48,
            channel_mult=(1.0, 2.0),
            num_res_blocks=1,
            attention_resolutions=(),
            num_head_channels=48,
            clock="index",
        ),
        process=Process(
            path="vp",
            betas="cosine",
            prediction="x0",
            weighting="sqrt_snr",
            variance="learned_sigmoid",
            vlb_weight=1.0,
            times="grid",
        ),
        train=Train(
            steps=4500,
            batch_size=32,
            learning_rate=2e-3,
            warmup=100,
            ema=(0.998,),
            sample_every=1000,
            save_every=1000,
        ),
        sample=Sample(respacing="50", sampler="ancestral", guidance=1.5, clip=True),
    )
    if variant:
        config.process.snr_splits, config.process.split = (0.25,), int(variant)
    return config
