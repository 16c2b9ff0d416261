"""Distillation from the exact denoiser of a Gaussian, whose flow is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.loss import Draw, loss_at
from diffusion.methods import distill
from diffusion.predict import convert, predictor
from diffusion.process import Cosine, Linear, expand, noise
from diffusion.sample import ancestral, ddim, heun, sample
from tests.test_sample import MEAN, SCALE, exact_flow, gaussian_denoiser

PATHS = {"linear": Linear(), "cosine": Cosine()}
T, S = jnp.float32([1.0, 0.8, 0.5, 0.25]), jnp.float32([0.75, 0.5, 0.0, 0.125])
SHAPE = (4, 3, 2, 1)


def flow(path, xt, t, s):
    """Where the exact flow takes xt from time t to s: the quantile is kept."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (tuple(expand(a, xt) for a in path(time)) for time in (t, s))
    deviation = lambda alpha, sigma: jnp.hypot(alpha * SCALE, sigma)  # noqa: E731
    return alpha_s * MEAN + deviation(alpha_s, sigma_s) / deviation(alpha_t, sigma_t) * (xt - alpha_t * MEAN)


def exact_student(path):
    """f of a perfect consistency model: an x0 prediction."""
    return lambda xt, t, y=None: flow(path, xt, t, jnp.zeros_like(t))


@pytest.mark.parametrize("name", PATHS)
def test_one_step_of_the_student_is_two_of_the_teacher(key, name):
    path, xt = PATHS[name], jax.random.normal(key, SHAPE)
    teacher = predictor(gaussian_denoiser(path, "v"), path, "v")
    found = distill.two_steps(teacher, path, xt, T, S)
    step = lambda predict, x, t, s: ddim().step(None, predict, path, x, t, s, ())[0]  # noqa: E731
    twice = step(teacher, step(teacher, xt, T, (T + S) / 2), (T + S) / 2, S)
    np.testing.assert_allclose(step(lambda *_: found, xt, T, S), twice, atol=2e-6)
    np.testing.assert_allclose(noise(path, found.x0, T, found.eps), xt, atol=2e-6)
    assert jnp.abs(found.x0 - teacher(xt, T).x0).max() > 0.01  # two steps are not one


def test_the_ordinary_loss_of_a_student_that_learned_it_is_zero(key):
    path, xt = Linear(), jax.random.normal(key, SHAPE)
    found = distill.two_steps(predictor(gaussian_denoiser(path, "v"), path, "v"), path, xt, T, S)
    student = convert(lambda *_: found.x0, path, "x0", "flow")
    value, _ = loss_at(Draw(T, found.eps), student, path, found.x0, prediction="flow")
    assert value.max() < 1e-9
    value, _ = loss_at(Draw(T, found.eps), gaussian_denoiser(path, "flow"), path, found.x0, prediction="flow")
    assert value.max() > 1e-4


def test_repeated_halving_ends_at_the_exact_flow(key):
    """A chain of perfect students, 8 steps to 1: what the last one predicts at t = 1 is where 8 steps lead."""
    path, x1 = Linear(), jax.random.normal(key, (5, 2))
    student, n = gaussian_denoiser(path, "x0"), 8
    many = sample(key, student, path, x1, np.linspace(1, 0, n + 1), prediction="x0")
    while n > 1:
        n //= 2
        teacher = predictor(student, path, "x0")

        def student(xt, t, y=None, teacher=teacher, n=n):
            return distill.two_steps(teacher, path, xt, t, t - 1 / n).x0

    once = jax.jit(student)(x1, jnp.ones(5))
    np.testing.assert_allclose(once, many, atol=1e-5)
    assert jnp.abs(gaussian_denoiser(path, "x0")(x1, jnp.ones(5)) - many).max() > 0.1


@pytest.mark.parametrize("name", PATHS)
def test_a_perfect_consistency_model_has_a_loss_that_vanishes_with_the_step(key, name):
    path, xt = PATHS[name], jax.random.normal(key, SHAPE)
    teacher = predictor(gaussian_denoiser(path, "v"), path, "v")
    f = exact_student(path)

    def error(n, solver):
        t = jnp.float32([1.0, 0.75, 0.5, 1 / n])
        wanted = distill.consistency_target(teacher, predictor(f, path, "x0"), path, xt, t, t - 1 / n, solver=solver)
        _, aux = distill.consistency_loss_at(f, path, xt, t, t - 1 / n, wanted, prediction="x0")
        return np.sqrt(np.asarray(aux["mse"]))[:3].max()

    first, second = ([error(n, solver) for n in (8, 32)] for solver in (ddim(), None))
    # The local error of a step h is h^2, or h^3 for the default, Heun's.
    assert 10 < first[0] / first[1] < 28 and 40 < second[0] / second[1] < 110


