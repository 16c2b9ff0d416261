"""JiT on ImageNet, the published recipe (Li & He 2025, 2511.13720): 256x256 (b16, l16, h16, g16), 512x512 (b32 to g32).

    python -m experiments.train --config=experiments/configs/jit.py:l16 --config.data.data_dir=...

For accelerators; global batch 1024, 600 epochs. ImageNet must have been prepared by TFDS, or use
--config.data.name=folder:PATH. Published weights become a run by `experiments.convert --layout=jit`. Times here run
from data (0) to noise (1), the paper's the other way: its P_mean of -0.8 is +0.8, its guidance interval (0.1, 1) is
(0, 0.9). Sizes and dropout are those of table 9, guidance scales those of the published commands. JiT-G is in the paper
alone: it was stopped at about epoch 320, and its guidance scale, which is not stated, is JiT-H's here. docs/jit.md has
the rest.
"""

from diffusion.models.vit import JIT, ViT
from experiments.config import Config, Data, Process, Sample, Train

EPOCH = 1_281_167 // 1024
# depth, width, heads, bottleneck, first block with class tokens, dropout, epochs
SIZES = {
    "b": (12, 768, 12, 128, 4, 0.0, 600),
    "l": (24, 1024, 16, 128, 8, 0.0, 600),
    "h": (32, 1280, 16, 256, 10, 0.2, 600),
    "g": (40, 1664, 16, 256, 10, 0.2, 320),
}
GUIDANCE = {"b16": 2.9, "b32": 2.9, "l16": 2.4, "l32": 2.5, "h16": 2.2, "h32": 2.3, "g16": 2.2, "g32": 2.3}


def get_config(variant: str = "b16") -> Config:
    if variant not in GUIDANCE:
        raise ValueError(f"jit:{variant}: the networks are {', '.join(GUIDANCE)}, as in jit.py:b16")
    depth, width, heads, bottleneck, class_tokens_from, dropout, epochs = SIZES[variant[0]]
    patch_size = int(variant[1:])
    size = 16 * patch_size
    return Config(
        name=f"jit_{variant}",
        data=Data(name="imagenet2012", held_out="validation", size=(size, size), flip=True, channels=3),
        model=ViT(
            patch_size=patch_size,
            width=width,
            depth=depth,
            heads=heads,
            bottleneck=bottleneck,
            class_tokens=32,
            class_tokens_from=class_tokens_from,
            dropout=dropout,
            dropout_blocks="middle",
            dtype="bfloat16",
            **JIT,
        ),
        process=Process(
            noise_scale=size / 256,
            prediction="x0",
            loss_in="flow",
            times="logit_normal",
            times_mean=0.8,
            times_std=0.8,
        ),
        train=Train(
            steps=epochs * EPOCH,
            batch_size=1024,
            learning_rate=2e-4,
            warmup=5 * EPOCH,
            schedule="constant",
            b2=0.95,
            clip=None,
            ema=(0.9999, 0.9996),
            ema_warmup=False,
            log_every=100,
            sample_every=10 * EPOCH,
            save_every=EPOCH,
        ),
        sample=Sample(
            steps=50,
            sampler="heun",
            guidance=GUIDANCE[variant],
            guidance_high=0.9,
            guidance_open=True,
            floor=0.05,
        ),
    )
