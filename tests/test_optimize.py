import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion import layers, optimize, train
from diffusion.io import checkpoint
from diffusion.models.vit import hidden_matrices, vit


def test_learning_rate_warms_up_and_ends_at_zero():
    params = {"w": jnp.zeros((2, 2))}
    optimizer = optimize.adamw(1.0, steps=10, warmup=4)
    state, sizes = optimizer.init(params), []
    for _ in range(11):
        updates, state = optimizer.update({"w": jnp.ones((2, 2))}, state, params)
        sizes.append(float(-updates["w"][0, 0]))
    np.testing.assert_allclose(sizes[:5], [0, 0.25, 0.5, 0.75, 1], atol=1e-5)
    assert sizes[5] < 1 and sizes[10] < 1e-6


def test_a_linear_schedule_falls_to_zero_and_stays_there():
    params = {"w": jnp.zeros((2, 2))}
    optimizer = optimize.adamw(1.0, steps=10, warmup=2, schedule="linear")
    state, sizes = optimizer.init(params), []
    for _ in range(13):
        updates, state = optimizer.update({"w": jnp.ones((2, 2))}, state, params)
        sizes.append(float(-updates["w"][0, 0]))
    np.testing.assert_allclose(sizes, [0, 0.5, *np.arange(8, 0, -1) / 8, 0, 0, 0], atol=1e-5)


def test_weight_decay_spares_vectors():
    params = {"matrix": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimizer = optimize.adamw(0.1, steps=10, schedule="constant", weight_decay=0.5)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_weight_decay_spares_biases_of_any_shape():
    xt, t = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1)
    params = jax.eval_shape(vit(patch_size=4, width=16, depth=1, heads=2).init, jax.random.key(0), xt, t)
    marked = jax.tree_util.tree_leaves_with_path(optimize.decayed(params))
    by_name = {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in marked}
    assert params["block_0"]["qkv"]["bias"].ndim == 3 and not by_name["block_0.qkv.bias"]
    assert by_name["block_0.qkv.kernel"] and not any(v for k, v in by_name.items() if k.endswith("bias"))


@pytest.fixture(scope="module")
def both_forms():
    """Parameters of a network with an entry for each block, and those of the same one scanned over them."""
    options = dict(patch_size=4, width=16, depth=3, heads=2, norm="rms", qk_norm=True)
    xt, t = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1)
    return tuple(vit(**options, scan=scan).init(jax.random.key(0), xt, t) for scan in (False, True))


def test_weight_decay_acts_on_the_same_parameters_of_stacked_layers(both_forms):
    plain, stacked = both_forms
    decayed = optimize.decayed(stacked)
    assert stacked["blocks_0_3"]["norm_q"]["scale"].ndim == 2 and not decayed["blocks_0_3"]["norm_q"]["scale"]
    whole = jax.tree.map(lambda mark, p: np.full(p.shape, mark), decayed, stacked)
    wanted = jax.tree.map(lambda mark, p: np.full(p.shape, mark), optimize.decayed(plain), plain)
    jax.tree.map(np.testing.assert_array_equal, layers.unstacked(whole), wanted)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_stacked_layers_move_as_each_alone(both_forms, kind):
    """Other gradients in each of three steps, with clipping and decay, which act on all together."""
    options = dict(steps=10, schedule="constant", weight_decay=0.1, clip=1.0)
    muon = lambda: optimize.muon(1e-2, hidden=hidden_matrices, matrix_rate=0.1, **options)  # noqa: E731
    optimizer = muon() if kind == "muon" else optimize.adamw(1e-2, **options)
    rng, update = np.random.default_rng(0), jax.jit(optimizer.update)
    grads = [jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32), both_forms[0]) for _ in range(3)]
    ends = []
    for params in both_forms:
        state = optimizer.init(params)
        for gradient in grads:
            updates, state = update(layers.stacked(gradient, params), state, params)
            params = optax.apply_updates(params, updates)
        ends.append(layers.unstacked(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *ends)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ends[0], both_forms[0])
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_clipping_bounds_the_gradient_norm():
    params = {"w": jnp.zeros(4)}
    big, small = ({"w": jnp.full(4, g)} for g in (100.0, 1.0))
    optimizer = optimize.adamw(0.1, steps=10, schedule="constant", clip=1e-9)
    # With gradients clipped to almost nothing, Adam's epsilon dominates: the update shrinks.
    updates, _ = optimizer.update(big, optimizer.init(params), params)
    free, _ = optimize.adamw(0.1, steps=10, schedule="constant").update(small, optimizer.init(params)[1], params)
    assert jnp.abs(updates["w"]).max() < 0.1 * jnp.abs(free["w"]).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"warmup": 10}, "warmup=10"), ({"warmup": -1}, "warmup=-1"), ({"schedule": "step"}, "schedule='step'")],
)
def test_impossible_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optimize.adamw(1e-3, steps=10, **options)


