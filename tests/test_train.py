import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion import loss as losses
from diffusion import optimize, times, train
from diffusion.io import checkpoint
from diffusion.process import VP, Linear, linear_betas


def quadratic(params, key, batch):
    noise = jax.random.normal(key, params["w"].shape)
    return jnp.square(params["w"] - batch.mean(0) + 0.1 * noise).sum(), {}


def run(state, step, key, steps):
    for i in range(int(state.step), steps):
        state, _ = step(key, state, jnp.full((4, 3), float(i)))
    return state


@pytest.fixture
def setup():
    optimizer = optimize.adamw(1e-2, steps=10, warmup=2, weight_decay=0.1, clip=1.0)
    state = train.init_state({"w": jnp.zeros(3)}, optimizer)
    return state, jax.jit(train.make_step(quadratic, optimizer, ema_decay=0.9))


def test_four_steps_are_two_and_two_more_bit_for_bit(key, setup):
    state, step = setup
    four = run(state, step, key, 4)
    stored = jax.tree.map(np.asarray, run(state, step, key, 2))
    again = run(jax.tree.map(jnp.asarray, stored), step, key, 4)
    jax.tree.map(np.testing.assert_array_equal, four, again)


def test_steps_use_different_noise_from_one_key(key, setup):
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


def test_without_warm_up_the_average_is_the_sum_of_all_steps(key):
    """d^n p_0 + (1 - d) sum_i d^(n - i) p_i, with the decay d from the first step on."""
    decays, optimizer = (0.9, 0.75), optax.sgd(0.5)
    state = train.init_state({"w": jnp.zeros(3)}, optimizer, ema_decay=decays)
    step = jax.jit(train.make_step(quadratic, optimizer, ema_decay=decays, ema_warmup=False))
    seen = [state.params["w"]]
    for _ in range(4):
        state, _ = step(key, state, jnp.ones((4, 3)))
        seen.append(state.params["w"])
    assert float(seen[-1][0]) > 0
    for decay, ema in zip(decays, state.ema, strict=True):
        weights = [decay**4, *((1 - decay) * decay ** (4 - i) for i in range(1, 5))]
        np.testing.assert_allclose(ema["w"], sum(w * p for w, p in zip(weights, seen, strict=True)), rtol=1e-6)


def test_ema_decay_zero_is_no_average(key):
    optimizer = optax.sgd(0.5)
    state = train.init_state({"w": jnp.zeros(3)}, optimizer)
    step = train.make_step(quadratic, optimizer, ema_decay=0.0)
    for _ in range(3):
        state, _ = step(key, state, jnp.ones((4, 3)))
    np.testing.assert_array_equal(state.ema["w"], state.params["w"])


def test_several_averages_are_each_what_one_alone_would_be(key):
    optimizer, decays = optax.sgd(0.5), (0.0, 0.05, 0.9)
    together = train.init_state({"w": jnp.zeros(3)}, optimizer, ema_decay=decays)
    alone = [train.init_state({"w": jnp.zeros(3)}, optimizer) for _ in decays]
    steps = [train.make_step(quadratic, optimizer, ema_decay=decay) for decay in decays]
    for i in range(3):
        batch = jnp.full((4, 3), float(i))
        together, _ = train.make_step(quadratic, optimizer, ema_decay=decays)(key, together, batch)
        alone = [step(key, state, batch)[0] for step, state in zip(steps, alone, strict=True)]
    assert len(together.ema) == 3
    for ours, theirs in zip(together.ema, alone, strict=True):
        np.testing.assert_array_equal(ours["w"], theirs.ema["w"])
    assert len({float(ema["w"][0]) for ema in together.ema}) == 3


@pytest.mark.parametrize("decays", [[0.9], 0.9])
def test_a_state_with_other_averages_is_refused(key, decays):
    state = train.init_state({"w": jnp.zeros(3)}, optax.sgd(0.5), ema_decay=decays)
    with pytest.raises(ValueError, match=r"not those of ema_decay=\[0.9, 0.99\]"):
        train.make_step(quadratic, optax.sgd(0.5), ema_decay=[0.9, 0.99])(key, state, jnp.ones((4, 3)))


def test_the_default_state_has_the_leaves_it_always_had():
    """So that older checkpoints restore: nothing is stored for what is not used."""
    state = train.init_state({"w": jnp.zeros(3)}, optax.sgd(0.5))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [".step", ".params['w']", ".ema['w']"]


