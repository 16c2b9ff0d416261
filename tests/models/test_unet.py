"""The U-Net: every field, shapes and gradients, published sizes, operations; its numbers are in test_layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import ledger
from diffusion.models.unet import ADM, _GroupNorm, _resized, sine_positions, sinusoids, unet
from diffusion.predict import WithVariance
from tests.models.unet_flops import unet_flops

TINY = {"num_channels": 8, "num_res_blocks": 1, "channel_mult": (1, 2), "num_heads": 2, "attention_resolutions": (4,)}

# Between them these take nearly every branch: (fields, shape of xt, channels of the prediction).
BRANCHES = {
    "patch diffusion": (
        {**TINY, "patch_size": 2, "channel_mult": (2.5, 1), "num_classes": 3, "learned_variance": "head"}
        | {"attention_resolutions": ()},
        (2, 8, 12, 4),
        4,
    ),
    "adm": (
        {**TINY, **ADM, "num_channels": 7, "num_heads": 1, "num_classes": 3, "resblock_updown": True}
        | {"learned_variance": "channels", "use_scale_shift_norm": False, "channel_mult": (1, 1.5)}
        | {"attention_resolutions": ()},
        (2, 4, 4, 1),
        1,
    ),
}


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile()


def shapes(fields, shape):
    """Parameters, as shapes by dotted name."""
    xt, t = jax.ShapeDtypeStruct(shape, jnp.float32), jnp.zeros(shape[0])
    y = jnp.zeros(shape[0], int) if fields.get("num_classes") else None
    tree = jax.eval_shape(unet(**fields).init, jax.random.key(0), xt, t, y)
    return {".".join(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def ready(fields, shape):
    """Random parameters, none at its initial zero, and inputs."""
    rng = np.random.default_rng(0)
    xt, t = rng.normal(size=shape).astype(np.float32), np.linspace(0.1, 0.9, shape[0]).astype(np.float32)
    y = np.arange(shape[0]) % fields["num_classes"] if fields.get("num_classes") else None
    like = jax.eval_shape(unet(**fields).init, jax.random.key(0), xt, t, y)

    def value(leaf):
        fan = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 4
        return jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32) / np.float32(np.sqrt(fan)))

    return jax.tree.map(value, like), jnp.asarray(xt), jnp.asarray(t), None if y is None else jnp.asarray(y)


@pytest.fixture(scope="module")
def patch_unet():
    """A class-conditional network with a variance head, compiled once."""
    fields, shape, _ = BRANCHES["patch diffusion"]
    params, xt, t, y = ready(fields, shape)
    return compiled(unet(**fields).apply, params, xt, t, y), params, xt, t, y


@pytest.mark.slow
@pytest.mark.parametrize("name", BRANCHES)
def test_every_branch_answers_in_the_images_shape_and_learns_with_every_parameter(name):
    fields, shape, channels = BRANCHES[name]
    params, *inputs = ready(fields, shape)

    def gradients(params, down):
        out, back = jax.vjp(lambda p: unet(**fields).apply(p, *inputs), params)
        return out, back(down)[0]

    like = jax.eval_shape(unet(**fields).apply, params, *inputs)
    program = compiled(gradients, params, like)
    run = lambda *args: jax.device_get(program(*args))  # noqa: E731  In NumPy nothing compiles for each shape.
    rng = np.random.default_rng(1)
    ones = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), like)
    out, grads = run(params, ones)
    pred = out.pred if isinstance(out, WithVariance) else out
    assert pred.shape == (*shape[:-1], channels) and pred.dtype == jnp.float32
    flat = {jax.tree_util.keystr(k): g for k, g in jax.tree_util.tree_leaves_with_path(grads)}
    assert all(np.isfinite(g).all() for g in flat.values())
    assert not [name for name, g in flat.items() if not (g != 0).any()]
    if fields.get("learned_variance") != "head":
        return
    assert ((out.v > 0) & (out.v < 1)).all() and out.v.shape == pred.shape
    # The variance is read off features that it does not shape; only the clock serves both.
    zero = np.zeros_like(ones.pred)
    _, of_v = run(params, WithVariance(zero, ones.v))
    _, of_pred = run(params, WithVariance(ones.pred, zero))
    own = {name for name in params if name.startswith("variance")}
    assert {name for name in params if _moves(of_v[name])} == own | {"time_in", "time_out"}
    assert {name for name in params if not _moves(of_pred[name])} == own


@pytest.mark.slow
def test_branches_of_both_mix():
    """What the two above leave out, traced: one patch size per axis, a condition among the channels, odd sides."""
    fields = {**TINY, "patch_size": (2, 1), "channel_mult": (1, 0.5), "num_head_channels": 4, "out_channels": 1}
    fields |= {"use_scale_shift_norm": False, "resblock_updown": True, "class_in": "time", "num_classes": 2}
    model = unet(**fields)
    params, *inputs = ready(fields, (2, 14, 5, 2))
    out, grads = jax.eval_shape(
        jax.value_and_grad(lambda p: (lambda out: (out.sum(), out))(model.apply(p, *inputs)), has_aux=True), params
    )
    assert out[1].shape == (2, 14, 5, 1)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


def _moves(tree):
    return any(bool((leaf != 0).any()) for leaf in jax.tree.leaves(tree))


def test_prediction_starts_at_zero():
    fields = {**TINY, "channel_mult": (1,), "patch_size": 2}
    xt, t = jnp.ones((1, 8, 8, 1)), jnp.ones(1)
    model = unet(**fields)
    run = compiled(lambda key: model.apply(model.init(key, xt, t), xt, t), jax.random.key(0))
    np.testing.assert_array_equal(run(jax.random.key(0)), 0)


@pytest.mark.slow
def test_examples_do_not_see_each_other(patch_unet):
    apply, params, xt, t, y = patch_unet
    other = apply(params, xt.at[1].multiply(2), t.at[1].set(0.3), y.at[1].set(2))
    before = apply(params, xt, t, y)
    np.testing.assert_array_equal(other.pred[0], before.pred[0])
    np.testing.assert_array_equal(other.v[0], before.v[0])
    assert jnp.abs(other.pred[1] - before.pred[1]).max() > 1e-3


@pytest.mark.slow
def test_the_null_class_is_a_row_of_its_own_and_the_default(patch_unet):
    apply, params, xt, t, y = patch_unet
    null = jnp.full_like(y, 3)
    table = params["classes"]["embedding"]
    assert table.shape[0] == 4
    changed = params | {"classes": {"embedding": table.at[:3].add(1.0)}}
    before = apply(params, xt, t, null).pred
    np.testing.assert_array_equal(apply(changed, xt, t, null).pred, before)
    assert jnp.abs(apply(changed, xt, t, y).pred - apply(params, xt, t, y).pred).max() > 1e-3
    fields = BRANCHES["patch diffusion"][0]
    unlabelled = compiled(lambda p, xt, t: unet(**fields).apply(p, xt, t).pred, params, xt, t)
    np.testing.assert_allclose(unlabelled(params, xt, t), before, atol=1e-5)


def test_the_gate_scales_what_a_block_adds():
    """With its gates shut the network is what is left without blocks, whatever the class was."""
    fields = {**TINY, "channel_mult": (1,), "patch_size": 2, "num_classes": 2}
    params, xt, t, y = ready(fields, (1, 4, 4, 1))
    apply = compiled(unet(**fields).apply, params, xt, t, y)
    shut = jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.full_like(p, -100) if path[-2:] == _keys("gate", "bias") else p, params
    )
    idle = jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.zeros_like(p) if path[-2].key == "conv_out" else p, params
    )
    np.testing.assert_allclose(apply(shut, xt, t, y), apply(idle, xt, t, y), atol=1e-5)
    assert jnp.abs(apply(shut, xt, t, y) - apply(params, xt, t, y)).max() > 1e-3


def _keys(*names):
    return tuple(map(jax.tree_util.DictKey, names))


@pytest.mark.slow
def test_half_precision_computes_close_to_float32_with_float32_parameters():
    fields = {**TINY, "channel_mult": (1,), "patch_size": 2, "num_classes": 2}
    params, *inputs = ready(fields, (1, 4, 8, 1))
    exact = compiled(unet(**fields).apply, params, *inputs)(params, *inputs)
    for dtype in (jnp.bfloat16, jnp.float16):
        half = unet(**fields, dtype=dtype)
        assert {p.dtype for p in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0), *inputs))} == {
            exact.dtype
        }
        rough = compiled(half.apply, params, *inputs)(params, *inputs)
        assert rough.dtype == jnp.float32
        assert 1e-5 < jnp.abs(rough - exact).max() / jnp.abs(exact).max() < 0.1


def test_remat_marks_the_blocks():
    fields = {**TINY, "channel_mult": (1,), "patch_size": 4, "num_classes": 2}
    params, *inputs = ready(fields, (1, 8, 8, 1))
    programs = [str(jax.make_jaxpr(unet(**fields, remat=remat).apply)(params, *inputs)) for remat in ("none", "all")]
    assert "remat" in programs[1] and "remat" not in programs[0]


@pytest.mark.slow
def test_remat_computes_the_same_gradients_again():
    fields = {**TINY, "channel_mult": (1,), "patch_size": 4, "num_classes": 2}
    params, *inputs = ready(fields, (1, 8, 8, 1))
    part = {name: params[name] for name in ("input_0", "input_1", "middle_1", "time_in")}
    grads = []
    for remat in ("none", "all"):
        model = unet(**fields, remat=remat)
        grad = jax.grad(lambda part, model=model: jnp.square(model.apply(params | part, *inputs)).sum())
        grads.append(compiled(grad, part)(part))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *grads)


@pytest.mark.slow
def test_dropout_needs_a_key_and_uses_it():
    fields = {**TINY, "channel_mult": (1,), "patch_size": 4, "dropout": 0.5}
    params, xt, t, _ = ready(fields, (1, 8, 8, 1))
    model = unet(**fields)
    dropping = compiled(lambda key: model.apply(params, xt, t, key=key), jax.random.key(0))
    a, b = (dropping(key) for key in jax.random.split(jax.random.key(0)))
    assert jnp.abs(a - b).max() > 1e-3
    without = unet(**fields | {"dropout": 0.0}).apply
    assert str(jax.make_jaxpr(model.apply)(params, xt, t)) == str(jax.make_jaxpr(without)(params, xt, t))


@pytest.mark.parametrize(("channels", "groups"), [(37, 1), (48, 24), (64, 32)])
def test_group_norm_has_as_many_groups_up_to_32_as_divide_the_channels(channels, groups):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2, 4, 3, channels)) * 3 + 1).astype(np.float32)
    params = {name: rng.normal(size=channels).astype(np.float32) for name in ("scale", "bias")}

    def norms(params, x):
        plain = _GroupNorm(jnp.float32, affine=False, epsilon=1e-3).apply({}, 0.01 * x)
        return _GroupNorm(jnp.float32).apply({"params": params}, x), plain

    affine, plain = compiled(norms, params, x)(params, x)
    nchw, weights = torch.tensor(x.transpose(0, 3, 1, 2)), map(torch.tensor, params.values())
    wanted = torch.nn.functional.group_norm(nchw, groups, *weights, eps=1e-5)
    np.testing.assert_allclose(affine, wanted.numpy().transpose(0, 2, 3, 1), atol=2e-5)
    wanted = torch.nn.functional.group_norm(0.01 * nchw, groups, eps=1e-3)
    np.testing.assert_allclose(plain, wanted.numpy().transpose(0, 2, 3, 1), atol=2e-5)


def test_group_norm_of_a_group_has_mean_0_and_variance_1():
    x = (3 * np.random.default_rng(0).normal(size=(2, 4, 3, 48)) + 1).astype(np.float32)
    groups = np.asarray(_GroupNorm(jnp.float32, affine=False).apply({}, x)).reshape(2, 12, 24, 2)
    np.testing.assert_allclose(groups.mean((1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(groups.std((1, 3)), 1, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (7, 5), (2, 1)])
def test_sizes_halve_upwards_and_come_back(size):
    x = np.random.default_rng(0).normal(size=(1, *size, 2)).astype(np.float32)
    half = tuple(-(-n // 2) for n in size)
    small = _resized(x, half)
    assert small.shape[1:3] == half and _resized(small, size).shape == x.shape
    for i, j in np.ndindex(half):
        window = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))  # cut off at an odd side
        np.testing.assert_allclose(small[:, i, j], window, atol=1e-6)
    np.testing.assert_array_equal(_resized(small, size)[0, -1, -1], small[0, -1, -1])


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {**ADM, "resblock_updown": True}])
@pytest.mark.parametrize("size", [(7, 5), (1, 9)])
def test_odd_sides_pass_through_three_levels(fields, size):
    model = unet(**{**TINY, **fields, "channel_mult": (1, 2, 1)})
    xt, t = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    out = jax.eval_shape(lambda key, xt, t: model.apply(model.init(key, xt, t), xt, t), jax.random.key(0), xt, t)
    assert out.shape == xt.shape


def test_widths_are_rounded_down_in_any_order_and_change_where_the_field_says():
    fields = {**TINY, "num_channels": 10, "channel_mult": (1.75, 0.5, 1.2), "attention_resolutions": ()}
    there = shapes(fields, (1, 8, 8, 1))
    assert there["input_0.kernel"] == (3, 3, 1, 17)
    assert there["input_2_down.kernel"] == (3, 3, 17, 5) and there["input_4_down.kernel"] == (3, 3, 5, 12)
    assert there["output_1_up.kernel"] == (3, 3, 12, 5) and there["output_3_up.kernel"] == (3, 3, 5, 17)
    # Every block of the way up then sees its own width twice.
    assert [there[f"output_{i}.conv_in.kernel"][2] for i in range(6)] == [24, 24, 10, 10, 34, 34]
    assert there["time_out.kernel"] == (40, 12)
    adm = shapes(fields | ADM, (1, 8, 8, 1))
    assert adm["input_2_down.kernel"] == (3, 3, 17, 17) and adm["output_1_up.kernel"] == (3, 3, 12, 12)
    assert [adm[f"output_{i}.conv_in.kernel"][2] for i in range(6)] == [24, 17, 17, 22, 22, 34]
    assert adm["time_out.kernel"] == (40, 40)


def test_levels_attend_by_the_shorter_side_of_their_grid_of_patches():
    fields = {**TINY, "patch_size": 2, "channel_mult": (1, 1, 1), "attention_resolutions": (8, 2)}
    attending = {name.split(".")[0] for name in shapes(fields, (1, 16, 32, 1)) if "_attention" in name}
    assert attending == {f"{side}_attention" for side in ("input_1", "input_5", "output_0", "output_1")} | {
        "output_4_attention",
        "output_5_attention",
    }


def test_heads_are_counted_or_have_a_width():
    fields = {**TINY, "channel_mult": (1, 3), "attention_resolutions": (4, 8)}
    for chosen, wanted in (({"num_heads": 2}, [(2, 4), (2, 12)]), ({"num_head_channels": 8}, [(1, 8), (3, 8)])):
        there = shapes(fields | chosen, (1, 8, 8, 1))
        assert [there[f"input_{i}_attention.qkv.kernel"][2:] for i in (1, 3)] == wanted


def test_positions_are_distinct_rectangular_and_span_64():
    table = sine_positions((3, 5), 17)
    assert table.shape == (3, 5, 17)
    assert len(np.unique(table.reshape(15, 17).round(5), axis=0)) == 15
    np.testing.assert_allclose(table[0, :, 0], np.sin(64 / 5 * np.arange(5)), atol=1e-5)  # frequency 1, along a row
    np.testing.assert_allclose(table[:, 0, 9], np.sin(64 / 3 * np.arange(3)), atol=1e-5)
    np.testing.assert_array_equal(table[0, :, 9:], np.broadcast_to(table[0, :1, 9:], (5, 8)))


@pytest.mark.parametrize("kind", ["ddpm", "adm"])
def test_sinusoids_turn_at_their_frequencies_and_leave_an_odd_place_empty(kind):
    clock = jnp.array([0.0, 3.0, 999.0])
    waves = np.asarray(sinusoids(kind, clock, 9))
    assert waves.shape == (3, 9)
    lowest = {"ddpm": 1e-4, "adm": 1e-3}[kind]
    sines, cosines = (waves[:, :4], waves[:, 4:8])[:: 1 if kind == "ddpm" else -1]
    np.testing.assert_allclose(sines[:, [0, 3]], np.sin(np.outer(clock, [1, lowest])), atol=2e-4)
    np.testing.assert_allclose(sines**2 + cosines**2, 1, atol=1e-5)
    np.testing.assert_array_equal(waves[:, 8], 0)


@pytest.mark.slow
def test_published_sizes():
    """ADM has 554 M parameters at 256 x 256 and 296 M at 64 x 64 (2105.05233, table 11)."""

    def millions(size, **fields):
        published = {"num_channels": 256, "num_head_channels": 64, "num_classes": 1000, "learned_variance": "channels"}
        there = shapes({**ADM, **published, **fields, "resblock_updown": True}, (1, size, size, 3))
        return sum(int(np.prod(shape)) for shape in there.values()) / 1e6

    assert millions(256, channel_mult=(1, 1, 2, 2, 4, 4), attention_resolutions=(32, 16, 8)) == pytest.approx(
        554, abs=0.5
    )
    assert millions(
        64, channel_mult=(1, 2, 3, 4), num_res_blocks=3, num_channels=192, attention_resolutions=(32, 16, 8)
    ) == pytest.approx(296, abs=0.5)


@pytest.mark.parametrize(
    ("size", "channels", "fields"),
    [
        ((32, 32), 3, {"num_channels": 64, "channel_mult": (1, 2), "num_classes": 10, "learned_variance": "head"}),
        ((28, 20), 1, {"patch_size": 2, "channel_mult": (1, 1.5, 0.5), "num_res_blocks": 1, "resblock_updown": True}),
        (
            (24, 16),
            3,
            {**ADM, "num_channels": 64, "channel_mult": (1, 2), "num_classes": 10, "use_scale_shift_norm": False}
            | {"learned_variance": "channels", "attention_resolutions": (8,), "num_res_blocks": 1},
        ),
    ],
)
def test_operations_are_those_that_xla_counts(size, channels, fields):
    model, number = unet(**fields), jax.ShapeDtypeStruct((1,), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.int32) if "num_classes" in fields else None
    inputs = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32), number, label
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    counted = jax.jit(model.apply).lower(params, *inputs).cost_analysis()["flops"]
    ours = ledger.flops(model.apply, params, *inputs)
    assert ours == unet_flops(size, channels, **fields) and 0.98 < ours / counted < 1


def test_patches_cost_what_their_grid_costs():
    """The paper's claim: 256 x 256 in patches of 4 costs what 64 x 64 costs in pixels."""
    fields = {"num_channels": 256, "channel_mult": (1, 2, 2, 2), "num_res_blocks": 3, "num_head_channels": 64}
    patched, pixels = (unet_flops((n, n), 3, patch_size=p, **fields) for n, p in ((256, 4), (64, 1)))
    assert 1 < patched / pixels < 1.01
    with pytest.raises(TypeError, match="colour"):
        unet_flops((8, 8), 3, colour=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learned_variance": "tail"}, "learned_variance='tail' is not one of"),
        ({"dtype": "float8"}, "dtype='float8' is not one of .'float32', 'bfloat16', 'float16'."),
        ({"sinusoids": "vit"}, "sinusoids='vit'"),
        ({"class_in": "space"}, "class_in='space'"),
        ({"film_norm": "layer"}, "film_norm='layer'"),
        ({"widen_in": "skip"}, "widen_in='skip'"),
        ({"downsample": "valid"}, "downsample='valid'"),
        ({"num_res_blocks": 0}, "num_res_blocks=0"),
        ({"channel_mult": ()}, r"channel_mult=\(\) with num_channels=8"),
        ({"channel_mult": (1, 0.1)}, r"channel_mult=\(1, 0.1\) with num_channels=8 leaves a level no width"),
    ],
)
def test_impossible_networks_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        unet(**TINY | fields)


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({"patch_size": 3}, (1, 9, 8, 1), "patch_size=3 does not tile spatial axis 1 of length 8"),
        ({}, (1, 8, 1), r"images \[B, H, W, C\], got shape \(1, 8, 1\)"),
        ({"num_heads": 3}, (1, 8, 8, 1), "num_heads=3 does not divide the width 16"),
        ({"num_head_channels": 12}, (1, 8, 8, 1), "num_head_channels=12 does not divide the width 16"),
        ({"num_head_channels": 32}, (1, 8, 8, 1), "num_head_channels=32 does not divide the width 16"),
    ],
)
def test_images_and_heads_that_do_not_fit_are_refused(fields, shape, message):
    with pytest.raises(ValueError, match=message):
        shapes(TINY | fields, shape)
