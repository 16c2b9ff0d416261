"""Editing, against normal data, where conditionals and flows are known, and against other programs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from diffusion import superres
from diffusion.grids import uniform_grid
from diffusion.methods import edit
from diffusion.predict import predictor
from diffusion.process import Cosine, Linear
from diffusion.sample import ancestral, ddim, dpmpp_2m, heun, initial_noise, sample, sample_keys
from diffusion.solvers import unipc
from tests.gaussians import COVARIANCE, MEAN, correlated
from tests.test_process import PATHS

PATH = Linear()


def three(key, b=4):
    return jax.random.normal(key, (b, 3, 1))


@pytest.mark.parametrize("sampler", [ddim(), ancestral()], ids=["ddim", "ancestral"])
def test_sdedit_of_full_strength_is_sampling_bit_for_bit(key, sampler):
    """Where alpha(1) = 0, whatever the image is."""
    times = edit.from_strength(uniform_grid(5), 1.0)
    np.testing.assert_array_equal(times, uniform_grid(5))
    options = {"prediction": "x0", "sampler": sampler}
    edited = edit.sdedit(key, correlated(PATH, "x0"), PATH, three(jax.random.key(1)), times, **options)
    keys = sample_keys(jax.random.clone(key), jnp.arange(4))
    x1 = initial_noise(keys, (3, 1))
    np.testing.assert_array_equal(edited, sample(keys, correlated(PATH, "x0"), PATH, x1, times, **options))


def test_sdedit_of_little_strength_is_the_image(key):
    x0 = three(jax.random.key(1))
    times = edit.from_strength(uniform_grid(10), 1e-3)
    edited = edit.sdedit(key, correlated(PATH, "x0"), PATH, x0, times, prediction="x0")
    np.testing.assert_allclose(edited, x0, atol=0.02)
    assert (edited != x0).any()


def test_sdedit_keeps_the_distribution_of_the_data_and_more_the_less_its_strength(key):
    x0 = jnp.asarray(np.random.default_rng(0).multivariate_normal(MEAN, COVARIANCE, 20_000), jnp.float32)[..., None]
    run = jax.jit(partial(edit.sdedit, prediction="x0"), static_argnums=(1, 2))
    correlations = []
    for strength in (0.2, 0.6):
        edited = run(key, correlated(PATH, "x0"), PATH, x0, edit.from_strength(uniform_grid(40), strength))[..., 0]
        np.testing.assert_allclose(edited.mean(0), MEAN, atol=0.02)
        np.testing.assert_allclose(np.cov(edited.T), COVARIANCE, atol=0.02)
        correlations.append(np.corrcoef(edited[:, 0], x0[:, 0, 0])[0, 1])
    assert correlations[0] > 0.9 > correlations[1] > 0.2


def test_the_strength_is_where_the_grid_begins():
    np.testing.assert_allclose(edit.from_strength(uniform_grid(5), 0.5), [0.5, 0.4, 0.2, 0])
    np.testing.assert_allclose(edit.from_strength(uniform_grid(5), 0.4), [0.4, 0.2, 0])
    for strength in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"strength={strength} must lie in \(0, 1\]"):
            edit.from_strength(uniform_grid(5), strength)


# The steps of a chain, from the noisiest, as RePaintScheduler of diffusers 0.42.1 has them, by steps, jump, resamples.
SCHEDULES = {
    (6, 2, 2): [5, 4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0],
    (7, 3, 3): [6, 5, 4, 3, 4, 5, 6, 5, 4, 3, 4, 5, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0],
    (5, 1, 2): [4, 3, 4, 3, 2, 3, 2, 1, 2, 1, 0, 1, 0],
    (4, 10, 10): [3, 2, 1, 0],
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_the_times_are_those_of_another_program(case):
    steps, jump, resamples = case
    found = edit.repaint_times(np.arange(steps, -1, -1.0), jump, resamples) - 1  # its last index is 0, then the data
    np.testing.assert_array_equal(found, [*SCHEDULES[case], -1])


def test_one_pass_takes_the_grid_itself():
    np.testing.assert_array_equal(edit.repaint_times(uniform_grid(25), 10, 1), uniform_grid(25))
    for jump, resamples in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"jump={jump} and resamples={resamples} must be at least 1"):
            edit.repaint_times(uniform_grid(5), jump, resamples)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "path"),
    [(ddim(), PATH), (ancestral(), PATH), (dpmpp_2m(), PATH), (ddim(), PATHS["linear, scale 2"])],
    ids=["ddim", "ancestral", "dpmpp_2m", "ddim, scale 2"],
)
def test_with_nothing_known_and_one_pass_it_is_sampling(key, sampler, path):
    known, mask, options = (
        three(jax.random.key(1)),
        jnp.zeros((1, 3, 1), bool),
        {"prediction": "x0", "sampler": sampler},
    )
    painted = edit.repaint(key, correlated(path, "x0"), path, known, mask, uniform_grid(5), **options)
    keys = sample_keys(jax.random.clone(key), jnp.arange(4))
    x1 = initial_noise(keys, (3, 1), path, 1.0)
    sampled = sample(keys, correlated(path, "x0"), path, x1, uniform_grid(5), **options)
    np.testing.assert_allclose(painted, sampled, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", pytest.param("vp", marks=pytest.mark.slow), "geometric"])
def test_known_pixels_are_kept_exactly(key, name):
    path, known, mask = PATHS[name], three(jax.random.key(1)), jnp.array([True, False, True]).reshape(1, 3, 1)
    times = edit.repaint_times(uniform_grid(6), 2, 2)
    run = jax.jit(partial(edit.repaint, prediction="x0"), static_argnums=(1, 2))
    painted = run(key, correlated(path, "x0"), path, known, mask, times)
    np.testing.assert_array_equal(painted[:, [0, 2]], known[:, [0, 2]])
    assert (painted[:, 1] != known[:, 1]).all()
    # What is under the mask is not read.
    other = run(key, correlated(path, "x0"), path, jnp.where(mask, known, 9), mask, times)
    np.testing.assert_array_equal(painted, other)


@pytest.mark.slow
def test_repetitions_bring_what_is_painted_to_the_exact_conditional(key):
    """Values 0 and 2 are known; value 1 has a known mean and variance given them."""
    x = np.array([1.2, 0.0, -0.6])
    mask = jnp.array([True, False, True]).reshape(1, 3, 1)
    c, seen = COVARIANCE, [0, 2]
    gain = np.linalg.solve(c[np.ix_(seen, seen)], c[seen, 1])
    mean, variance = MEAN[1] + gain @ (x - MEAN)[seen], c[1, 1] - gain @ c[seen, 1]
    known = jnp.broadcast_to(jnp.asarray(x, jnp.float32).reshape(1, 3, 1), (4000, 3, 1))
    run = jax.jit(partial(edit.repaint, prediction="x0", sampler=heun()), static_argnums=(1, 2))
    errors = []
    for resamples in (1, 10):
        times = edit.repaint_times(uniform_grid(40), 4, resamples)
        painted = np.asarray(run(key, correlated(PATH, "x0"), PATH, known, mask, times))[:, 1, 0]
        errors.append([abs(painted.mean() - mean), abs(painted.var() - variance)])
    # Without repetition the mean is off by 0.20, of a standard deviation of 0.39.
    assert errors[1][0] < min(0.06, errors[0][0] / 3)
    assert errors[1][1] < 0.03


@pytest.mark.slow
def test_with_nothing_known_repetitions_keep_the_distribution(key):
    """The noise that is added on the way back is that of the process."""
    known, mask = jnp.zeros((8000, 3, 1)), jnp.zeros((1, 3, 1), bool)
    times = edit.repaint_times(uniform_grid(40, last=0.02), 5, 4)
    run = jax.jit(partial(edit.repaint, prediction="x0", sampler=heun()), static_argnums=(1, 2))
    painted = np.asarray(run(key, correlated(PATH, "x0"), PATH, known, mask, times))[..., 0]
    np.testing.assert_allclose(painted.mean(0), MEAN, atol=0.03)
    np.testing.assert_allclose(np.cov(painted.T), COVARIANCE, atol=0.03)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((1, 3, 1), np.uint8), "mask must be boolean, true where a pixel is known, not uint8"),
        (np.ones((1, 4, 1), bool), r"mask of shape \(1, 4, 1\) must broadcast to images \(4, 3, 1\)"),
        (np.ones((3,), bool), r"mask of shape \(3,\) must broadcast"),
        (np.ones((4, 3, 2), bool), r"mask of shape \(4, 3, 2\) must broadcast"),
    ],
)
def test_masks_that_do_not_fit_are_refused(key, mask, message):
    with pytest.raises(ValueError, match=message):
        edit.repaint(key, None, PATH, three(jax.random.key(1)), mask, uniform_grid(3), prediction="x0")


@pytest.mark.parametrize("times", [[0.0, 1.0], [0.5, 0.8, 0.0], [1.0, 0.5], [1.0, 1.0, 0.0], [[1.0], [0.0]], [1.0]])
def test_times_that_do_not_lead_from_noise_to_data_are_refused(key, times):
    known, mask = three(jax.random.key(1)), np.ones((1, 3, 1), bool)
    with pytest.raises(ValueError, match="none above the first, that ends at 0, see `repaint_times`, not of shape"):
        edit.repaint(key, None, PATH, known, mask, times, prediction="x0")


@pytest.mark.slow
@pytest.mark.parametrize("path", [Linear(), Cosine()], ids=["linear", "cosine"])
def test_inversion_and_back_differ_by_the_error_of_the_sampler(path):
    x0 = three(jax.random.key(1))
    errors = []
    for steps in (10, 20):
        times = np.linspace(1, 0.02, steps + 1)
        run = jax.jit(lambda x0, times=times: edit.round_trip(correlated(path, "x0"), path, x0, times, prediction="x0"))
        _, again = run(x0)
        errors.append(float(jnp.abs(again - x0).max()))
    assert errors[1] < errors[0] / 3 and errors[1] < 0.01, "Heun's method is of second order"
    with pytest.raises(ValueError, match="this sampler adds noise, which cannot be inverted"):
        edit.round_trip(correlated(path, "x0"), path, x0, times, prediction="x0", sampler=ancestral())


# Operators on images [B, 4, 1] and the standard deviation of the noise on what they measure.
OPERATORS = {
    "mask": edit.masked(jnp.array([True, False, True, False]).reshape(1, 4, 1)),
    "downscale": edit.downscale(2),
    "blur": edit.blur(0.8),
}


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("name", OPERATORS)
def test_samples_given_measurements_are_those_of_the_exact_posterior(name, prediction):
    """Data N(m, v I). The flow is an affine map of x1: its value at 0 and at unit vectors is mean and covariance."""
    operator, noise, m, v = OPERATORS[name], 0.2, np.array([0.3, -0.2, 0.5, 0.1]), 0.5
    a = np.stack([np.asarray(operator(jnp.eye(4)[i].reshape(1, 4, 1))).ravel() for i in range(4)], 1)
    b = np.array([0.9, -0.3, 0.4, -0.7])[: len(a)] if name != "mask" else np.array([0.9, 0, 0.4, 0])
    gain = v * a.T @ np.linalg.inv(v * a @ a.T + noise**2 * np.eye(len(a)))
    mean, covariance = m + gain @ (b - a @ m), v * (np.eye(4) - gain @ a)
    with jax.enable_x64(True):
        denoise = edit.given(
            correlated(PATH, prediction, m, v * np.eye(4)),
            PATH,
            prediction,
            operator,
            jnp.asarray(b)[None, :, None].repeat(5, 0),
            deviation=noise,
            spread=edit.gaussian_spread(PATH, v),
        )
        x1 = jnp.concatenate([jnp.zeros((1, 4)), jnp.eye(4)])[..., None]
        times = uniform_grid(60, start=0.9999) if prediction == "x0" else uniform_grid(60, start=0.9999, last=1e-3)
        found = jax.jit(partial(sample, prediction=prediction, sampler=heun()), static_argnums=(1, 2))(
            jax.random.key(0), denoise, PATH, x1, times
        )
    found = np.asarray(found)[..., 0]
    columns = (found[1:] - found[0]).T
    np.testing.assert_allclose(found[0], mean, atol=3e-3)
    np.testing.assert_allclose(columns @ columns.T, covariance, atol=3e-3)


def test_without_a_spread_it_is_the_gradient_of_the_squared_residual():
    """Chung et al. 2022, eq. 16: score + grad log N(b; A x0_hat, noise^2), by finite differences."""
    noise, t = 0.3, np.array([0.4, 0.7])
    x, b = np.random.default_rng(0).normal(size=(2, 2, 3, 1))
    operator, denoise = edit.blur(0.7), correlated(PATH, "flow")
    with jax.enable_x64(True):

        def estimates(x, guided=False):
            used = edit.given(denoise, PATH, "flow", operator, jnp.asarray(b), deviation=noise) if guided else denoise
            now = predictor(used, PATH, "flow")(x, jnp.asarray(t))
            return now.x0, now.eps, -0.5 / noise**2 * jnp.square(b - operator(now.x0)).sum((1, 2))

        run = jax.jit(estimates, static_argnums=1)
        after, before = (jax.tree.map(np.asarray, run(jnp.asarray(x), guided)) for guided in (True, False))
        h, slope = 1e-5, np.zeros(x.shape)
        for i in range(3):
            one = np.zeros(x.shape)
            one[:, i] = h
            slope[:, i, 0] = np.asarray(run(jnp.asarray(x + one))[2] - run(jnp.asarray(x - one))[2]) / (2 * h)
    sigma, alpha = t.reshape(2, 1, 1), 1 - t.reshape(2, 1, 1)
    np.testing.assert_allclose(after[1], before[1] - sigma * slope, rtol=1e-6)
    np.testing.assert_allclose(after[0], before[0] + sigma**2 / alpha * slope, rtol=1e-6)
    with pytest.raises(ValueError, match="deviation=0 must be positive"):
        edit.given(denoise, PATH, "flow", operator, jnp.asarray(b), deviation=0)


def test_a_step_of_dps_is_that_of_a_pytorch_program():
    """Algorithm 1, lines 5 to 7, for a small network, by PyTorch's own differentiation."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    w, u, xt, b = rng.normal(size=(6, 8)), rng.normal(size=(8, 6)), rng.normal(size=(2, 6)), rng.normal(size=(2, 3))
    t, s, scale, path = 0.6, 0.55, 0.7, Cosine()
    network = lambda x: jnp.tanh(x[..., 0] @ w) @ u  # noqa: E731
    with jax.enable_x64(True):
        sampler = edit.dps(ddim(), edit.downscale(2), jnp.asarray(b)[..., None], scale)
        predict = predictor(lambda x, t, y: network(x)[..., None], path, "eps")
        step = jax.jit(lambda x: sampler.step(None, predict, path, x, jnp.float64(t), jnp.float64(s), ())[0])
        ours = np.asarray(step(jnp.asarray(xt)[..., None]))
    x = torch.tensor(xt, requires_grad=True)
    (alpha, sigma), (alpha_s, sigma_s) = ((np.cos(np.pi / 2 * v), np.sin(np.pi / 2 * v)) for v in (t, s))
    eps = torch.tanh(x @ torch.tensor(w)) @ torch.tensor(u)
    x0 = (x - sigma * eps) / alpha
    norms = torch.linalg.vector_norm(torch.tensor(b) - x0.reshape(2, 3, 2).mean(-1), dim=1)
    (slope,) = torch.autograd.grad(norms.sum(), x)
    theirs = alpha_s * x0 + sigma_s * eps - scale * slope
    np.testing.assert_allclose(ours[..., 0], theirs.detach().numpy(), rtol=1e-9)