def test_a_state_with_everything_is_stored_and_restored(tmp_path):
    kinds = {"ema_decay": (0.9, 0.99), "log2_scale": 20.0, "carry": times.empty_history(4, 2)}
    state = train.init_state({"w": jnp.arange(3.0)}, optax.adam(0.1), **kinds)
    checkpoint.save(tmp_path, 1, state)
    again, _ = checkpoint.restore(tmp_path, jax.eval_shape(lambda: state))
    jax.tree.map(np.testing.assert_array_equal, again, state)


def diffusion_step(microbatch, **options):
    """A small denoiser under the real loss, times antithetic over the batch, labels dropped."""

    def draw(key, batch, state):
        return {**batch, "drawn": losses.draw(key, batch["x"], times.antithetic_times)}

    def loss_fn(params, key, batch):
        denoise = lambda xt, t, y: jnp.tanh(xt @ params["w"]) * t[:, None] + params["b"].reshape(1, -1)  # noqa: E731
        values, parts = losses.loss_at(batch["drawn"], denoise, Linear(), batch["x"], prediction="v")
        return values.mean(), parts

    def report(parts, carry):
        return {"largest": parts["loss"].max()}, carry

    optimizer = optax.adam(1e-2)
    state = train.init_state({"w": jnp.eye(3) / 2, "b": jnp.zeros(3)}, optimizer)
    step = train.make_step(loss_fn, optimizer, draw=draw, report=report, microbatch=microbatch, **options)
    return jax.jit(step), state


@pytest.mark.parametrize("microbatch", [1, 4, 6])
def test_microbatches_are_the_full_batch(key, microbatch):
    batch = {"x": jax.random.normal(jax.random.key(5), (12, 3))}
    (step, state), (cut, _) = diffusion_step(None), diffusion_step(microbatch)
    (whole, metrics), (parts, cut_metrics) = step(key, state, batch), cut(key, state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), whole, parts)
    assert {*metrics} == {"loss", "grad_norm", "largest"}
    for name, value in metrics.items():
        np.testing.assert_allclose(cut_metrics[name], value, rtol=1e-5)


def test_gradients_of_microbatches_add_up_exactly(key):
    """In whole numbers, where sums have no rounding, not one bit differs; batch order and scalars are kept."""

    def loss_fn(params, key, batch):
        return (batch @ params["w"]).mean(), {"first": batch[:, 0], "mean": batch.mean()}

    batch = jnp.arange(24.0).reshape(8, 3)
    results = []
    for microbatch in (None, 8, 2):
        state = train.init_state({"w": jnp.ones(3)}, optax.sgd(1.0))
        results.append(train.make_step(loss_fn, optax.sgd(1.0), microbatch=microbatch)(key, state, batch))
    jax.tree.map(np.testing.assert_array_equal, results[0], results[1])
    jax.tree.map(np.testing.assert_array_equal, results[0], results[2])
    np.testing.assert_array_equal(results[2][1]["first"], batch[:, 0])


def test_without_draw_microbatches_have_noise_of_their_own(key):
    def loss_fn(params, key, batch):
        return params["w"].sum() * 0, {"drawn": jnp.full(len(batch), jax.random.normal(key))}

    state = train.init_state({"w": jnp.ones(3)}, optax.sgd(1.0))
    _, metrics = train.make_step(loss_fn, optax.sgd(1.0), microbatch=2)(key, state, jnp.ones((6, 1)))
    assert len(np.unique(metrics["drawn"])) == 3


def test_a_batch_that_cannot_be_cut_is_refused(key):
    step, state = diffusion_step(5)
    with pytest.raises(ValueError, match="the batch of 12 is not a multiple of microbatch=5"):
        step(key, state, {"x": jnp.ones((12, 3))})


@pytest.mark.slow
@pytest.mark.parametrize("microbatch", [None, 16])
def test_the_loss_decides_where_it_is_measured_next(key, microbatch):
    """A history is part of the state: a loss that is large late in the chain samples times there."""
    steps = 4

    def draw(key, batch, state):
        return {"x": batch, "drawn": losses.draw(key, batch, times.history_times(state.carry))}

    def loss_fn(params, key, batch):
        wrong = lambda xt, t, y: params["w"] + jnp.where(t[:, None] > 0.9, 30.0, 1.0)  # noqa: E731
        values, parts = losses.loss_at(batch["drawn"], wrong, VP(linear_betas(20)), batch["x"], prediction="eps")
        return values.mean(), parts

    def report(parts, seen):
        seen = times.remember(seen, parts["t"], parts["loss"])
        return {"late": (parts["t"] > 0.9).mean()}, seen

    state = train.init_state({"w": jnp.zeros((1, 2))}, optax.sgd(0.0), carry=times.empty_history(steps, 2))
    step = jax.jit(train.make_step(loss_fn, optax.sgd(0.0), draw=draw, report=report, microbatch=microbatch))
    late = []
    for _ in range(3):
        state, metrics = step(key, state, jnp.zeros((64, 2)))
        late.append(float(metrics["late"]))
    assert late[0] < 0.6 and min(late[1:]) > 0.9
    assert state.carry.counts.sum() == 3 * 64