# Muon


def two_matrices(params):
    return {"matrix": True, "heads": True, "table": False, "bias": False}


@pytest.fixture
def some(key):
    """Parameters of which two are matrices for Muon, one of them with split outputs; and gradients."""
    shapes = {"matrix": (48, 16), "heads": (16, 3, 4, 4), "table": (5, 16), "bias": (16,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    return params, {name: jax.random.normal(keys[name], shape) for name, shape in shapes.items()}


def orthogonalized(x, iterations=3):
    """Newton-Schulz with Muon's coefficients in NumPy: every singular value goes through the same polynomial."""
    u, sizes, vt = np.linalg.svd(x, full_matrices=False)
    sizes = sizes / np.sum(sizes**4) ** 0.25
    for _ in range(iterations):
        sizes = 3.4445 * sizes - 4.7750 * sizes**3 + 2.0315 * sizes**5
    return (u * sizes) @ vt


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_muon_matches_numpy_step_by_step(scale, key):
    """Spectra over three decades, other gradients at every step; the average looks ahead (Nesterov) and is unbiased."""
    rng, beta = np.random.default_rng(0), 0.95
    params = {"matrix": jnp.zeros((48, 16)), "heads": jnp.zeros((16, 3, 4, 4)), "table": jnp.zeros(2), "bias": 0.0}
    optimizer = optimize.muon(1e-3, steps=10, hidden=two_matrices, matrix_rate=0.5, schedule="constant")
    state, average, update = optimizer.init(params), {"matrix": 0.0, "heads": 0.0}, jax.jit(optimizer.update)
    for step in range(1, 4):
        grads = dict(params)
        for name, (inputs, outputs) in {"matrix": (48, 16), "heads": (16, 48)}.items():
            u, vt = (np.linalg.qr(rng.normal(size=(n, 16)))[0] for n in (inputs, outputs))
            gradient = scale * (u * np.geomspace(1, 1e-3, 16)) @ vt.T
            grads[name] = jnp.asarray(gradient.reshape(params[name].shape), jnp.float32)
        updates, state = update(grads, state, params)
        for name in average:
            gradient = np.asarray(grads[name], np.float64).reshape(len(grads[name]), -1)
            average[name] = beta * average[name] + (1 - beta) * gradient
            ahead = beta * average[name] / (1 - beta ** (step + 1)) + (1 - beta) * gradient / (1 - beta**step)
            inputs, outputs = gradient.shape
            wanted = -0.5 * max(1, outputs / inputs) ** 0.5 * orthogonalized(ahead)
            np.testing.assert_allclose(np.reshape(updates[name], gradient.shape), wanted, atol=2e-5)


@pytest.mark.slow
def test_muon_pushes_singular_values_towards_one(some):
    params, grads = some
    optimizer = optimize.muon(1e-3, steps=10, hidden=two_matrices, matrix_rate=0.5, schedule="constant")
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for name in ("matrix", "heads"):
        update = np.asarray(updates[name]).reshape(len(updates[name]), -1)
        inputs, outputs = update.shape
        sizes = np.linalg.svd(update, compute_uv=False) / (0.5 * max(1, outputs / inputs) ** 0.5)
        assert sizes.min() > 0.65
        assert sizes.max() < 1.25


def test_what_muon_cannot_be_given_is_refused(some):
    params, _ = some
    with pytest.raises(ValueError, match=r"hidden marks none of the parameters \['bias', 'heads', 'matrix', 'table'\]"):
        optimize.muon(1e-3, steps=10, hidden=hidden_matrices).init(params)
    with pytest.raises(ValueError, match=r"hidden marks a parameter of shape \(16,\), which is not a matrix"):
        optimize.muon(1e-3, steps=10, hidden=lambda p: {**two_matrices(p), "bias": True}).init(params)
    with pytest.raises(ValueError, match="schedule='step'"):
        optimize.muon(1e-3, steps=10, hidden=two_matrices, schedule="step")


def test_muon_moves_all_else_as_nadam_does_at_a_rate_of_its_own(some):
    params, grads = some
    optimizer = optimize.muon(
        1e-3, steps=10, hidden=two_matrices, matrix_rate=0.5, b2=0.9, eps=0.1, schedule="constant"
    )
    nadam = optax.nadam(1e-3, b2=0.9, eps=0.1)
    state, other, update = optimizer.init(params), nadam.init(params), jax.jit(optimizer.update)
    for scale in (1.0, 3.0, 0.5):
        now = jax.tree.map(lambda g: scale * g, grads)  # noqa: B023
        updates, state = update(now, state, params)
        wanted, other = nadam.update(now, other, params)
        for name in ("table", "bias"):
            np.testing.assert_allclose(updates[name], wanted[name], rtol=1e-5)


def test_muons_rates_follow_one_schedule(some):
    params, grads = some
    optimizer = optimize.muon(1.0, steps=10, hidden=two_matrices, matrix_rate=1.0, warmup=4, clip=1.0)
    state, sizes, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for _ in range(11):
        updates, state = update(grads, state, params)
        sizes.append([float(jnp.linalg.norm(updates[name])) for name in ("matrix", "table")])
    sizes = np.array(sizes) / sizes[4]
    np.testing.assert_allclose(sizes[:4], np.arange(4)[:, None] / 4 + np.zeros(2), atol=0.1)
    assert (np.diff(sizes[4:], axis=0) < 0).all() and (sizes[10] < 1e-6).all()


def test_muons_weight_decay_acts_on_its_matrices(some):
    params, grads = some
    nothing = jax.tree.map(jnp.zeros_like, grads)
    optimizer = optimize.muon(
        1e-3, steps=10, hidden=two_matrices, matrix_rate=0.1, schedule="constant", weight_decay=0.5
    )
    updates, _ = optimizer.update(nothing, optimizer.init(params), params)
    for name, update in updates.items():
        np.testing.assert_allclose(update, -0.05 if two_matrices(params)[name] else 0.0, rtol=1e-6)


@pytest.mark.slow
def test_muons_clipping_bounds_the_gradient_norm(some):
    params, grads = some
    options = dict(hidden=two_matrices, eps=1.0, schedule="constant")  # so that Adam's step depends on the size
    updates = []
    for clip, scale in ((1.0, 1e3), (1.0, 1e6), (None, 1e6)):
        optimizer = optimize.muon(1e-3, steps=10, clip=clip, **options)
        updates.append(optimizer.update(jax.tree.map(lambda g: scale * g, grads), optimizer.init(params), params)[0])  # noqa: B023
    np.testing.assert_allclose(updates[0]["table"], updates[1]["table"], rtol=1e-4)
    assert jnp.linalg.norm(updates[2]["table"]) > 2 * jnp.linalg.norm(updates[1]["table"])


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_hidden_matrices_are_those_of_attention_and_mlp(mlp):
    xt, t = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1)
    model = vit(patch_size=4, width=16, depth=2, heads=2, num_classes=3, mlp=mlp, qk_norm=True, class_tokens=2)
    params = jax.eval_shape(model.init, jax.random.key(0), xt, t, jnp.zeros(1, int))
    marked = jax.tree_util.tree_leaves_with_path(hidden_matrices(params))
    names = {jax.tree_util.keystr(path, simple=True, separator=".") for path, value in marked if value}
    assert names == {f"block_{i}.{layer}.kernel" for i in (0, 1) for layer in ("qkv", "out", "up", "down")}


@pytest.mark.slow
def test_a_muon_state_goes_through_a_checkpoint_bit_for_bit(key, tmp_path):
    model = vit(patch_size=4, width=16, depth=1, heads=2)
    x = jax.random.normal(key, (8, 8, 8, 1))
    params = model.init(key, x, jnp.zeros(8))
    optimizer = optimize.muon(1e-3, steps=10, hidden=hidden_matrices)

    def loss_fn(params, key, batch):
        return jnp.square(model.apply(params, batch, jnp.zeros(8)) - batch).mean(), {}

    step, state = jax.jit(train.make_step(loss_fn, optimizer)), train.init_state(params, optimizer)
    state, before = step(key, state, x)
    checkpoint.save(tmp_path, 1, state)
    again, _ = checkpoint.restore(tmp_path, train.init_state(params, optimizer))
    for _ in range(3):
        (state, after), (again, _) = step(key, state, x), step(key, again, x)
    jax.tree.map(np.testing.assert_array_equal, state, again)
    assert after["loss"] < before["loss"]
