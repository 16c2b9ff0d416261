"""The vision transformer: every field, shapes and gradients, published sizes; its numbers are in test_layouts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import layers, ledger
from diffusion.models.base import Task
from diffusion.models.positions import rotary_angles, rotate, sincos_positions
from diffusion.models.vit import ViT, vit
from tests.models.networks import ready
from tests.models.vit_flops import vit_flops

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (SMALL, (2, 8, 12, 3)),
        ({**SMALL, "patch_size": (2, 4)}, (2, 6, 8, 2)),
        ({**SMALL, "patch_size": 6, "stride": 3}, (2, 12, 9, 1)),
        (SMALL, (2, 16, 1)),
        ({**SMALL, "width": 36}, (2, 4, 4, 8, 1)),
        pytest.param(JIT, (2, 8, 12, 3), marks=pytest.mark.slow),
    ],
)
def test_any_rank_shape_and_channel_count(options, shape):
    model = vit(**options)
    params, xt, t, y = ready(model, shape, options.get("num_classes", 0))

    def loss(params):
        out = model.apply(params, xt, t, y)
        return jnp.square(out).sum(), out

    # In NumPy the comparisons with zero are not compiled for each shape.
    (_, out), grads = jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
    assert out.shape == shape and out.dtype == jnp.float32
    unused = [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(grads) if not (g != 0).any()]
    assert not unused


@pytest.mark.parametrize("options", [SMALL | {"num_classes": 5}, JIT])
def test_prediction_starts_at_zero(key, options):
    model = vit(**options)
    xt, t, y = jnp.ones((2, 8, 8, 1)), jnp.ones(2), jnp.zeros(2, int)
    np.testing.assert_array_equal(jax.jit(lambda key: model.apply(model.init(key, xt, t, y), xt, t, y))(key), 0)


@pytest.fixture(scope="module", params=[SMALL | {"num_classes": 5}, JIT], ids=["dit", "jit"])
def network(request):
    """A class-conditional network, compiled once, its parameters and inputs."""
    model = vit(**request.param)
    return model, jax.jit(model.apply), *ready(model, (2, 8, 8, 1), 5)


def test_examples_do_not_see_each_other(network):
    _, apply, params, xt, t, y = network
    before = apply(params, xt, t, y)
    other = apply(params, np.stack([xt[0], -xt[1]]), np.float32([t[0], 0.3]), np.array([y[0], 4]))
    np.testing.assert_array_equal(other[0], before[0])
    assert jnp.abs(other[1] - before[1]).max() > 1e-3


@pytest.mark.slow
def test_no_label_leaks_into_the_null_class(network):
    """The null row is its own: changing every other class's parameters leaves the unconditional prediction alone."""
    model, apply, params, xt, t, y = network
    null = jnp.full_like(y, 5)
    before = apply(params, xt, t, null)
    np.testing.assert_allclose(before, model.apply(params, xt, t, None), atol=1e-5)
    table = params["classes"]["embedding"]
    changed = params | {"classes": {"embedding": table.at[:5].add(1.0)}}
    np.testing.assert_array_equal(apply(changed, xt, t, null), before)
    assert jnp.abs(apply(changed, xt, t, y) - apply(params, xt, t, y)).max() > 1e-4
    assert table.shape[0] == 6


@pytest.mark.slow
def test_every_field_changes_the_network():
    """One field back at its default: other parameters, or the same ones put to another use."""
    options = JIT | {"stride": 2}

    def network(chosen):
        model = vit(**chosen)
        params, xt, t, y = ready(model, (1, 8, 8, 1), 5)
        return jax.tree.map(jnp.shape, params), partial(model.apply, params, xt, t, y)

    shapes, whole = network(options)
    for field in ("bottleneck", "norm", "mlp", "qk_norm", "positions", "class_tokens"):
        assert network({k: v for k, v in options.items() if k != field})[0] != shapes, field
    assert shapes["positions"] == (9, 32) and network(JIT)[0]["positions"] == (4, 32)
    assert jax.eval_shape(whole).shape == (1, 8, 8, 1)


