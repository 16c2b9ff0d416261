"""The mean-flow loss against the published program's numbers; loss and sampler where the average velocity is known."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.guide import clip
from diffusion.methods import meanflow
from diffusion.models.vit import vit
from diffusion.predict import WithVelocity, convert
from diffusion.process import Cosine, Linear, coefficients, noise
from diffusion.sample import heun, sample
from diffusion.times import logit_normal_times
from experiments import config
from experiments.methods import method
from tests.methods.test_distill import flow
from tests.test_sample import MEAN, SCALE, exact_flow, gaussian_denoiser

PUBLISHED = Path(__file__).parents[1] / "data" / "pmf_loss.npz"
PATHS = {"linear": Linear(), "cosine": Cosine()}


def published(dtype):
    """The file's arrays, and its network as a mean-flow network that predicts the flow."""
    with np.load(PUBLISHED) as stored:
        values = {k: stored[k] for k in stored.files}
    config = json.loads(str(values.pop("config")))
    values = {k: jnp.asarray(a, dtype if a.dtype.kind == "f" else int) for k, a in values.items()}
    net = {k.removeprefix("net_"): a for k, a in values.items() if k.startswith("net_")}

    def denoise(z, t, y):
        t, h = t[:, :1], t[:, 1:]
        labels, numbers = y
        log_w, ends = -jnp.log(1 - numbers[:, :1]), numbers[:, 1:2] - numbers[:, 2:]
        row = lambda vector: vector[None]  # noqa: E731
        u = row(net["a"]) + t * row(net["p"]) + h * row(net["q"]) + log_w * row(net["s"])
        u = u + ends * row(net["m"]) + net["table"][labels]
        v = row(net["b"]) + t * row(net["p2"]) + log_w * row(net["s2"]) + net["table2"][labels]
        u, v = u[:, None, None], v[:, None, None]
        u = jnp.tanh(jnp.einsum("bhwc,dc->bhwd", z, net["A"], precision="highest") + u)
        return WithVelocity(u, jnp.tanh(jnp.einsum("bhwc,dc->bhwd", z, net["B"], precision="highest") + v))

    dropped = jnp.arange(len(values["t"])) < config["dropped_first"]
    sampled = meanflow.Draw(*(values[k] for k in ("t", "r", "e", "w", "t_min", "t_max")), dropped)
    return values, denoise, sampled, config["num_classes"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 1e-4)])
