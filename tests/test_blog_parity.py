"""The blog's process, patches and sampler against numbers made with its own program (tests/data/blog_*.npz)."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.grids import uniform_grid
from diffusion.patch import patchify, unpatchify
from diffusion.process import Geometric, noise
from diffusion.sample import ddim, sample

FILES = sorted((Path(__file__).parent / "data").glob("blog_*.npz"))


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def vectors(request):
    with np.load(request.param) as file:
        values = {name: file[name] for name in file.files}
    config = json.loads(str(values.pop("config")))
    window = config["patch_size"] + 2 * config["over_patch"]
    return config, {"patch_size": window, "stride": config["patch_size"]}, values


def test_files_are_there():
    assert len(FILES) == 2


def test_patches_are_the_same_bits(vectors):
    _, geometry, v = vectors
    np.testing.assert_array_equal(patchify(v["x"][..., None], **geometry), v["patches"])


@pytest.mark.slow
def test_recomposition(vectors):
    config, geometry, v = vectors
    size = (config["size"],) * 2
    back = unpatchify(jnp.asarray(v["patches"]), size, **geometry)[..., 0]
    np.testing.assert_allclose(back, v["recomposed"], atol=1e-5 * np.abs(v["recomposed"]).max())


def test_noise_is_added_exactly(vectors):
    config, _, v = vectors
    with jax.enable_x64(True):
        path = Geometric(config["alpha"], config["n_max"])
        noised = noise(
            path, jnp.asarray(v["x"], float), jnp.asarray(v["steps_n"] / config["n_max"]), jnp.asarray(v["eps"])
        )
        np.testing.assert_allclose(noised, v["noised"], rtol=0, atol=1e-14 * np.abs(v["noised"]).max())


@pytest.mark.parametrize("x64", [False, True])
def test_a_whole_sampling_run(vectors, x64):
    """n' steps of alpha' = alpha^(n/n') are n' equal steps of t, and the step size is an overstep of DDIM."""
    config, geometry, v = vectors
    with jax.enable_x64(x64):
        path = Geometric(config["alpha"], config["n_max"])
        weights = jnp.asarray(v["W"], float)

        def denoise(xt, t, y):
            tokens = patchify(xt, **geometry)
            level = jnp.broadcast_to(path(t)[0][:, None, None], (*tokens.shape[:2], 1))
            return unpatchify(jnp.tanh(jnp.concatenate([tokens, level], -1) @ weights), xt.shape[1:-1], **geometry)

        run = partial(sample, prediction="eps", sampler=ddim(overstep=config["step_size"]))
        start = jnp.asarray(v["init"], float)[None, ..., None]
        x0 = run(jax.random.key(0), denoise, path, start, uniform_grid(config["steps"]))[0, ..., 0]
    tolerance = 1e-10 if x64 else 1e-5
    np.testing.assert_allclose(x0, v["sample"], rtol=0, atol=tolerance * np.abs(v["sample"]).max())