@pytest.mark.slow
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
        return (rotate(q, angles[i : i + 1]) * rotate(k, angles[j : j + 1])).sum()

    np.testing.assert_allclose(score(1, 3), score(3, 5), rtol=1e-4)
    assert abs(score(1, 3) - score(1, 4)) > 1e-4


def test_sincos_positions_are_distinct_and_rectangular():
    table = sincos_positions((3, 5), 16)
    assert table.shape == (15, 16)
    assert len(np.unique(table.round(5), axis=0)) == 15


@pytest.mark.slow
def test_dropout_of_the_middle_blocks_leaves_the_others_alone(key):
    """Blocks depth // 4 to 3 (depth // 4) - 1, as in JiT: 1 and 2 of 7."""
    model = vit(**SMALL | {"dropout": 0.5, "dropout_blocks": "middle", "depth": 7})
    params, xt, t, _ = ready(model, (2, 8, 8, 1))
    plain, dropped = jax.jit(model.apply), jax.jit(lambda params: model.apply(params, xt, t, key=key))
    for block in range(7):
        # Without gates a block is the identity, dropped or not.
        closed = {
            name: jax.tree.map(jnp.zeros_like, p) if name.startswith("block_") and name != f"block_{block}" else p
            for name, p in params.items()
        }
        change = float(jnp.abs(dropped(closed) - plain(closed, xt, t)).max())
        assert (change > 1e-2) == (block in (1, 2)) and (change < 1e-5) != (block in (1, 2)), f"block {block}: {change}"


@pytest.mark.slow
def test_dropout_of_attention_keeps_probabilities_on_average(key):
    """Without a key it computes the network without dropout; with keys, on average what that one computes."""
    options = SMALL | {"depth": 1}
    model, plain = vit(**options | {"attention_dropout": 0.3}), vit(**options)
    args = ready(plain, (2, 8, 8, 1))[:3]
    np.testing.assert_array_equal(model.apply(*args), plain.apply(*args))
    nearly = vit(**options | {"attention_dropout": 1e-6})  # the path with a key, and next to nothing dropped
    np.testing.assert_allclose(nearly.apply(*args, key=key), plain.apply(*args), atol=1e-5)
    made = jax.jit(jax.vmap(lambda k: attended(model, *args, k)))(jax.random.split(key, 500))
    off = made - attended(plain, *args, None)[None]
    assert float(jnp.abs(off.mean(0)).max()) < 0.2 * float(off.std(0).max())


def attended(model, params, xt, t, key):
    """The prediction with an MLP that is shut: linear in what attention returns, but for the norm of the head."""
    block = params["block_0"]
    kernel, bias = (block["gates"][name] for name in ("kernel", "bias"))
    width = bias.shape[0] // 6
    shut = {"kernel": kernel.at[:, -width:].set(0), "bias": bias.at[-width:].set(0)}
    # A norm divides by a size that hardly changes if the rest of the sum is large.
    embed = {name: 30 * p for name, p in params["embed"].items()}
    params = params | {"block_0": block | {"gates": shut}, "embed": embed}
    return model.apply(params, xt, t, key=key)


def test_dropout_needs_a_key_and_uses_it(key):
    model = vit(**SMALL | {"dropout": 0.5})
    params, xt, t, _ = ready(model, (2, 8, 8, 1))
    apply = jax.jit(model.apply)
    a, b = (apply(params, xt, t, key=k) for k in jax.random.split(key))
    assert jnp.abs(a - b).max() > 1e-3
    without = vit(**SMALL).apply
    assert str(jax.make_jaxpr(model.apply)(params, xt, t)) == str(jax.make_jaxpr(without)(params, xt, t))


def test_what_gpus_compute_is_the_same_network(monkeypatch):
    """Matrix products and layouts are chosen by platform: here both choices run on this one."""
    params, xt, t, y = ready(vit(**JIT), (2, 8, 8, 1), 5)
    square = lambda p: jnp.square(vit(**JIT).apply(p, xt, t, y)).sum()  # noqa: E731
    tangent = lambda p: jax.jvp(square, (p,), (p,))  # noqa: E731
    of = lambda f, p: jax.jit(f)(p)  # noqa: E731
    wanted, taken = (of(jax.value_and_grad(square), params), of(tangent, params)), []
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, cuda: taken.append(cuda) or cuda(*args))
    got = of(jax.value_and_grad(square), params), of(tangent, params)
    # In each block six layouts of values and six of their tangents, and a product.
    assert len(taken) >= 13 * JIT["depth"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), wanted, got)


