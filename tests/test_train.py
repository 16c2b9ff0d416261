import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion import train
from diffusion.models.vit import vit


def quadratic(params, key, batch):
    noise = jax.random.normal(key, params["w"].shape)
    return jnp.square(params["w"] - batch.mean(0) + 0.1 * noise).sum(), {}


def run(state, step, key, steps):
    for i in range(int(state.step), steps):
        state, _ = step(key, state, jnp.full((4, 3), float(i)))
    return state


@pytest.fixture
def setup():
    optimizer = train.adamw(1e-2, 10, warmup=2, weight_decay=0.1, clip=1.0)
    state = train.init_state({"w": jnp.zeros(3)}, optimizer)
    return state, jax.jit(train.make_step(quadratic, optimizer, ema_decay=0.9))


def test_four_steps_are_two_and_two_more_bit_for_bit(key, setup):
    state, step = setup
    four = run(state, step, key, 4)
    stored = jax.tree.map(np.asarray, run(state, step, key, 2))
    again = run(jax.tree.map(jnp.asarray, stored), step, key, 4)
    jax.tree.map(np.testing.assert_array_equal, four, again)


def test_steps_draw_different_noise_from_one_key(key, setup):
    state, _ = setup
    drawn = []

    def loss_fn(params, key, batch):
        return jax.random.normal(key) + 0 * params["w"].sum(), {}

    step = train.make_step(loss_fn, optax.sgd(0.0), ema_decay=0.9)
    state = train.init_state({"w": jnp.zeros(3)}, optax.sgd(0.0))
    for _ in range(3):
        state, metrics = step(key, state, jnp.zeros((1, 3)))
        drawn.append(float(metrics["loss"]))
    assert len(set(drawn)) == 3


def test_ema_follows_the_new_parameters(key):
    optimizer = optax.sgd(0.5)
    state = train.init_state({"w": jnp.zeros(3)}, optimizer)
    after, _ = train.make_step(quadratic, optimizer, ema_decay=0.999)(key, state, jnp.ones((4, 3)))
    # At step 0 the decay is 0.1: the average takes 0.9 of the parameters *after* the update.
    assert (after.params["w"] != 0).all()
    np.testing.assert_allclose(after.ema["w"], 0.9 * after.params["w"], rtol=1e-6)


def test_ema_decay_zero_is_no_average(key):
    optimizer = optax.sgd(0.5)
    state = train.init_state({"w": jnp.zeros(3)}, optimizer)
    step = train.make_step(quadratic, optimizer, ema_decay=0.0)
    for _ in range(3):
        state, _ = step(key, state, jnp.ones((4, 3)))
    np.testing.assert_array_equal(state.ema["w"], state.params["w"])


def test_average_has_a_growing_horizon():
    decay = [float(train.warm_decay(0.995, jnp.array(step))) for step in (0, 90, 10**6)]
    np.testing.assert_allclose(decay, [0.1, 0.91, 0.995], rtol=1e-6)


def test_learning_rate_warms_up_and_ends_at_zero():
    params = {"w": jnp.zeros((2, 2))}
    optimizer = train.adamw(1.0, 10, warmup=4)
    state, sizes = optimizer.init(params), []
    for _ in range(11):
        updates, state = optimizer.update({"w": jnp.ones((2, 2))}, state, params)
        sizes.append(float(-updates["w"][0, 0]))
    np.testing.assert_allclose(sizes[:5], [0, 0.25, 0.5, 0.75, 1], atol=1e-5)
    assert sizes[5] < 1 and sizes[10] < 1e-6


def test_weight_decay_spares_vectors():
    params = {"matrix": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimizer = train.adamw(0.1, 10, schedule="constant", weight_decay=0.5)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_weight_decay_spares_biases_of_any_shape():
    xt, t = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1)
    params = jax.eval_shape(vit(patch_size=4, width=16, depth=1, heads=2).init, jax.random.key(0), xt, t)
    marked = jax.tree_util.tree_leaves_with_path(train.decayed(params))
    by_name = {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in marked}
    assert params["block_0"]["qkv"]["bias"].ndim == 3 and not by_name["block_0.qkv.bias"]
    assert by_name["block_0.qkv.kernel"] and not any(v for k, v in by_name.items() if k.endswith("bias"))


def test_clipping_bounds_the_gradient_norm():
    params = {"w": jnp.zeros(4)}
    big, small = ({"w": jnp.full(4, g)} for g in (100.0, 1.0))
    optimizer = train.adamw(0.1, 10, schedule="constant", clip=1e-9)
    # With gradients clipped to almost nothing, Adam's epsilon dominates: the update shrinks.
    updates, _ = optimizer.update(big, optimizer.init(params), params)
    free, _ = train.adamw(0.1, 10, schedule="constant").update(small, optimizer.init(params)[1], params)
    assert jnp.abs(updates["w"]).max() < 0.1 * jnp.abs(free["w"]).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"warmup": 10}, "warmup=10"), ({"warmup": -1}, "warmup=-1"), ({"schedule": "step"}, "schedule='step'")],
)
def test_impossible_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train.adamw(1e-3, 10, **options)


def test_impossible_decay_is_refused():
    with pytest.raises(ValueError, match="ema_decay=1"):
        train.make_step(quadratic, optax.sgd(0.1), ema_decay=1.0)


def test_sharded_training_equals_training_on_one_device():
    """Four simulated devices, the batch split between them, against one, in a fresh process."""
    program = """
import jax, jax.numpy as jnp, numpy as np
from diffusion import loss, process, train
from diffusion.models.vit import vit
from functools import partial
model = vit(patch_size=4, width=16, depth=1, heads=2)
x = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
params = model.init(jax.random.key(0), x, jnp.zeros(8))
optimizer = train.adamw(1e-2, 10)
def loss_fn(params, key, x):
    values, _ = loss.loss(key, partial(model.apply, params), process.Linear(), x, prediction="x0")
    return values.mean(), {}
step = jax.jit(train.make_step(loss_fn, optimizer))
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.sharding.NamedSharding(mesh, jax.P("data"))
states = []
for place in (jax.devices()[0], split):
    state = train.init_state(params, optimizer)
    everywhere = place if place is not split else jax.sharding.NamedSharding(mesh, jax.P())
    state, key = jax.device_put((state, jax.random.key(2)), everywhere)
    for _ in range(3):
        state, metrics = jax.block_until_ready(step(key, state, jax.device_put(x, place)))
    states.append(jax.tree.map(np.asarray, state.params))
assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == 4
worst = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), *states)))
moved = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), states[0], params)))
print(worst, moved)
assert worst < 1e-5 < 1e-3 < moved, (worst, moved)
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    import os

    done = subprocess.run([sys.executable, "-c", program], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
