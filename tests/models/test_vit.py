from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models import recomposed
from diffusion.models.blog import blog
from diffusion.models.vit import _rotate, rotary_angles, sincos_positions, vit
from diffusion.patch import patchify, unpatchify
from diffusion.process import Geometric

SMALL = {"patch_size": 4, "width": 32, "depth": 2, "heads": 2}
JIT = {
    **SMALL,
    "num_classes": 5,
    "bottleneck": 8,
    "norm": "rms",
    "mlp": "swiglu",
    "qk_norm": True,
    "positions": ("learned", "rotary"),
    "class_tokens": 3,
    "class_tokens_from": 1,
}


def ready(model, shape, classes=0):
    """Arguments of `model.apply`; parameters away from the zero initialisation, so that every path matters."""
    rng = np.random.default_rng(1)
    xt = rng.standard_normal(shape).astype(np.float32)
    t = np.linspace(0.1, 0.9, shape[0], dtype=np.float32)
    y = np.arange(shape[0]) % classes if classes else None

    def value(path, p):
        noise = rng.standard_normal(p.shape).astype(p.dtype)
        shifted = noise / np.sqrt(p.shape[0]) if p.ndim > 1 else (path[-1].key == "scale") + 0.1 * noise
        return jnp.asarray(shifted)

    return jax.tree_util.tree_map_with_path(value, jax.eval_shape(model.init, jax.random.key(0), xt, t, y)), xt, t, y


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (SMALL, (2, 8, 8, 1)),
        (SMALL, (2, 8, 12, 3)),
        ({**SMALL, "patch_size": (2, 4)}, (2, 6, 8, 2)),
        ({**SMALL, "patch_size": 6, "stride": 3}, (2, 12, 9, 1)),
        ({**SMALL}, (2, 16, 1)),
        ({**SMALL, "width": 36}, (2, 4, 4, 8, 1)),
        (JIT, (2, 8, 12, 3)),
    ],
)
def test_any_rank_shape_and_channel_count(options, shape):
    model = vit(**options)
    params, xt, t, y = ready(model, shape, options.get("num_classes", 0))
    out = jax.jit(model.apply)(params, xt, t, y)
    assert out.shape == shape and out.dtype == jnp.float32
    grads = jax.jit(jax.grad(lambda p: jnp.square(model.apply(p, xt, t, y)).sum()))(params)
    unused = [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(grads) if not (g != 0).any()]
    assert not unused


@pytest.mark.parametrize("options", [SMALL | {"num_classes": 5}, JIT])
def test_prediction_starts_at_zero(key, options):
    model = vit(**options)
    xt, t, y = jnp.ones((2, 8, 8, 1)), jnp.ones(2), jnp.zeros(2, int)
    np.testing.assert_array_equal(jax.jit(model.apply)(jax.jit(model.init)(key, xt, t, y), xt, t, y), 0)


@pytest.mark.parametrize("options", [SMALL | {"num_classes": 5}, JIT])
def test_examples_do_not_see_each_other(options):
    model = vit(**options)
    params, xt, t, y = ready(model, (3, 8, 8, 1), 5)
    apply = jax.jit(model.apply)
    alone = apply(params, xt[1:2], t[1:2], y[1:2])
    np.testing.assert_allclose(apply(params, xt, t, y)[1:2], alone, atol=1e-5)


@pytest.mark.parametrize("options", [SMALL | {"num_classes": 5}, JIT])
def test_no_label_leaks_into_the_null_class(options):
    """The null row is its own: changing every other class's parameters leaves the unconditional prediction alone."""
    model = vit(**options)
    params, xt, t, y = ready(model, (2, 8, 8, 1), 5)
    apply = jax.jit(model.apply)
    null = jnp.full_like(y, 5)
    before = apply(params, xt, t, null)
    np.testing.assert_array_equal(before, apply(params, xt, t, None))
    table = params["classes"]["embedding"]
    changed = params | {"classes": {"embedding": table.at[:5].add(1.0)}}
    np.testing.assert_array_equal(apply(changed, xt, t, null), before)
    assert jnp.abs(apply(changed, xt, t, y) - apply(params, xt, t, y)).max() > 1e-4
    assert table.shape[0] == 6


@pytest.mark.parametrize("field", ["bottleneck", "norm", "mlp", "qk_norm", "positions", "class_tokens", "stride"])
def test_every_field_changes_the_network(field):
    """Same seed, one field back at its default: other parameters, or the same ones put to another use."""
    options = JIT | {"stride": 2}
    results = []
    for chosen in (options, {k: v for k, v in options.items() if k != field}):
        model = vit(**chosen)
        params, xt, t, y = ready(model, (1, 8, 8, 1), 5)
        results.append((jax.tree.map(jnp.shape, params), jax.jit(model.apply)(params, xt, t, y)))
    assert jnp.abs(results[0][1] - results[1][1]).max() > 1e-4
    if field != "stride":
        assert results[0][0] != results[1][0]