def test_the_published_loss_and_its_parts(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        expected, denoise, sampled, null = published(dtype)

        @jax.jit
        def computed(sampled, x, y):
            arguments = sampled, denoise, Linear(), x, y
            found = meanflow.velocities(*arguments, null=null, prediction="flow")
            return *found, meanflow.loss_at(*arguments, null=null, prediction="flow")[0]

        z, found, loss = computed(sampled, expected["x"], expected["y"])
        pairs = {"z": z, "u": found.u, "du_dt": found.du_dt, "V": found.V, "v": found.v, "v_g": found.guided}
        for name, ours in (pairs | {"loss": loss}).items():
            assert ours.dtype == dtype
            scale = float(jnp.abs(expected[name]).max())
            np.testing.assert_allclose(ours, expected[name], rtol=0, atol=tolerance * scale, err_msg=name)


def exact_network(path):
    """The average velocity of the flow to N(MEAN, SCALE^2), and the instantaneous one, as a network of two times."""

    def denoise(z, t, y):
        t, h = t[:, 0], t[:, 1]
        v = gaussian_denoiser(path, "flow")(z, t)
        safe = jnp.where(h > 0, h, 1)
        u = (z - flow(path, z, t, t - safe)) / safe.reshape(-1, 1, 1, 1)
        return WithVelocity(jnp.where((h > 0).reshape(-1, 1, 1, 1), u, v), v)

    return denoise


def drawn(key, n=6, shape=(3, 2, 1), **changed):
    """A draw of known times, and images."""
    x0 = MEAN + SCALE * jax.random.normal(key, (n, *shape))
    t, r = jnp.linspace(0.3, 1.0, n), jnp.linspace(0.3, 0.0, n)
    sampled = meanflow.draw(jax.random.fold_in(key, 1), x0, scale_max=4.0)
    return sampled._replace(t=t, r=r, **changed), x0


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_the_exact_average_velocity_is_a_fixed_point(key, name):
    """Eq. (2): u + (t - r) du/dt of the exact u is the exact velocity, so V needs no correction."""
    path = PATHS[name]
    sampled, x0 = drawn(key)
    xt, found = jax.jit(
        lambda sampled, x0: meanflow.velocities(sampled, exact_network(path), path, x0, prediction="flow")
    )(sampled, x0)
    v = gaussian_denoiser(path, "flow")(xt, sampled.t)
    np.testing.assert_allclose(found.V, v, atol=2e-4)
    np.testing.assert_allclose(found.v, v, atol=1e-6)
    assert jnp.abs(found.u - v)[1:].max() > 0.1  # the average velocity is another one
    # v_g is the velocity of the noised example, whose mean at xt is v.
    wanted = coefficients(path, sampled.t)
    exact = wanted.dalpha.reshape(-1, 1, 1, 1) * x0 + wanted.dsigma.reshape(-1, 1, 1, 1) * sampled.eps
    np.testing.assert_allclose(found.guided, exact, atol=2e-5)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("steps", [1, 3])
def test_steps_of_any_length_follow_the_exact_flow(key, name, steps):
    path, x1 = PATHS[name], jax.random.normal(key, (4, 3, 2, 1))
    told = meanflow.told(exact_network(path))
    x0 = sample(key, told, path, x1, np.linspace(1, 0, steps + 1), None, prediction="flow", sampler=meanflow.sampler())
    np.testing.assert_allclose(x0, exact_flow(path, x1), atol=2e-5)


def test_a_network_of_one_time_is_left(key):
    """At t [B] it is the instantaneous velocity, which any sampler integrates."""
    path, x1 = Linear(), jax.random.normal(key, (4, 3, 2, 1))
    told, grid = meanflow.told(exact_network(path)), np.linspace(1, 0, 41)
    x0 = sample(key, told, path, x1, grid, None, prediction="flow", sampler=heun())
    np.testing.assert_allclose(x0, exact_flow(path, x1), atol=2e-3)
    bounded = clip(told, path, "flow", low=0.6, high=0.8)
    x0 = sample(key, bounded, path, x1, [1.0, 0.0], None, prediction="flow", sampler=meanflow.sampler())
    np.testing.assert_allclose(x0, jnp.clip(exact_flow(path, x1), 0.6, 0.8), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_predictions_become_velocities_with_a_bounded_divisor(key, prediction):
    path, t = Cosine(), jnp.float32([0.9, 0.5, 0.1, 0.01])
    xt = noise(path, jnp.ones((4, 2)), t, jax.random.normal(key, (4, 2)))
    denoise, coef = gaussian_denoiser(path, prediction), coefficients(path, t)
    found = meanflow.velocity(prediction, coef, xt, denoise(xt, t), 0.05)
    exact = convert(denoise, path, prediction, "flow")(xt, t)
    np.testing.assert_allclose(found[:3], exact[:3], rtol=1e-4)
    if prediction == "x0":
        assert jnp.abs(found[3] - exact[3]).max() > 1e-2
        linear = meanflow.velocity("x0", coefficients(Linear(), t), xt, denoise(xt, t), 0.05)
        np.testing.assert_allclose(linear, (xt - denoise(xt, t)) / jnp.maximum(t, 0.05)[:, None], rtol=1e-4, atol=1e-5)
    back = meanflow.velocity_to_image(path, t[:3], xt[:3], exact[:3])
    np.testing.assert_allclose(back, gaussian_denoiser(path, "x0")(xt, t)[:3], atol=1e-5)


@pytest.mark.parametrize("path", [Linear(), Linear(2.0)], ids=["linear", "scale 2"])
def test_the_velocity_is_continuous_at_the_data_and_its_floor_is_one_of_sigma(path):
    """A determinant of -0 has the sign of those beside it."""
    t, floor = jnp.float32([0.0, 1e-6, 0.04, 0.5]), 0.1
    found = meanflow.velocity("x0", coefficients(path, t), jnp.ones((4, 2)), jnp.zeros((4, 2)), floor)
    expected = 1 / np.maximum(t, floor / path.scale)[:, None].repeat(2, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_floor_of_a_run_is_one_of_t():
    """The loss takes that of sigma, noise_scale t."""
    run = config.Config(name="x", objective=config.Objective(kind="mean_flow"))
    floors = []
    for run.process.noise_scale in (1.0, 2.0):
        floors.append(method(run, (8, 8, 1)).loss["floor"])
    assert floors == [run.process.loss_floor, 2 * run.process.loss_floor]


def test_targets_and_the_time_derivative_have_no_gradient(key):
    """The gradient is that of u and v alone, with all that they are compared with held fixed."""
    sampled, x0 = drawn(key)
    y, options = jnp.arange(6) % 3, dict(null=3, prediction="flow")

    def network(a):
        def denoise(z, t, y):
            h, scale = (column.reshape(-1, 1, 1, 1) for column in (t[:, 1], y.scalars[:, 0]))
            return WithVelocity(a * z * (1 + h + scale), a * z * (1 + y.y.reshape(-1, 1, 1, 1)))

        return denoise

    def loss(a):
        return meanflow.loss_at(sampled, network(a), Linear(), x0, y, **options)[0].sum()

    def by_hand(a):
        _, fixed = meanflow.velocities(sampled, network(0.7), Linear(), x0, y, **options)
        _, now = meanflow.velocities(sampled, network(a), Linear(), x0, y, **options)
        total, h = 0, (sampled.t - sampled.r).reshape(-1, 1, 1, 1)
        for found in (now.u + h * fixed.du_dt, now.v):
            square = jnp.square(found - fixed.guided).sum((1, 2, 3))
            total += (square / jax.lax.stop_gradient(square + 0.01)).sum()
        return total

    found, expected = jax.jit(jax.grad(loss))(0.7), jax.jit(jax.grad(by_hand))(0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert abs(found) > 1e-3


@pytest.mark.slow
def test_without_adaptive_weight_the_loss_is_a_sum_of_squares(key):
    sampled, x0 = drawn(key)
    value, aux = meanflow.loss_at(sampled, exact_network(Linear()), Linear(), x0, prediction="flow", power=0.0)
    np.testing.assert_allclose(value, 6 * (aux["mse"] + aux["velocity_mse"]), rtol=1e-5)


@pytest.mark.slow
def test_features_are_compared_below_a_time_only(key):
    sampled, x0 = drawn(key)
    options = dict(prediction="flow", features=lambda x: x[:, 0], feature_weight=2.0, feature_until=0.6)
    values = [
        meanflow.loss_at(sampled, exact_network(Linear()), Linear(), x0, **given)[0]
        for given in (options, {"prediction": "flow"})
    ]
    xt = noise(Linear(), x0, sampled.t, sampled.eps)
    u = exact_network(Linear())(xt, jnp.stack([sampled.t, sampled.t - sampled.r], -1), None).pred
    image = xt - sampled.t.reshape(-1, 1, 1, 1) * u
    error = 2 * jnp.square((image - x0)[:, 0]).mean((1, 2))
    np.testing.assert_allclose(values[0] - values[1], jnp.where(sampled.t < 0.6, error, 0), atol=1e-5)
    assert (sampled.t < 0.6).any() and (sampled.t >= 0.6).any()


@pytest.mark.slow
def test_what_is_drawn(key):
    n, x0 = 4000, jnp.zeros((4000, 1))
    found = meanflow.draw(key, x0, logit_normal_times(-0.4), instant=0.25, to_data=0.5, scale_max=4.0, drop=0.2)
    assert ((found.t >= found.r) & (found.r >= 0) & (found.t <= 1)).all()
    equal = found.t == found.r
    assert equal[: n // 4].all() and not equal[n // 4 :].any()
    np.testing.assert_array_equal(found.r == 0, np.arange(n) >= n // 4 + 3 * n // 8)
    assert (found.low[equal] == 0).all() and (found.high[equal] == 1).all()
    free = ~equal
    assert found.low[free].max() <= 0.5 <= found.high[free].min()
    np.testing.assert_allclose([found.low[free].mean(), found.high[free].mean()], [0.25, 0.75], atol=0.02)
    assert 0.17 < found.dropped.mean() < 0.23
    # Scales: uniform in log; and with another power their mean is that of the density.
    assert found.scale.min() >= 1 and found.scale.max() <= 4
    np.testing.assert_allclose(jnp.log(found.scale).mean(), np.log(4) / 2, atol=0.03)
    steep = meanflow.draw(jax.random.key(1), x0, scale_max=4.0, scale_power=3.0).scale
    np.testing.assert_allclose(steep.mean(), 1.6, atol=0.03)


def test_wrong_arguments_are_named():
    x0, weighted = jnp.zeros((2, 4, 4, 1)), lambda key, n: (jnp.ones(n), jnp.ones(n))
    for times, given, message in (
        (None, {"instant": 1.5}, r"instant=1\.5, to_data=0\.0 and drop=0\.1 must lie in"),
        (None, {"scale_max": 0.5}, r"scale_max=0\.5 must be at least 1"),
        (weighted, {}, "importance weights"),
    ):
        with pytest.raises(ValueError, match=message):
            meanflow.draw(jax.random.key(0), x0, times, **given)
    with pytest.raises(ValueError, match=r"scale=0\.5 must be at least 1, which is no guidance"):
        meanflow.guided(None, 0.5, 0.0, 1.0, x0)
    with pytest.raises(ValueError, match=r"needs a network with a second output, Task\(velocity=True\)"):
        meanflow.loss_at(meanflow.draw(jax.random.key(0), x0), lambda z, t, y: z, Linear(), x0, prediction="x0")


@pytest.mark.parametrize("labels", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_vision_transformer_is_such_a_network(key, labels):
    """Loss and sampler compile, the guidance scale reaches the prediction, and a dropped label hides the label."""
    model = vit(
        patch_size=4,
        width=8,
        depth=2,
        heads=2,
        times=2,
        clock="1 - t",
        scalars=3,
        velocity=True,
        num_classes=3 if labels else 0,
        velocity_depth=1 if labels else 0,
    )
    x0, y = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.array([0, 1, 2, 0]) if labels else None
    like = meanflow.guided(y, 1.0, 0.0, 1.0, x0)
    shapes = jax.eval_shape(model.init, key, x0, jnp.zeros((4, 2)), like)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), shapes)
    denoise = lambda params: lambda xt, t, y: model.apply(params, xt, t, y)  # noqa: E731
    sampled = meanflow.draw(jax.random.key(2), x0)

    def loss(params):
        return meanflow.loss_at(sampled, denoise(params), Linear(), x0, y, null=3, prediction="x0")[0].mean()

    grads = jax.jit(jax.grad(loss))(params)
    unused = [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(grads) if not (g != 0).any()]
    assert not unused

    @jax.jit
    def sampled_at(scale):
        told = meanflow.told(denoise(params), scale)
        keys = jax.random.key(3)
        return sample(keys, told, Linear(), x0, [1.0, 0.0], y, prediction="x0", sampler=meanflow.sampler())

    assert jnp.abs(sampled_at(1.0) - sampled_at(3.0)).max() > 1e-3