def test_what_a_loss_compares_with_may_come_from_the_averages(key):
    """Self-distillation: `draw` puts the averaged network's prediction into the batch."""

    def draw(key, batch, state):
        return {"x": batch, "teacher": jnp.broadcast_to(state.ema["w"], batch.shape)}

    def loss_fn(params, key, batch):
        return jnp.square(params["w"][None] - batch["x"]).mean(), {"teacher": batch["teacher"]}

    state = train.init_state({"w": jnp.zeros(3)}, optax.sgd(0.5), ema_decay=0.9)
    step = jax.jit(train.make_step(loss_fn, optax.sgd(0.5), ema_decay=0.9, draw=draw, microbatch=2))
    for _ in range(2):
        before = state
        state, metrics = step(key, state, jnp.ones((4, 3)))
        np.testing.assert_array_equal(metrics["teacher"], jnp.broadcast_to(before.ema["w"], (4, 3)))
    assert (before.ema["w"] != before.params["w"]).all()


def half_precision(params, key, batch):
    """A loss whose gradient is computed in float16 and overflows there when the scale is beyond 2^15 / |batch|."""
    matrix, vector = (params[name].astype(jnp.float16) for name in ("matrix", "vector"))
    x = batch.astype(jnp.float16)
    return ((x @ matrix).sum() + (x * vector.reshape(1, -1)).sum()).astype(jnp.float32), {}


def test_an_overflow_in_float16_skips_the_step_and_training_recovers(key):
    params = {"matrix": jnp.ones((3, 3)), "vector": jnp.ones(3)}
    state = first = train.init_state(params, optax.adam(0.1), log2_scale=18.5)
    step = jax.jit(train.make_step(half_precision, optax.adam(0.1), scale_growth=0.25))
    batch, scales = jnp.full((2, 3), 0.5), [18.5]
    for i in range(4):
        state, metrics = step(key, state, batch)
        scales.append(float(state.log2_scale))
        if i < 3:
            assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
            assert (state.step, state.log2_scale) == (i + 1, 17.5 - i)
            jax.tree.map(np.testing.assert_array_equal, state[1:4], first[1:4])
    # 2^16 is beyond float16, 2^15 is not.
    assert scales == [18.5, 17.5, 16.5, 15.5, 15.75]
    assert (state.params["matrix"] != 1).all() and np.isfinite(metrics["grad_norm"])


@pytest.mark.slow
def test_scaled_gradients_are_unscaled_in_every_group_of_parameters(key):
    """Matrices and vectors alike: the gradient, its norm and so clipping and Adam's epsilon are those without."""
    params = {"matrix": jnp.ones((3, 3)), "vector": jnp.ones(3)}
    batch, optimizer = jnp.full((2, 3), 0.5), optax.sgd(1.0)
    step = train.make_step(half_precision, optimizer)
    plain, metrics = step(key, train.init_state(params, optimizer), batch)
    scaled, scaled_metrics = step(key, train.init_state(params, optimizer, log2_scale=10.9), batch)
    jax.tree.map(np.testing.assert_array_equal, scaled.params, plain.params)
    assert scaled_metrics["grad_norm"] == metrics["grad_norm"] and scaled_metrics["loss"] == metrics["loss"]
    np.testing.assert_allclose(scaled.log2_scale, 10.901, rtol=1e-6)


