"""From config to training step: what is drawn, what is refused, and that cutting a batch changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import experts
from experiments import build, drawing, objective
from experiments import config as configs
from experiments.configs import patch_unet_mnist

SEEN = build.Seen((8, 8, 1), ("a", "b", "c"))


def tiny():
    """A U-Net on 4x4 patches with a learned variance, and a chain of 20 steps."""
    config = patch_unet_mnist.get_config()
    config.model.patch_size, config.model.num_channels, config.model.num_res_blocks = 4, 8, 1
    config.model.channel_mult, config.model.num_head_channels, config.model.heads = (1.0,), None, 2
    config.process.steps, config.train.batch_size, config.train.warmup = 20, 8, 0
    config.sample.respacing = "10"
    return config


def batch(n=8):
    draw = np.random.default_rng(0)
    return {"x": draw.integers(0, 256, (n, 8, 8, 1), np.uint8), "y": draw.integers(0, 3, n).astype(np.int32)}


def small():
    """The same with a vision transformer, which compiles in a moment."""
    config = tiny()
    config.model = configs.Model(patch_size=4, width=8, depth=1, heads=2, clock="index")
    config.process.variance = "learned_range"
    return config


def stepped(config, key=3):
    params = build.init_params(config, SEEN)
    params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    state = objective.init_state(config, SEEN, params)
    return jax.jit(objective.make_step(config, SEEN))(jax.random.key(key), state, batch())


def test_labels_are_dropped_in_training_only():
    config = tiny()
    config.train.label_drop = 0.5
    many = batch(400)
    training, measuring = (objective.objective(config, SEEN, training=flag) for flag in (True, False))
    y = np.asarray(training.draw(jax.random.key(0), many, None)["y"])
    assert 0.4 < (y == 3).mean() < 0.6
    np.testing.assert_array_equal(y[y < 3], many["y"][y < 3])
    np.testing.assert_array_equal(measuring.draw(jax.random.key(0), many, None)["y"], many["y"])


def test_a_batch_cut_up_makes_the_same_step():
    whole, cut = small(), small()
    cut.train.microbatch = 2
    (one, metrics), (other, cut_metrics) = stepped(whole), stepped(cut)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one.params, other.params)
    assert metrics.keys() == cut_metrics.keys() >= {"loss", "mse", "bound", "loss_q0", "loss_q3"}
    np.testing.assert_allclose(metrics["loss"], cut_metrics["loss"], rtol=1e-5)


def test_every_decay_of_the_list_has_its_average():
    config = small()
    config.train.ema = (0.0, 0.9)
    state, _ = stepped(config)
    at_once, slow = (jax.tree.leaves(ema) for ema in state.ema)
    np.testing.assert_array_equal(at_once[0], jax.tree.leaves(state.params)[0])
    assert any(not np.array_equal(a, b) for a, b in zip(at_once, slow, strict=True))


@pytest.mark.parametrize("times", ["grid", "uniform"])
def test_experts_draw_times_of_their_own_and_share_none(times):
    config = tiny()
    config.process.snr_splits, config.process.times = (4.0, 0.25), times
    config.process.variance, config.process.bound = "fixed_small", 0.0
    bounds = build.boundaries(config)
    for split in range(3):
        config.process.split = split
        t = objective.objective(config, SEEN).draw(jax.random.key(0), batch(200), None)["at"].t
        assert set(np.asarray(experts.expert_of(bounds, t)).tolist()) == {split}
        grid = drawing.expert_grid(config)
        assert set(np.asarray(experts.expert_of(bounds, jnp.asarray(grid[:-1]))).tolist()) == {split}
        assert grid[-1] == 0


def test_times_follow_the_loss_once_every_step_was_seen():
    config = small()
    config.process.times = "loss_second_moment"
    parts = objective.objective(config, SEEN)
    carry = parts.carry._replace(losses=parts.carry.losses.at[4].set(1.0), counts=parts.carry.counts + 10)
    t = parts.draw(jax.random.key(0), batch(200), carry)["at"].t
    assert (np.isclose(t, 5 / 20)).mean() > 0.95
    state, _ = stepped(config)
    assert state.carry.counts.sum() == 8


def test_float16_scales_its_loss():
    config = tiny()
    scales = []
    for dtype in ("float32", "float16"):
        config.model.dtype = dtype
        state = jax.eval_shape(lambda: objective.init_state(config, SEEN, build.init_params(config, SEEN)))  # noqa: B023
        scales.append(state.log2_scale)
    assert scales[0] is None and scales[1].shape == ()


def test_estimates_are_kept_in_range():
    config = small()
    config.process.variance, config.process.bound, config.sample.clip = "fixed_small", 0.0, False
    params = build.init_params(config, SEEN)
    params = jax.tree.map(lambda p: p + jax.random.normal(jax.random.key(p.size), p.shape), params)
    given = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.full(4, 0.5), jnp.arange(4) % 3
    free = drawing.denoiser(config, SEEN, params)(*given)
    config.sample.clip = True
    clipped = drawing.denoiser(config, SEEN, params)(*given)
    config.sample.clip, config.sample.threshold = False, 0.9
    scaled = drawing.denoiser(config, SEEN, params)(*given)
    np.testing.assert_allclose(clipped, jnp.clip(free, -1, 1), atol=1e-4)
    assert jnp.abs(free).max() > 2 and jnp.abs(scaled).max() <= 1.0001
    assert jnp.abs(scaled - clipped).max() > 0.1


def test_a_smaller_picture_beside_the_noisy_one():
    config = tiny()
    config.condition.size, config.condition.noise = (4, 4), 0.5
    drawn = objective.objective(config, SEEN).draw(jax.random.key(0), batch(), None)
    assert drawn["planes"].shape == (8, 8, 8, 2)
    level = np.asarray(drawn["planes"][:, 0, 0, 1])
    assert 0 <= level.min() < level.max() <= 0.5


def change(config, fields):
    for name, value in fields.items():
        section, _, field = name.partition(".")
        setattr(getattr(config, section), field, value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"process.bound": 0.0}, "variance=learned_sigmoid is learned from the variational term: .*bound=1.0"),
        ({"process.bound": -1.0}, "bound=-1.0 must not be negative"),
        (
            {"process.path": "linear", "process.betas": "linear", "model.clock": "1000 t"},
            "needs --config.process.path=vp and times=grid",
        ),
        ({"process.times": "uniform"}, "needs --config.process.path=vp and times=grid"),
        ({"data.low": 0.0}, r"needs pictures in \[-1, 1\], not \[0.0, 1.0\]"),
        ({"process.variance": "fixed_small", "process.bound": 0.0, "process.bound_alone": True}, "needs a weight"),
        ({"process.path": "linear", "process.betas": "linear"}, "path=linear is no chain"),
        ({"process.split": 0}, "split=0 needs --config.process.snr_splits"),
        ({"process.snr_splits": (0.25,)}, r"split=None: .* train one expert at a time, --split=0 to --split=1"),
        ({"process.snr_splits": (0.25,), "process.split": 2}, "split=2: .* --split=0 to --split=1"),
        ({"process.snr_splits": (0.1, 0.25), "process.split": 0}, "must fall"),
        ({"process.snr_splits": (0.25, 0.25), "process.split": 0}, "must fall"),
        ({"process.snr_splits": (0.25, 0.2499999), "process.split": 1}, "range is empty|fall on one time"),
        (
            {"process.snr_splits": (0.25,), "process.split": 0, "process.times": "antithetic"},
            "not one of uniform, grid",
        ),
        ({"process.weighting": "p3"}, "weighting='p3' is not one of"),
        ({"condition.noise": 0.2}, "condition.noise=0.2 has no effect on this run"),
        ({"process.rate": 0.9}, "process.rate=0.9 has no effect on this run"),
        ({"process.weighting_gamma": 1.0}, "weighting_gamma=1.0 has no effect"),
        ({"process.variance": "fixed_smal"}, "variance='fixed_smal' is not one of"),
        ({"condition.size": ()}, r"condition.size=\(\) must be a pair"),
        ({"condition.size": (3, 3)}, r"condition.size: size=\(3, 3\) must divide the pictures' \(8, 8\)"),
        ({"condition.size": (4, 4), "condition.sample_noise": 0.1}, "sample_noise=0.1 must not exceed"),
        ({"model.width": 64}, "model.width=64 has no effect on --config.model.name=unet"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    config = tiny()
    change(config, fields)
    with pytest.raises(ValueError, match=message):
        objective.objective(config, SEEN)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample.sampler": "ddim", "sample.eta": 1.5}, r"eta=1.5 must lie in \[0, 1\]"),
        ({"sample.eta": 0.5}, "sample.eta=0.5 belongs to the ddim sampler, not to ancestral"),
        ({"sample.respacing": "30"}, "keeps 30 of a section of 20 steps"),
        ({"sample.respacing": "ddim6", "process.steps": 20}, "no integer stride keeps '6' of 20"),
        ({"sample.respacing": "5", "sample.last": 0.2}, "leave out sample.shift and sample.last"),
        ({"process.path": "linear", "process.betas": "linear"}, "path=linear is no chain"),
    ],
)
def test_samplers_that_cannot_be_are_refused(fields, message):
    config = tiny()
    config.sample.respacing = "5"
    change(config, fields)
    with pytest.raises(ValueError, match=message):
        drawing.sampler_step(config), drawing.time_grid(config)