def test_a_network_can_be_exported_for_gpus():
    params, xt, t, y = ready(vit(**JIT), (2, 8, 8, 1), 5)
    model = vit(**JIT)
    exported = jax.export.export(jax.jit(model.apply), platforms=("cpu", "cuda"))(params, xt, t, y)
    np.testing.assert_allclose(exported.call(params, xt, t, y), model.apply(params, xt, t, y), atol=1e-5)
    # Training keeps layouts, which an exported program cannot.
    square = lambda p: jnp.square(model.apply(p, xt, t, y)).sum()  # noqa: E731
    assert "LayoutConstraint" in jax.jit(jax.grad(square)).trace(params).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.slow
def test_remat_and_jit_change_nothing():
    params, xt, t, y = ready(vit(**JIT), (2, 8, 8, 1), 5)
    plain = vit(**JIT)
    square = lambda model, p: jnp.square(model.apply(p, xt, t, y)).sum()  # noqa: E731
    wanted = jax.jit(jax.grad(partial(square, plain)))(params)
    for remat in ("dots", "all"):
        got = jax.jit(jax.grad(partial(square, vit(**JIT | {"remat": remat}))))(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), wanted, got)
    np.testing.assert_allclose(jax.jit(plain.apply)(params, xt, t, y), plain.apply(params, xt, t, y), atol=1e-5)


SCANNED = {
    # Loops over the block 0, over 1 and 2, and over 3 and 4: quarters of the dropout, class tokens from the fourth on.
    "tokens": JIT | {"depth": 5, "class_tokens_from": 3, "dropout": 0.3, "dropout_blocks": "middle"},
    "velocity": SMALL | {"depth": 3, "times": 2, "scalars": 1, "velocity": True, "velocity_depth": 2},
}
# What costs time here is the compiler.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.mark.parametrize("case", ["tokens", pytest.param("velocity", marks=pytest.mark.slow)])
def test_scanned_blocks_are_the_same_network(case):
    """Prediction and gradient, with the parameters of one network in the form of the other."""
    models = [vit(**SCANNED[case], scan=scan) for scan in (False, True)]
    rng, xt, t, y = np.random.default_rng(0), np.ones((2, 8, 8, 1), np.float32), np.float32([0.1, 0.9]), np.arange(2)
    if case == "velocity":
        t, y = np.stack([t, t / 2], 1), (None, np.float32([[0.2], [0.7]]))
    shapes = [jax.eval_shape(model.init, jax.random.key(0), xt, t, y) for model in models]
    names = {"tokens": {"blocks_0_5"}, "velocity": {"blocks_0_3", "velocity_blocks_0_2"}}
    assert {name for name in shapes[1] if "block" in name} == names[case]
    plain = jax.tree.map(lambda p: np.float32(0.3) * rng.standard_normal(p.shape, np.float32), shapes[0])
    params = [plain, layers.stacked(plain, shapes[1])]
    assert jax.tree.map(np.shape, params[1]) == jax.tree.map(np.shape, shapes[1])

    def gradient(model, params):
        square = lambda p: sum(jnp.square(out).sum() for out in jax.tree.leaves(model.apply(p, xt, t, y)))  # noqa: E731
        found = jax.jit(jax.value_and_grad(square)).lower(params).compile(compiler_options=QUICK)(params)
        return found[0], layers.unstacked(found[1])

    (wanted, slopes), (got, others) = map(gradient, models, params)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(slopes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a / scale, b / scale, atol=1e-5), others, slopes)


def test_scanned_blocks_begin_as_the_others_do(key):
    inputs = jnp.ones((1, 8, 8, 1)), jnp.ones(1)
    plain, scanned = (vit(**SMALL, scan=scan).init(key, *inputs) for scan in (False, True))
    jax.tree.map(np.testing.assert_array_equal, layers.unstacked(scanned), plain)