@pytest.mark.parametrize("log2_scale", [None, 4.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_seen_in_the_step(key, bad, log2_scale):
    def loss_fn(params, key, batch):
        return (params["w"] * batch).sum(), {"seen": batch.sum()}

    optimizer = optax.adam(0.1)
    state = train.init_state({"w": jnp.ones(3)}, optimizer, log2_scale=log2_scale, carry=jnp.zeros(()))
    report = lambda aux, carry: (aux, carry + aux["seen"])  # noqa: E731
    step = jax.jit(train.make_step(loss_fn, optimizer, report=report))
    before, _ = step(key, state, jnp.ones(3))
    after, metrics = step(key, before, jnp.array([1.0, bad, 1.0]))
    assert not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, after, before)
    again, _ = step(key, after, jnp.ones(3))
    assert int(again.step) == 2 and np.isfinite(again.params["w"]).all()


@pytest.mark.parametrize("log2_scale", [None, 0.0])
def test_a_gradient_that_is_not_finite_changes_nothing(key, log2_scale):
    """The loss is 0 and its slope infinite, with no scale to lower."""
    loss_fn = lambda params, key, batch: (jnp.sqrt(params["w"]).sum(), {})  # noqa: E731
    state = train.init_state({"w": jnp.zeros(2)}, optax.sgd(0.1), log2_scale=log2_scale)
    after, metrics = train.make_step(loss_fn, optax.sgd(0.1))(key, state, jnp.ones((2, 1)))
    assert metrics["loss"] == 0 and np.isinf(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_average_has_a_growing_horizon():
    decay = [float(train.warm_decay(0.995, jnp.array(step))) for step in (0, 90, 10**6)]
    np.testing.assert_allclose(decay, [0.1, 0.91, 0.995], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"ema_decay": (0.9, 1.0)}, r"ema_decay=\(0.9, 1.0\)"),
        ({"ema_decay": []}, r"ema_decay=\[\]"),
        ({"microbatch": 0}, "microbatch=0"),
        ({"scale_growth": -1.0}, "scale_growth=-1"),
    ],
)
def test_impossible_steps_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train.make_step(quadratic, optax.sgd(0.1), **options)


@pytest.mark.slow
def test_sharded_training_equals_training_on_one_device():
    """Two simulated devices, the batch split between them, against one, in a fresh process."""
    program = """
import jax, jax.numpy as jnp, numpy as np
from diffusion import loss, optimize, process, train
from diffusion.models.vit import vit
from functools import partial
model = vit(patch_size=4, width=16, depth=1, heads=2)
x = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
params = model.init(jax.random.key(0), x, jnp.zeros(8))
optimizer = optimize.adamw(1e-2, steps=10)
def loss_fn(params, key, x):
    values, _ = loss.loss(key, partial(model.apply, params), process.Linear(), x, prediction="x0")
    return values.mean(), {}
step = jax.jit(train.make_step(loss_fn, optimizer))
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.sharding.NamedSharding(mesh, jax.P("data"))
states = []
for place in (jax.devices()[0], split):
    state = train.init_state(params, optimizer)
    everywhere = place if place is not split else jax.sharding.NamedSharding(mesh, jax.P())
    state, key = jax.device_put((state, jax.random.key(2)), everywhere)
    for _ in range(2):
        state, metrics = jax.block_until_ready(step(key, state, jax.device_put(x, place)))
    states.append(jax.tree.map(np.asarray, state.params))
assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == 2
worst = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), *states)))
moved = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), states[0], params)))
print(worst, moved)
assert worst < 1e-5 < 1e-3 < moved, (worst, moved)
"""
    devices = "--xla_force_host_platform_device_count=2"
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}", "NPROC": "16", "JAX_PLATFORMS": "cpu"}

    done = subprocess.run([sys.executable, "-c", program], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_averages_of_bfloat16_parameters_are_float32(key):
    """A step of 1e-3 of a parameter of 1 is below the resolution of bfloat16, and the average must move by it."""
    optimizer = optax.sgd(1.0)
    params = {"a": jnp.ones((), jnp.bfloat16), "b": jnp.zeros((), jnp.float32)}
    state = train.init_state(params, optimizer, ema_decay=0.999)
    state = state._replace(params={"a": jnp.bfloat16(2.0), "b": jnp.float32(1.0)}, step=jnp.int32(100_000))
    step = jax.jit(train.make_step(lambda p, key, x: (0 * (p["a"] + p["b"]), {}), optimizer, ema_decay=0.999))
    after, _ = step(key, state, jnp.zeros(1))
    assert after.params["a"].dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(after.ema)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(after.ema["a"], 1.001, rtol=1e-6)
    np.testing.assert_allclose(after.ema["b"], 0.001, rtol=1e-4)


def test_the_loss_of_each_example_in_aux_does_not_replace_the_mean(key):
    def loss_fn(params, key, x):
        values = params["w"] * x
        return values.mean(), {"loss": values, "grad_norm": values, "kept": values}

    optimizer = optax.sgd(1.0)
    state = train.init_state({"w": jnp.ones(())}, optimizer)
    _, metrics = train.make_step(loss_fn, optimizer)(key, state, jnp.array([1.0, 3.0]))
    assert (float(metrics["loss"]), float(metrics["grad_norm"]), metrics["kept"].shape) == (2.0, 2.0, (2,))
