"""From parts to a training step: what is random in it, and that cutting a batch into pieces changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models.vit import ViT
from experiments import objective, parts, sampling
from experiments.configs import patch_unet_mnist
from experiments.parts import DataSpec
from tests.experiments.runs import noisy

SPEC = DataSpec((8, 8, 1), ("a", "b", "c"))


def tiny():
    """A U-Net on 4x4 patches with a learned variance, and a chain of 20 steps."""
    config = patch_unet_mnist.get_config()
    config.model.patch_size, config.model.num_channels, config.model.num_res_blocks = 4, 8, 1
    config.model.channel_mult, config.model.num_head_channels, config.model.num_heads = (1.0,), None, 2
    config.process.steps, config.train.batch_size, config.train.warmup = 20, 8, 0
    config.sample.respacing = "10"
    return config


def batch(n=8):
    rng = np.random.default_rng(0)
    return {"x": rng.integers(0, 256, (n, 8, 8, 1), np.uint8), "y": rng.integers(0, 3, n).astype(np.int32)}


def small():
    """The same with a vision transformer, which compiles in a moment."""
    config = tiny()
    config.model = ViT(patch_size=4, width=8, depth=1, heads=2, clock="index")
    config.process.variance = "learned_range"
    return config


@functools.cache
def stepped(microbatch=None):
    """The state before a step and after it, and the metrics: two averages, and times that follow the loss."""
    config = small()
    config.train.ema, config.process.times, config.train.microbatch = (0.0, 0.9), "loss_second_moment", microbatch
    run = parts.resolve(config, SPEC)
    params = jax.tree.map(jnp.asarray, noisy(parts.init_params(run), 0.05))
    state = objective.init_state(run, params)
    return run, state, *jax.jit(objective.make_step(run))(jax.random.key(3), state, batch())


def test_labels_are_dropped_in_training_only():
    config = tiny()
    config.train.label_drop = 0.5
    many = batch(400)
    training, measuring = (objective.objective(parts.resolve(config, SPEC), training=flag) for flag in (True, False))
    y = np.asarray(training.draw(jax.random.key(0), many, None)["y"])
    assert 0.4 < (y == 3).mean() < 0.6
    np.testing.assert_array_equal(y[y < 3], many["y"][y < 3])
    np.testing.assert_array_equal(measuring.draw(jax.random.key(0), many, None)["y"], many["y"])


@pytest.mark.slow
def test_a_batch_cut_up_makes_the_same_step():
    (_, _, one, metrics), (_, _, other, cut_metrics) = stepped(), stepped(microbatch=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one.params, other.params)
    assert metrics.keys() == cut_metrics.keys() >= {"loss", "mse", "vlb", "loss_q0", "loss_q3"}
    np.testing.assert_allclose(metrics["loss"], cut_metrics["loss"], rtol=1e-5)
    assert one.carry.counts.sum() == other.carry.counts.sum() == 8


@pytest.mark.slow
def test_every_decay_of_the_list_has_its_average():
    _, before, after, _ = stepped()
    at_once, slow = (jax.tree.leaves(ema) for ema in after.ema)
    decay = 0.1  # of 0.9, after one step: the horizon of an average grows with the step
    for initial, trained, fast, average in zip(
        jax.tree.leaves(before.params), jax.tree.leaves(after.params), at_once, slow, strict=True
    ):
        np.testing.assert_array_equal(fast, trained)
        np.testing.assert_allclose(average, decay * initial + (1 - decay) * trained, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_times_follow_the_loss_once_every_step_was_seen():
    run, state, *_ = stepped()
    history = run.history._replace(losses=run.history.losses.at[4].set(1.0), counts=run.history.counts + 10)
    draw = jax.jit(objective.objective(run).draw)
    t = draw(jax.random.key(0), batch(200), state._replace(carry=history))["at"].t
    assert (np.isclose(t, 5 / 20)).mean() > 0.95


def test_float16_scales_its_loss():
    config = tiny()
    scales = []
    for dtype in ("float32", "float16"):
        config.model.dtype = dtype
        run = parts.resolve(config, SPEC)
        state = jax.eval_shape(lambda: objective.init_state(run, parts.init_params(run)))  # noqa: B023
        scales.append(state.log2_scale)
    assert scales[0] is None and scales[1].shape == ()


@pytest.mark.slow
def test_estimates_are_kept_in_range():
    config = small()
    config.process.variance, config.process.vlb_weight, config.sample.clip = "fixed_small", 0.0, False
    params = parts.init_params(parts.resolve(config, SPEC))
    params = noisy(params, 1.0)
    given = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.full(4, 0.5), jnp.arange(4) % 3
    free = jax.jit(sampling.denoiser(parts.resolve(config, SPEC), params))(*given)
    config.sample.clip = True
    clipped = jax.jit(sampling.denoiser(parts.resolve(config, SPEC), params))(*given)
    config.sample.clip, config.sample.threshold = False, 0.9
    scaled = jax.jit(sampling.denoiser(parts.resolve(config, SPEC), params))(*given)
    np.testing.assert_allclose(clipped, jnp.clip(free, -1, 1), atol=1e-4)
    assert jnp.abs(free).max() > 2 and jnp.abs(scaled).max() <= 1.0001
    assert jnp.abs(scaled - clipped).max() > 0.1


@pytest.mark.slow
def test_a_low_resolution_image_is_the_conditioning_input():
    config = tiny()
    config.condition.size, config.condition.noise = (4, 4), 0.5
    drawn = objective.objective(parts.resolve(config, SPEC)).draw(jax.random.key(0), batch(), None)
    assert drawn["conditioning"].shape == (8, 8, 8, 2)
    level = np.asarray(drawn["conditioning"][:, 0, 0, 1])
    assert 0 <= level.min() < level.max() <= 0.5


def test_quartile_means_average_to_the_mean():
    t = jnp.concatenate([jnp.arange(1, 101) / 100, jnp.array([0.0, 0.1, 0.97])])
    values = jax.random.normal(jax.random.key(0), t.shape)
    means = objective.by_quartile(t, values, "mse")
    assert list(means) == ["mse_q0", "mse_q1", "mse_q2", "mse_q3"]
    counts = np.array([27, 25, 25, 26])
    np.testing.assert_allclose((np.array(list(means.values())) * counts).sum() / 103, values.mean(), rtol=1e-5)
    # Indices 0..24 of a chain of 100 steps are its first quarter: times 0.01..0.25.
    first = np.append(values[:25], values[100:102])
    np.testing.assert_allclose(means["mse_q0"], first.mean(), rtol=1e-5)
    assert np.isnan(objective.by_quartile(t[:3], values[:3])["loss_q3"])