@pytest.mark.slow
def test_dropout_of_scanned_blocks_differs_between_them(key):
    """Blocks of equal parameters, and an input that is nearly the same for each: masks differ all the same."""
    fields = SMALL | {"depth": 4, "dropout": 0.5}
    plain, scanned = vit(**fields), vit(**fields, scan=True)
    params, xt, t, _ = ready(plain, (2, 8, 8, 1))
    names = jax.eval_shape(scanned.init, key, xt, t)
    apply = jax.jit(scanned.apply)

    def change(block, key):
        """What dropout changes if all blocks but one are the identity."""
        only = {
            name: params["block_0"] if name == f"block_{block}"
            else jax.tree.map(jnp.zeros_like, p) if name.startswith("block_") else p
            for name, p in params.items()
        }  # fmt: skip
        return apply(layers.stacked(only, names), xt, t, key=key)

    first, second, again = change(0, key), change(3, key), change(0, key)
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - second).max() > 1e-3
    assert jnp.abs(first - change(0, jax.random.split(key)[0])).max() > 1e-3


@pytest.mark.parametrize("remat", ["none", "dots", "all"])
def test_products_that_are_computed_again_are_those_that_remat_says(remat):
    """In the gradient of a block: of scores alone (q k), or of all, gates and the head's products apart."""
    counts = []
    for fields in ({"depth": 1}, {"depth": 3, "scan": True, "remat": remat}):
        model = vit(**SMALL | fields)
        params, xt, t, _ = ready(vit(**SMALL | {"depth": fields["depth"]}), (2, 8, 8, 1))
        params = layers.stacked(params, ["blocks_0_3"]) if "scan" in fields else params
        program = jax.make_jaxpr(jax.grad(lambda p, m=model, xt=xt, t=t: m.apply(p, xt, t).sum()))(params)
        counts.append(str(program).count("dot_general["))
    again = counts[1] - counts[0]
    assert again == {"none": 0, "dots": 1}.get(remat, again) and (again > 5) == (remat == "all"), counts


def test_parameters_of_the_other_form_are_named():
    params, *inputs = ready(vit(**SMALL), (1, 8, 8, 1))
    with pytest.raises(ValueError, match=r"has the parameters blocks_0_2, and these have block_0, block_1, .* pass"):
        vit(**SMALL, scan=True).apply(params, *inputs)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")], ids=["name", "type", "dtype"])
def test_a_dtype_is_a_name_or_a_type(dtype):
    program = jax.make_jaxpr(vit(**SMALL, dtype=dtype).apply)(*ready(vit(**SMALL), (1, 8, 8, 1))[:3])
    assert "bf16" in str(program) and program.out_avals[0].dtype == jnp.float32


def test_bfloat16_computes_close_to_float32_with_float32_parameters(key):
    params, xt, t, y = ready(vit(**JIT), (2, 8, 8, 1), 5)
    half = vit(**JIT | {"dtype": "bfloat16"})
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(jax.eval_shape(half.init, key, xt, t, y)))
    exact, rough = (jax.jit(model.apply)(params, xt, t, y) for model in (vit(**JIT), half))
    assert rough.dtype == jnp.float32
    error = jnp.abs(rough - exact).max() / jnp.abs(exact).max()
    assert 1e-5 < error < 0.1


