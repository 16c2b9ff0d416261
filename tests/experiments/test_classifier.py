"""The command that trains the digit classifier: its seed, its warps, its output file."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import data
from diffusion.models import classifier as network
from experiments import classifier


@pytest.mark.slow
def test_training_depends_only_on_its_seed():
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1), np.uint8)
    source = data.from_arrays(images, np.arange(20) % 10)
    files = [network.to_bytes(classifier.train(source, seed=seed, steps=2)) for seed in (0, 0, 1)]
    assert files[0] == files[1] != files[2]


def test_warps_are_the_identity_at_strength_0_and_a_rotation_at_90_degrees(key, monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 28, 28, 1)), jnp.float32)
    for name in ("ROTATION", "SCALE", "SHEAR", "SHIFT"):
        monkeypatch.setattr(classifier, name, 0.0)
    warp = lambda: jax.jit(lambda key, x: classifier.warp(key, x))(key, x)  # noqa: E731 - a new function is traced again
    np.testing.assert_allclose(warp(), x, atol=1e-4)
    monkeypatch.setattr(classifier, "ROTATION", np.pi / 2)
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, minval: jnp.ones(shape))
    np.testing.assert_allclose(warp()[..., 0], np.rot90(x[..., 0], 1, (2, 1)), atol=1e-4)


@pytest.mark.slow
def test_a_file_is_replaced_only_with_the_flag(tmp_path):
    path = tmp_path / "weights"
    path.write_text("mine")
    command = [sys.executable, "-m", "experiments.classifier", f"--out={path}", "--steps=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "--overwrite" in done.stderr and "Traceback" not in done.stderr
    assert path.read_text() == "mine"
