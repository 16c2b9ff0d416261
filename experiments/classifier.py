"""Trains the digit classifier of `diffusion.metrics.features.digits` on the training split of mnist5k.

    python -m experiments.classifier                      writes runs/mnist_classifier.safetensors
    python -m experiments.classifier --out=diffusion/metrics/features/mnist_classifier.safetensors --overwrite

Takes two and a half minutes of processor time, divided by the number of cores. The weights that come with the package
(seed 0) classify 99.0 % of the 500 held-out digits and all training digits correctly.

The same seed gives the same file on the same machine; another processor may round differently. To replace the weights
of the package, use the second command and put the SHA-256 that it prints into `diffusion/metrics/features/digits.py`.
"""

import hashlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from tqdm import tqdm

from diffusion import data, optimize
from diffusion import train as training
from diffusion.io import files
from diffusion.metrics import distances
from diffusion.metrics.features import digits
from diffusion.models import classifier
from experiments import command
from experiments.paths import define_path

BATCH_SIZE = 128
# Largest changes to a training digit: radians, logarithm of the scale of each side, shear, pixels.
ROTATION, SCALE, SHEAR, SHIFT = 0.26, 0.18, 0.3, 2.5
STEPS = 3000


def define(argv: list[str]) -> None:
    """Defines the flags; not at import, so that this module can be imported together with other commands."""
    del argv
    define_path("out", "runs/mnist_classifier.safetensors", "File to write.")
    flags.DEFINE_bool("overwrite", False, "Replace the file if there is one.")
    flags.DEFINE_integer("seed", 0, "Seed of initial weights, order and warps.", lower_bound=0)
    flags.DEFINE_integer("steps", STEPS, "Training steps.", lower_bound=1)
    define_path("data_dir", None, "Folder of the prepared data sets; default: that of TFDS.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    values = flags.FLAGS
    out = Path(values.out)
    if out.is_dir():
        raise IsADirectoryError(f"--out={out} is a directory; pass the name of a file")
    if out.exists() and not values.overwrite:
        raise FileExistsError(f"{out} exists; pass --overwrite to replace it, or another --out")
    files.check_writable(out.parent)
    source = data.load("mnist5k", "train", data_dir=values.data_dir)
    held_out = data.load("mnist5k", "test", data_dir=values.data_dir)
    command.start()
    start = time.perf_counter()
    params = train(source, seed=values.seed, steps=values.steps)
    seconds = time.perf_counter() - start
    file = classifier.to_bytes(params)
    files.atomic_write(out, lambda f: f.write(file))
    for name, part in (("training", source), ("held-out", held_out)):
        accuracy = distances.agreement(digits.digit_features(part.images, params).logits, part.labels)
        print(f"accuracy on {len(part.labels):,} {name} digits: {accuracy:.2%}")
    digest = hashlib.sha256(file).hexdigest()
    same = "same as" if digest == digits.SHA256 else "different from"
    print(f"{out}: {len(file):,} bytes, {seconds:.0f} s, SHA-256 {digest} ({same} the package's weights)")


def train(source: data.Source, *, seed: int = 0, steps: int = STEPS) -> Any:
    """Exponential moving average of the parameters after `steps` steps on randomly warped digits of `source`."""
    key = jax.random.key(seed)
    params = jax.jit(classifier.init)(jax.random.fold_in(key, steps))  # the steps fold in 0 .. steps - 1
    state = training.init_state(params, optimizer(steps))
    for i in tqdm(range(steps), unit="step", disable=None):
        state = update(steps, key, state, data.batch(source, seed, i, BATCH_SIZE))
    return jax.tree.map(np.asarray, state.ema)


def optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW over `steps` steps."""
    return optimize.adamw(2e-3, steps=steps, warmup=steps // 20, weight_decay=0.05, clip=1.0)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def update(steps: int, key: jax.Array, state: training.State, batch: dict[str, jax.Array]) -> training.State:
    """The state after one training step; `steps` is the length of the whole training."""
    return training.make_step(loss, optimizer(steps), ema_decay=0.995)(key, state, batch)[0]


def loss(params: Any, key: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of a batch of digits, each warped at random."""
    logits, _ = classifier.apply(params, warp(key, batch["x"].astype(jnp.float32) / 255))
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), {}


def warp(key: jax.Array, x: jax.Array) -> jax.Array:
    """Rotates, scales, shears and shifts each image of x [B, H, W, 1] at random, with bilinear interpolation.

    The value at position p is read at c + R(angle) [[a, 0], [shear, b]] (p - c) + shift, c being the centre; values
    outside the image are 0.
    """
    b, h, w, _ = x.shape
    u = jax.random.uniform(key, (6, b), minval=-1.0)
    angle, shear, (scale_h, scale_w) = ROTATION * u[0], SHEAR * u[1], jnp.exp(SCALE * u[2:4])
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rotation = jnp.array([[cos, -sin], [sin, cos]])  # (2, 2, B)
    stretch = jnp.array([[scale_h, jnp.zeros(b)], [shear, scale_w]])  # (2, 2, B)
    centre = jnp.array([(h - 1) / 2, (w - 1) / 2])
    offsets = jnp.indices((h, w), jnp.float32) - centre[:, None, None]
    read = jnp.einsum("ijb,jkb,khw->bihw", rotation, stretch, offsets)  # (B, 2, H, W)
    read = read + (SHIFT * u[4:6].T + centre[None])[:, :, None, None]
    one = lambda image, at: jax.scipy.ndimage.map_coordinates(image, [at[0], at[1]], order=1)  # noqa: E731
    return jax.vmap(one)(x[..., 0], read)[..., None]


if __name__ == "__main__":
    command.run(main, define)