def test_published_sizes():
    """JiT-B/16 has 131 M parameters (2511.13720, table 9), DiT-S/2 33 M (2212.09748, table 1)."""

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "width=32 is not divisible by heads=5"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"mlp": "relu"}, "mlp='relu'"),
        ({"positions": ("alibi",)}, "alibi"),
        ({"times": 3}, "times=3 must be 1 or 2"),
        ({"remat": True}, r"remat=True is not one of \('none', 'dots', 'all'\)"),
        ({"dropout_blocks": "first"}, r"dropout_blocks='first' is not one of \('all', 'middle'\)"),
        ({"attention_dropout": 1.0}, r"attention_dropout=1.0 must lie in \[0, 1\)"),
        ({"attention_dropout": 0.1, "attention": "cudnn"}, "attention='cudnn' never forms the probabilities"),
        ({"velocity_depth": 3}, r"velocity_depth=3 must lie in \[0, 2\]"),
        (
            {"velocity_depth": 2, "class_tokens": 2, "class_tokens_from": 1, "num_classes": 3},
            r"velocity_depth=2 must lie in \[0, 1\], the blocks with class tokens",
        ),
        ({"velocity": True, "learned_variance": "channels"}, "a velocity head exclude each other"),
        ({"dtype": "float16"}, r"dtype='float16' is not one of \('float32', 'bfloat16'\)"),
        ({"dtype": "half a float"}, "dtype='half a float' is not one of"),
        ({"learned_variance": "head"}, r"learned_variance='head' is not one of \('none', 'channels'\), which ViT has"),
        ({"clock": "t"}, "clock='t' is not one of"),
        ({"clock": "index"}, "clock='index' is the index in a chain of steps, and this process has none"),
        ({"class_tokens": 2, "num_classes": 3, "class_tokens_from": 2}, "class_tokens_from=2"),
    ],
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        vit(**SMALL | options)


def test_a_patch_that_does_not_tile_is_refused(key):
    with pytest.raises(ValueError, match="does not tile spatial axis 0 of length 10"):
        vit(**SMALL).init(key, jnp.zeros((1, 10, 8, 1)), jnp.zeros(1))


def test_an_unknown_field_is_an_error():
    with pytest.raises(TypeError, match="colour"):
        vit(**SMALL, colour=1)


def test_class_tokens_belong_to_classes():
    """A config may ask for them where the data has no labels: then there are none."""
    params, *_ = ready(vit(**SMALL, class_tokens=3), (1, 8, 8, 1))
    assert "class_positions" not in params


def test_two_times_have_an_embedding_each():
    """t [B, 2]: equal to the network of one time where the second embedding is silent, and moved by either time."""
    one, two = vit(**SMALL), vit(**SMALL, times=2)
    params, xt, t, _ = ready(two, (2, 8, 8, 1), times=2)
    apply = jax.jit(two.apply)
    out = apply(params, xt, t)
    for column in (0, 1):
        moved = t.copy()
        moved[:, column] = moved[:, column] / 2
        assert jnp.abs(apply(params, xt, moved) - out).max() > 1e-4
    assert jnp.abs(apply(params, xt, t[:, ::-1]) - out).max() > 1e-4
    silent = params | {"second_clock_embed": jax.tree.map(jnp.zeros_like, params["second_clock_embed"])}
    single = {name: value for name, value in params.items() if name != "second_clock_embed"}
    np.testing.assert_allclose(apply(silent, xt, t), jax.jit(one.apply)(single, xt, t[:, 0]), atol=1e-5)
    with pytest.raises(ValueError, match=r"t must be a floating-point array of shape \(2, 2\), not float32 \(2,\)"):
        two.apply(params, xt, t[:, 0])
    with pytest.raises(ValueError, match=r"of shape \(2,\), not float32 \(2, 2\)"):
        one.apply(single, xt, t)


@pytest.mark.parametrize("learned", ["none", "channels"])
def test_channels_of_the_prediction_may_be_fewer_than_those_of_the_input(learned):
    model = vit(**SMALL, out_channels=2, learned_variance=learned)
    params, *inputs = ready(model, (2, 8, 8, 5))
    out = jax.eval_shape(model.apply, params, *inputs)
    assert [leaf.shape for leaf in jax.tree.leaves(out)] == [(2, 8, 8, 2)] * (1 + (learned == "channels"))


def test_the_function_takes_the_fields_of_the_dataclass():
    fields = SMALL | {"num_classes": 3}
    a, b = vit(**fields), ViT(**SMALL).model(Task(num_classes=3))
    shapes = [jax.tree.map(jnp.shape, ready(model, (1, 8, 8, 1), 3)[0]) for model in (a, b)]
    assert shapes[0] == shapes[1]
    used = ViT(**SMALL)
    model = used.model()
    used.width = 64  # a model is not changed by its dataclass afterwards
    assert ready(model, (1, 8, 8, 1))[0]["embed"]["kernel"].shape == (16, 32)