@pytest.mark.slow
def test_dps_meets_the_measurement_and_moves_what_depends_on_it(key):
    """The first of three correlated values is measured; the others follow it as they do in the data."""
    mask, b = jnp.array([True, False, False]).reshape(1, 3, 1), 1.5
    known = jnp.full((2000, 3, 1), b)
    sampler = edit.dps(ancestral(), edit.masked(mask), jnp.where(mask, known, 0), 0.05)
    keys = sample_keys(key, jnp.arange(2000))
    run = jax.jit(partial(sample, prediction="x0", sampler=sampler), static_argnums=(1, 2))
    found = np.asarray(run(keys, correlated(PATH, "x0"), PATH, initial_noise(keys, (3, 1)), uniform_grid(200)))[..., 0]
    exact = MEAN + COVARIANCE[:, 0] / COVARIANCE[0, 0] * (b - MEAN[0])
    np.testing.assert_allclose(found[:, 0], b, atol=0.1)
    np.testing.assert_allclose(found.mean(0)[1:], exact[1:], atol=0.15)


@pytest.mark.slow
def test_dps_reaches_a_sampler_that_corrects_its_last_step(key):
    """One that made that step again, from what it remembers of it, would undo the step of dps."""
    mask, b = jnp.array([True, False, False]).reshape(1, 3, 1), jnp.zeros((8, 3, 1)).at[:, 0].set(1.5)
    guided = edit.dps(unipc(3), edit.masked(mask), b, 0.1)
    x1 = initial_noise(sample_keys(key, jnp.arange(8)), (3, 1))
    found = sample(key, correlated(PATH, "x0"), PATH, x1, uniform_grid(50, 0.98), prediction="x0", sampler=guided)
    assert float(jnp.square(found[:, 0] - 1.5).mean()) ** 0.5 < 0.15


