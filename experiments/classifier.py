"""Trains the digit classifier that `diffusion.evaluate` measures with, on the training split of mnist5k.

    python -m experiments.classifier                      writes runs/mnist_classifier.safetensors
    python -m experiments.classifier --out=diffusion/weights/mnist_classifier.safetensors --overwrite

Two and a half minutes of processor time, shared by the cores. The shipped weights (seed 0) read 99.0 % of the 500
held-out digits and all training digits.

The same seed gives the same file on the same machine; another processor may round differently. To ship a new file,
write it with the second command and put the SHA-256 it prints into `diffusion/evaluate.py`.
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

from diffusion import data, evaluate, optimize
from diffusion.io import files
from diffusion import train as training
from diffusion.models import classifier
from experiments import session

BATCH_SIZE = 128
# Largest changes to a training digit: radians, logarithm of each side's scale, slant, pixels.
ROTATION, SCALE, SHEAR, SHIFT = 0.26, 0.18, 0.3, 2.5
STEPS = 3000


def define(argv: list[str]) -> None:
    """Adds the flags; not when imported, so that other commands may be imported beside this one."""
    del argv
    flags.DEFINE_string("out", "runs/mnist_classifier.safetensors", "File to write.")
    flags.DEFINE_bool("overwrite", False, "Replace the file if there is one.")
    flags.DEFINE_integer("seed", 0, "Of the first weights, the order of the digits, their warps.", lower_bound=0)
    flags.DEFINE_integer("steps", STEPS, "Training steps.", lower_bound=1)
    flags.DEFINE_string("data_dir", None, "Folder of prepared data sets; default: TFDS's.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    given = flags.FLAGS
    out = Path(given.out)
    if out.is_dir():
        raise IsADirectoryError(f"--out={out} is a directory; pass the name of a file")
    if out.exists() and not given.overwrite:
        raise FileExistsError(f"{out} exists; pass --overwrite to replace it, or another --out")
    files.check_writable(out.parent)
    source = data.load("mnist5k", "train", data_dir=given.data_dir)
    held_out = data.load("mnist5k", "test", data_dir=given.data_dir)
    session.start()
    began = time.perf_counter()
    params = train(source, seed=given.seed, steps=given.steps)
    seconds = time.perf_counter() - began
    file = classifier.to_bytes(params)
    files.atomic_write(out, lambda f: f.write(file))
    for name, part in (("training", source), ("held-out", held_out)):
        logits, _ = evaluate.digit_features(part.images, params)
        print(f"accuracy on {len(part.labels):,} {name} digits: {evaluate.agreement(logits, part.labels):.2%}")
    digest = hashlib.sha256(file).hexdigest()
    shipped = "the shipped weights" if digest == evaluate.SHA256 else "not the shipped weights"
    print(f"{out}: {len(file):,} bytes, {seconds:.0f} s, SHA-256 {digest} ({shipped})")


def train(source: data.Source, *, seed: int = 0, steps: int = STEPS) -> Any:
    """Averaged parameters after `steps` steps on randomly warped digits of `source`."""
    key = jax.random.key(seed)
    params = jax.jit(classifier.init)(jax.random.fold_in(key, steps))  # the steps fold in 0 .. steps - 1
    state = training.init_state(params, optimizer(steps))
    for i in tqdm(range(steps), unit="step", disable=None):
        state = update(steps, key, state, data.batch(source, seed, i, BATCH_SIZE))
    return jax.tree.map(np.asarray, state.ema)


def optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW over `steps` steps."""
    return optimize.adamw(2e-3, steps, warmup=steps // 20, weight_decay=0.05, clip=1.0)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def update(steps: int, key: jax.Array, state: training.State, batch: dict[str, jax.Array]) -> training.State:
    """One of `steps` steps."""
    return training.make_step(loss, optimizer(steps), ema_decay=0.995)(key, state, batch)[0]


def loss(params: Any, key: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of a batch of digits, each warped at random."""
    logits, _ = classifier.apply(params, warp(key, batch["x"].astype(jnp.float32) / 255))
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), {}


def warp(key: jax.Array, x: jax.Array) -> jax.Array:
    """Rotates, scales, slants and shifts each picture x [B, H, W, 1] at random, between pixels bilinearly.

    The value at position p is read at c + R(angle) [[a, 0], [slant, b]] (p - c) + shift, c the centre; outside is 0.
    """
    b, h, w, _ = x.shape
    u = jax.random.uniform(key, (6, b), minval=-1.0)
    angle, slant, (scale_h, scale_w) = ROTATION * u[0], SHEAR * u[1], jnp.exp(SCALE * u[2:4])
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.array([[cos, -sin], [sin, cos]])  # (2, 2, B)
    stretch = jnp.array([[scale_h, jnp.zeros(b)], [slant, scale_w]])  # (2, 2, B)
    centre = jnp.array([(h - 1) / 2, (w - 1) / 2])
    offsets = jnp.indices((h, w), jnp.float32) - centre[:, None, None]
    read = jnp.einsum("ijb,jkb,khw->bihw", turn, stretch, offsets)  # (B, 2, H, W)
    read = read + (SHIFT * u[4:6].T + centre[None])[:, :, None, None]
    one = lambda picture, at: jax.scipy.ndimage.map_coordinates(picture, [at[0], at[1]], order=1)  # noqa: E731
    return jax.vmap(one)(x[..., 0], read)[..., None]


if __name__ == "__main__":
    session.run(main, define)