def test_the_end_of_the_path_is_the_boundary_condition(key):
    """At s = 0 nothing of the student is left in the target, or a student that is constant would be perfect."""
    path, xt = Linear(), jax.random.normal(key, SHAPE)
    teacher, s = predictor(gaussian_denoiser(path, "x0"), path, "x0"), jnp.float32([0.1, 0.0, 0.1, 0.0])
    nan = lambda x, t: teacher(x, t)._replace(x0=jnp.full_like(x, jnp.nan))  # noqa: E731
    found = distill.consistency_target(teacher, nan, path, xt, s + 0.1, s, solver=ddim())
    np.testing.assert_array_equal(jnp.isnan(found).any((1, 2, 3)), s > 0)
    np.testing.assert_allclose(found[1], teacher(xt, s + 0.1).x0[1], atol=1e-6)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_an_anchored_network_returns_its_input_at_the_end(key, name, prediction):
    path, t = PATHS[name], jnp.float32([0.0, 0.001, 0.5, 1.0])
    xt = jax.random.normal(key, SHAPE)
    constant = convert(lambda xt, t, y: jnp.full_like(xt, 3.0), path, "x0", prediction)
    denoise = distill.anchored(constant, path, prediction, data_std=0.5)
    x0 = np.asarray(predictor(denoise, path, prediction)(xt, t).x0)
    np.testing.assert_allclose(x0[0], xt[0], atol=1e-5)
    np.testing.assert_allclose(x0[1], xt[1], atol=0.01)
    np.testing.assert_allclose(x0[3], 3.0, atol=1e-4)
    # At equal scales of signal and noise c is d^2 / (d^2 + 1) = 1/5.
    np.testing.assert_allclose(x0[2], 0.2 * xt[2] / path(0.5)[0] + 0.8 * 3, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_distilled_is_refused(key):
    """At t = 1 the x0 of an eps prediction is 0, whatever xt is."""
    with pytest.raises(ValueError, match="prediction='eps' does not determine x0 at t = 1"):
        distill.anchored(None, Linear(), "eps")
    with pytest.raises(ValueError, match=r"data_std=0\.0, the standard deviation of the data, must be positive"):
        distill.anchored(None, Linear(), "x0", data_std=0.0)
    path, xt = Linear(), jax.random.normal(key, SHAPE)
    teacher = predictor(gaussian_denoiser(path, "x0"), path, "x0")
    with pytest.raises(ValueError, match="adds noise, which cannot be inverted or distilled"):
        distill.consistency_target(teacher, teacher, path, xt, T, S, solver=ancestral())


def test_no_gradient_flows_through_the_target(key):
    path, xt = Linear(), jax.random.normal(key, SHAPE)
    teacher = predictor(gaussian_denoiser(path, "x0"), path, "x0")

    def of(a):
        student = predictor(lambda x, t, y: a * x, path, "x0")
        return distill.consistency_target(teacher, student, path, xt, T, S).sum()

    assert jax.grad(of)(1.0) == 0


def test_the_grid_is_refined_during_training():
    t, counts = jnp.float32([1e-6, 0.3, 0.999, 1.0]), []
    for step in (0, 99, 100, 250, 800, 1000):
        now, after = distill.consistency_times(jnp.int32(step), t, steps=800, first=10, last=1280)
        counts.append(round(1 / float(now[0] - after[0])))
        assert (now >= t).all() and now[-1] == 1 and after[0] == 0 and (after >= 0).all()
    assert counts == [10, 10, 20, 40, 1280, 1280]
    with pytest.raises(ValueError, match="first=20 must be at least 1 and at most last=10"):
        distill.consistency_times(jnp.int32(0), t, steps=10, first=20, last=10)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_perfect_consistency_model_samples_the_data(key, steps):
    path, n = Linear(), 20_000
    x1 = jax.random.normal(jax.random.fold_in(key, 1), (n, 1))
    x0 = sample(
        key,
        exact_student(path),
        path,
        x1,
        np.linspace(1, 0, steps + 1),
        prediction="x0",
        sampler=distill.consistency(),
    )
    np.testing.assert_allclose([x0.mean(), x0.std()], [MEAN, SCALE], atol=0.01)
    if steps == 1:
        np.testing.assert_allclose(x0, exact_flow(path, x1), atol=1e-5)


def test_heun_is_the_default_solver(key):
    path, xt = Linear(), jax.random.normal(key, SHAPE)
    teacher = predictor(gaussian_denoiser(path, "x0"), path, "x0")
    given = distill.consistency_target(teacher, teacher, path, xt, T, S, solver=heun())
    np.testing.assert_array_equal(distill.consistency_target(teacher, teacher, path, xt, T, S), given)