def test_measurements_that_are_met_exactly_have_no_slope():
    sampler = edit.dps(ddim(), lambda x: 0 * x, jnp.zeros((1, 3, 1)), 1.0)
    run = lambda sampler: jax.jit(  # noqa: E731
        lambda xt: sample(
            jax.random.key(0), correlated(PATH, "x0"), PATH, xt, uniform_grid(2), prediction="x0", sampler=sampler
        )
    )(three(jax.random.key(1)))
    np.testing.assert_array_equal(run(sampler), run(ddim()))


@pytest.mark.parametrize("shape", [(9,), (6, 5), (4, 3, 5)])
@pytest.mark.parametrize("deviation", [0.6, 2.0])
def test_blur_is_that_of_scipy(key, shape, deviation):
    x = jax.random.normal(key, (2, *shape, 3))
    sigmas = (0, *[deviation] * len(shape), 0)
    theirs = scipy.ndimage.gaussian_filter(np.asarray(x, np.float64), sigmas, mode="reflect")
    np.testing.assert_allclose(edit.blur(deviation)(x), theirs, atol=1e-5)
    with pytest.raises(ValueError, match="deviation=0 must be positive"):
        edit.blur(0)


def test_downscaling_averages_blocks_of_any_rank(key):
    x = jax.random.normal(key, (2, 4, 6, 3))
    np.testing.assert_allclose(edit.downscale(2)(x), superres.shrink(x, (2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(edit.downscale(3)(x[:, 0]), x[:, 0].reshape(2, 2, 3, 3).mean(2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        edit.downscale(2)(x[:, None].repeat(2, 1))[:, 0], superres.shrink(x, (2, 3)), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"factor=4 must divide the images' size \(4, 6\)"):
        edit.downscale(4)(x)


def test_results_do_not_depend_on_the_batch(key):
    """Conjugate gradients are of each example by itself."""
    operator, b, xt, t = edit.blur(1.0), three(jax.random.key(1)), three(jax.random.key(2)), jnp.linspace(0.2, 0.9, 4)
    spread = edit.gaussian_spread(PATH, 0.3)

    @jax.jit
    def run(b, xt, t):
        options = {"deviation": 0.1, "spread": spread, "iterations": 4}
        return edit.given(correlated(PATH, "x0"), PATH, "x0", operator, b, **options)(xt, t)

    np.testing.assert_allclose(run(b, xt, t)[2:3], run(b[2:3], xt[2:3], t[2:3]), rtol=1e-5, atol=1e-6)