@pytest.mark.parametrize("depth", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_further_numbers_and_a_second_output(depth):
    """Each number moves the prediction; the second output has a head, and blocks, of its own."""
    more = dict(scalars=2, velocity=True, velocity_depth=depth)
    plain, model = vit(**SMALL, num_classes=3), vit(**SMALL, num_classes=3, **more)
    inputs = jax.random.key(0), jnp.ones((2, 8, 8, 1)), jnp.ones(2)
    shapes = (
        jax.eval_shape(plain.init, *inputs),
        jax.eval_shape(model.init, *inputs, (None, jnp.ones((2, 2)))),
    )
    names = {name: jax.tree.map(jnp.shape, params) for name, params in zip(("plain", "more"), shapes, strict=True)}
    assert {k: v for k, v in names["more"].items() if k in names["plain"]} == names["plain"]
    added = {"scalar_embed_0", "scalar_embed_1", "velocity_head", "velocity_head_gates"}
    assert set(names["more"]) - set(names["plain"]) == added | ({"velocity_block_0"} if depth else set())

    rng, xt, t = np.random.default_rng(0), jnp.ones((2, 8, 8, 1)), jnp.ones(2)
    params = jax.tree.map(lambda shape: 0.3 * rng.standard_normal(shape, np.float32), names["more"], is_leaf=_is_shape)
    apply, y = jax.jit(model.apply), jnp.array([0, 1])
    out = apply(params, xt, t, (y, jnp.float32([[0.1, 0.7], [0.1, 0.7]])))
    for column in (0, 1):
        numbers = jnp.float32([[0.1, 0.7], [0.1, 0.7]]).at[0, column].add(0.2)
        moved = apply(params, xt, t, (y, numbers))
        assert jnp.abs(moved.pred - out.pred)[0].max() > 1e-4 and jnp.abs(moved.v - out.v)[0].max() > 1e-4
        np.testing.assert_array_equal(moved.pred[1], out.pred[1])
    for owner, same, other in (("head", "v", "pred"), ("velocity_head", "pred", "v")):
        changed = apply(params | {owner: jax.tree.map(lambda p: 2 * p, params[owner])}, xt, t, (y, numbers))
        np.testing.assert_array_equal(getattr(changed, same), getattr(moved, same))
        assert jnp.abs(getattr(changed, other) - getattr(moved, other)).max() > 1e-4
    for wrong in (y, (y, numbers[:, :1]), None):
        with pytest.raises(ValueError, match=r"y must be a pair \(labels or None, numbers \(2, 2\)\), not arrays of"):
            model.apply(params, xt, t, wrong)


def _is_shape(value):
    return isinstance(value, tuple)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"learned_variance": "channels"},
        {"times": 2},
        {"out_channels": 1},
        {"mlp": "swiglu", "bottleneck": 8},
        {"scalars": 3, "velocity": True, "velocity_depth": 1},
    ],
)
def test_operations_are_those_that_xla_counts(fields):
    """As by hand; XLA counts a few per cent more, norms, activations, additions; also of what a field adds or saves."""

    def counts(**fields):
        fields = dict(patch_size=4, width=64, depth=2, heads=2, num_classes=5) | fields
        model = vit(**fields)
        t = jnp.ones((1, 2)) if fields.get("times") == 2 else jnp.ones(1)
        y, scalars = jnp.zeros(1, int), fields.get("scalars", 0)
        inputs = jnp.ones((1, 16, 16, 3)), t, (y, jnp.ones((1, scalars))) if scalars else y
        params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
        counted = jax.jit(model.apply).lower(params, *inputs).cost_analysis()["flops"]
        ours = ledger.flops(model.apply, params, *inputs)
        assert ours == vit_flops((16, 16), 3, **fields)
        return ours, counted

    ours, theirs = counts(**fields)
    assert 0.93 < ours / theirs < 1
    if fields:
        plain, counted = counts()
        assert 0.6 < (ours - plain) / (theirs - counted) < 1.05


def test_operations_of_unknown_fields_are_not_counted():
    with pytest.raises(TypeError, match="colour"):
        vit_flops((8, 8), 3, colour=1)