@pytest.mark.parametrize(
    ("positions", "sees"), [((), False), (("sincos",), True), (("learned",), True), (("rotary",), True)]
)
def test_without_positions_patches_are_a_set_and_each_kind_orders_them(positions, sees):
    model = vit(**SMALL | {"positions": positions})
    params, xt, t, _ = ready(model, (1, 12, 8, 1))
    # Rows of patches 0, 1, 2 to 0, 2, 1: distances change, which is all that rotation knows.
    order = np.r_[0:4, 8:12, 4:8]
    apply = jax.jit(model.apply)
    moved = apply(params, xt[:, order], t)[:, np.argsort(order)]
    difference = jnp.abs(moved - apply(params, xt, t)).max()
    assert difference > 1e-4 if sees else difference < 1e-5


def test_rotary_attention_depends_on_distance_alone(key):
    angles = rotary_angles((6,), 8)
    q, k = (jax.random.normal(a, (1, 1, 1, 8)) for a in jax.random.split(key))

    def score(i, j):
        return (_rotate(q, angles[i : i + 1]) * _rotate(k, angles[j : j + 1])).sum()

    np.testing.assert_allclose(score(1, 3), score(3, 5), rtol=1e-4)
    assert abs(score(1, 3) - score(1, 4)) > 1e-4


def test_sincos_positions_are_distinct_and_rectangular():
    table = sincos_positions((3, 5), 16)
    assert table.shape == (15, 16)
    assert len(np.unique(table.round(5), axis=0)) == 15


def test_dropout_needs_a_key_and_uses_it(key):
    model = vit(**SMALL | {"dropout": 0.5})
    params, xt, t, _ = ready(model, (2, 8, 8, 1))
    apply = jax.jit(model.apply)
    a, b = (apply(params, xt, t, key=k) for k in jax.random.split(key))
    assert jnp.abs(a - b).max() > 1e-3
    np.testing.assert_array_equal(apply(params, xt, t), apply(params, xt, t))


def test_remat_and_jit_change_nothing():
    params, xt, t, y = ready(vit(**JIT), (2, 8, 8, 1), 5)
    plain, remat = vit(**JIT), vit(**JIT | {"remat": True})
    square = lambda model, p: jnp.square(model.apply(p, xt, t, y)).sum()  # noqa: E731
    wanted, got = (jax.jit(jax.grad(partial(square, m)))(params) for m in (plain, remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), wanted, got)
    np.testing.assert_allclose(jax.jit(plain.apply)(params, xt, t, y), plain.apply(params, xt, t, y), atol=1e-5)


def test_bfloat16_computes_close_to_float32_with_float32_parameters(key):
    params, xt, t, y = ready(vit(**JIT), (2, 8, 8, 1), 5)
    half = vit(**JIT | {"dtype": jnp.bfloat16})
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(jax.eval_shape(half.init, key, xt, t, y)))
    exact, rough = (jax.jit(model.apply)(params, xt, t, y) for model in (vit(**JIT), half))
    assert rough.dtype == jnp.float32
    error = jnp.abs(rough - exact).max() / jnp.abs(exact).max()
    assert 1e-5 < error < 0.1


def test_published_sizes():
    """JiT-B/16 has 131 M parameters (2511.13720, table 9), DiT-S/2 33 M (2212.09748, table 1), the blog's 7.8 M."""

    def millions(model, *shape):
        xt, t, y = jax.ShapeDtypeStruct((1, *shape), jnp.float32), jnp.zeros(1), jnp.zeros(1, int)
        params = jax.eval_shape(model.init, jax.random.key(0), xt, t, y)
        return sum(p.size for p in jax.tree.leaves(params)) / 1e6

    size = {"width": 768, "depth": 12, "heads": 12, "num_classes": 1000, "patch_size": 16}
    tokens = {"bottleneck": 128, "class_tokens": 32, "class_tokens_from": 4, "positions": ("sincos", "rotary")}
    jit = vit(**size, **tokens, norm="rms", mlp="swiglu", qk_norm=True)
    assert millions(jit, 256, 256, 3) == pytest.approx(131, abs=0.5)
    dit = vit(patch_size=2, width=384, depth=12, heads=6, num_classes=1000)
    assert millions(dit, 32, 32, 4) == pytest.approx(33, abs=0.5)
    assert millions(blog(Geometric()), 28, 28, 1) == pytest.approx(7.8, abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "width=32 is not divisible by heads=5"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"mlp": "relu"}, "mlp='relu'"),
        ({"positions": ("alibi",)}, "alibi"),
        ({"class_tokens": 2}, "num_classes"),
        ({"class_tokens": 2, "num_classes": 3, "class_tokens_from": 2}, "class_tokens_from=2"),
    ],
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        vit(**SMALL | options)


def test_a_patch_that_does_not_tile_is_refused(key):
    with pytest.raises(ValueError, match="does not tile spatial axis 0 of length 10"):
        vit(**SMALL).init(key, jnp.zeros((1, 10, 8, 1)), jnp.zeros(1))


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
