"""The blog's transformer: its residual, its last token, Keras's initialisation, its published size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models import recomposed
from diffusion.models.blog import Blog, blog
from diffusion.patch import patchify, unpatchify
from diffusion.process import Geometric
from tests.models.networks import ready


@pytest.mark.slow
def test_blog_residual_is_taken_from_the_first_embedding():
    """With the last layer's output projection at zero the network returns its embedded input, however deep it is."""
    model = blog(Geometric(), patch_size=6, stride=2, heads=2, head_dim=4)
    params, xt, t, _ = ready(model, (2, 8, 8, 1))
    params["attention_2"]["out"] = jax.tree.map(jnp.zeros_like, params["attention_2"]["out"])
    wanted = patchify(xt, 6, 2) + params["positions"][None, :-1]
    np.testing.assert_allclose(model.apply(params, xt, t), wanted, atol=1e-5)


def test_blog_starts_like_keras():
    """Keras takes the fans of a kernel [324, 20, 100] to be 6,480 and 32,400, of [20, 100, 324] 2,000 and 6,480."""
    params = jax.jit(blog(Geometric()).init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), jnp.zeros(1))
    for name, fans in (("query", 38880), ("key", 38880), ("value", 38880), ("out", 8480)):
        np.testing.assert_allclose(params["attention_1"][name]["kernel"].std(), np.sqrt(2 / fans), rtol=0.01)
    np.testing.assert_allclose(params["positions"].std(), 0.05 / np.sqrt(3), rtol=0.05)


@pytest.mark.slow
def test_blog_sees_the_noise_level_through_its_last_token():
    model = blog(Geometric(0.99, 500), patch_size=6, stride=2, heads=2, head_dim=4)
    params, xt, t, _ = ready(model, (2, 8, 8, 1))
    assert params["positions"].shape == (5, 36)
    assert jnp.abs(model.apply(params, xt, t) - model.apply(params, xt, 1 - t)).max() > 1e-4


def test_recomposed_averages_the_tokens():
    model = blog(Geometric(), patch_size=6, stride=2, heads=2, head_dim=4)
    params, xt, t, _ = ready(model, (2, 8, 8, 1))
    tokens = model.apply(params, xt, t)
    np.testing.assert_array_equal(recomposed(model, 6, 2).apply(params, xt, t), unpatchify(tokens, (8, 8), 6, 2))


def test_it_has_the_published_size():
    xt = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    params = jax.eval_shape(blog(Geometric()).init, jax.random.key(0), xt, jnp.zeros(1))
    assert sum(p.size for p in jax.tree.leaves(params)) / 1e6 == pytest.approx(7.8, abs=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": None}, "path=None: the last token of this network is alpha.t. of a path; pass one"),
        ({"num_classes": 3}, "num_classes=3: Blog is unconditional, use it without labels"),
        ({"learned_variance": "channels"}, r"learned_variance='channels' is not one of \('none',\), which Blog has"),
    ],
)
def test_what_it_cannot_do_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        blog(**{"path": Geometric()} | fields)


def test_its_fields_are_those_of_the_dataclass():
    with pytest.raises(TypeError, match="width"):
        blog(Geometric(), width=3)
    assert (Blog().patch_size, Blog().stride, Blog.returns_tokens, Blog.conditional) == (18, 10, True, False)
