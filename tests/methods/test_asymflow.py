"""Asymmetric flow: its ends are the x0 and the flow prediction, its velocity the paper's, and it samples a Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import grids, loss, predict, sample
from diffusion.methods import asymflow
from diffusion.patch import patchify
from diffusion.predict import WithVariance, convert
from diffusion.process import Cosine, Linear, coefficients, noise

SIZE, PATCH, D = (4, 6), 2, 12
PATHS = {"linear": Linear(), "scale 2": Linear(2.0), "cosine": Cosine()}


def basis(rank, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((D, D)))[0][:, :rank].astype(np.float32)


def project(rank):
    return asymflow.projection(basis(rank), PATCH)


@pytest.fixture
def drawn(key):
    x0, eps, pred = jax.random.normal(key, (3, 4, *SIZE, 3))
    return x0, jnp.array([0.02, 0.3, 0.7, 1.0]), eps, pred


@pytest.mark.parametrize("rank", [0, 5, D])
def test_a_projection_is_onto_the_columns_in_every_patch(drawn, rank):
    x, once = drawn[0], project(rank)(drawn[0])
    a = basis(rank)
    np.testing.assert_allclose(patchify(once, PATCH), patchify(x, PATCH) @ (a @ a.T), atol=1e-5)
    np.testing.assert_allclose(project(rank)(once), once, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("rank", "same"), [(0, "x0"), (D, "flow")])
def test_rank_0_is_x0_and_full_rank_is_flow_bit_for_bit(drawn, name, rank, same):
    """Target, velocity, loss and its gradient: none differs in one bit."""
    (x0, t, eps, pred), path = drawn, PATHS[name]
    coef = coefficients(path, t)
    np.testing.assert_array_equal(asymflow.target(project(rank), coef, x0, eps), predict.target(same, coef, x0, eps))
    denoise = lambda xt, t, y: pred  # noqa: E731
    known = denoise if same == "flow" else convert(denoise, path, "x0", "flow", 0.05)
    np.testing.assert_array_equal(asymflow.velocity(denoise, path, project(rank))(x0, t), known(x0, t, None))
    sampled = loss.Draw(t, eps, jnp.array([1.0, 2.0, 0.5, 1.5]))
    weight = None if same == "flow" else loss.measured_in("flow", "x0", 0.05)

    def ours(pred):
        return asymflow.loss_at(sampled, lambda xt, t, y: pred, path, x0, project=project(rank))

    def theirs(pred):
        return loss.loss_at(sampled, lambda xt, t, y: pred, path, x0, prediction=same, weight=weight)

    jax.tree.map(np.testing.assert_array_equal, ours(pred), theirs(pred))
    grads = (jax.grad(lambda pred, f=f: f(pred)[0].sum())(pred) for f in (ours, theirs))
    np.testing.assert_array_equal(*grads)


def test_the_velocity_is_the_papers(drawn):
    """u = P u_A + (I - P) (xt + u_A) / sigma with u_A = P eps - x0 on the linear path, eqs. 3 and 5 of 2605.12964."""
    x0, t, eps, pred = drawn
    p, xt = project(5), noise(Linear(), x0, t, eps)
    rest = lambda x: x - p(x)  # noqa: E731
    ours = asymflow.target(p, coefficients(Linear(), t), x0, eps)
    theirs = p(eps) - x0
    np.testing.assert_allclose(p(ours), p(theirs), atol=1e-5)
    np.testing.assert_allclose(rest(ours), -rest(theirs), atol=1e-5)
    u = p(pred) + rest(xt - rest(pred)) / t[:, None, None, None]
    found = asymflow.velocity(lambda *_: pred, Linear(), p, floor=0.0)(xt, t)
    np.testing.assert_allclose(found, u, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("rank", [3, 5])
def test_the_target_gives_the_velocity_of_the_path_and_no_loss(drawn, name, rank):
    (x0, t, eps, _), path = drawn, PATHS[name]
    coef, p = coefficients(path, t), project(rank)
    oracle = lambda xt, t, y: asymflow.target(p, coef, x0, eps)  # noqa: E731
    found = asymflow.velocity(oracle, path, p, floor=1e-3)(noise(path, x0, t, eps), t)
    np.testing.assert_allclose(found, predict.target("flow", coef, x0, eps), rtol=1e-3, atol=1e-3)
    assert float(asymflow.loss_at(loss.Draw(t, eps), oracle, path, x0, project=p)[0].max()) < 1e-9


def test_the_loss_is_the_squared_error_of_the_velocity(drawn):
    """Below the floor, where the first time lies, both velocities are divided by the floor, as in JiT's loss."""
    (x0, t, eps, pred), path, p = drawn, Linear(2.0), project(5)
    values, parts = asymflow.loss_at(loss.Draw(t, eps), lambda *_: pred, path, x0, project=p, floor=0.1)
    exact = asymflow.target(p, coefficients(path, t), x0, eps)
    xt = noise(path, x0, t, eps)
    a, b = (asymflow.velocity(lambda *_, x=x: x, path, p, floor=0.1)(xt, t) for x in (pred, exact))
    np.testing.assert_allclose(values, jnp.square(a - b).mean((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(parts["mse"], jnp.square(pred - exact).mean((1, 2, 3)), rtol=1e-5)


def test_it_samples_a_gaussian(key):
    """The exact denoiser of pixels whose channels are Gaussian: Heun's method finds their covariance."""
    path, p = Linear(), project(4)
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0], jnp.float32)
    variances = jnp.array([0.1, 0.5, 2.0])[None, None, None]  # along the columns of `turn`

    def denoise(xt, t, y):
        alpha, sigma = 1 - t[:, None, None, None], t[:, None, None, None]
        along = (xt @ turn) / (alpha**2 * variances + sigma**2)
        return asymflow.target(p, coefficients(path, t), alpha * (along * variances) @ turn.T, sigma * along @ turn.T)

    keys = sample.sample_keys(key, jnp.arange(20))
    x1 = sample.initial_noise(keys, (*SIZE, 3))
    flow = asymflow.velocity(denoise, path, p, floor=0.01)
    found = sample.sample(keys, flow, path, x1, grids.uniform_grid(40), prediction="flow", sampler=sample.heun())
    # The flow of a Gaussian is linear: x0 = covariance^(1/2) x1.
    np.testing.assert_allclose(found, (x1 @ turn * jnp.sqrt(variances)) @ turn.T, atol=0.03)


def test_principal_directions_are_the_left_singular_vectors_of_the_patches():
    rng = np.random.default_rng(0)
    scales = np.linspace(3, 0.1, D)
    tokens = (rng.standard_normal((50 * 6, D)) * scales + 0.5) @ basis(D, seed=3).T
    images = tokens.reshape(50, 2, 3, PATCH, PATCH, 3).transpose(0, 1, 3, 2, 4, 5).reshape(50, *SIZE, 3)
    found = asymflow.principal_directions(images, PATCH, 4)
    wanted = np.linalg.svd(tokens.T, full_matrices=False)[0][:, :4]
    np.testing.assert_allclose(np.abs(np.sum(found * wanted, 0)), 1, atol=1e-6)
    np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-6)
    assert asymflow.principal_directions(images, PATCH, 0).shape == (D, 0)
    assert asymflow.principal_directions(images, PATCH, D).shape == (D, D)


def test_the_whole_loss_draws_as_the_other_losses_do(drawn):
    x0, denoise = drawn[0], lambda xt, t, y: xt * t[:, None, None, None]
    ours, parts = asymflow.loss(jax.random.key(7), denoise, Linear(), x0, project=project(0))
    weight = loss.measured_in("flow", "x0")
    theirs, wanted = loss.loss(jax.random.key(7), denoise, Linear(), x0, prediction="x0", weight=weight)
    np.testing.assert_array_equal(ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, parts, wanted)


def test_what_does_not_fit_is_refused(drawn):
    x0, t, eps, _ = drawn
    with pytest.raises(ValueError, match=r"columns of a basis \(12, 3\) must be orthonormal"):
        asymflow.projection(2 * basis(3), PATCH)
    with pytest.raises(ValueError, match=r"patches of 3 values, size 1, do not fit a basis \(12, 3\)"):
        asymflow.projection(basis(3), 1)(x0)
    with pytest.raises(ValueError, match="rank=13 must lie in 0..12"):
        asymflow.principal_directions(np.zeros((2, *SIZE, 3)), PATCH, 13)
    at = loss.Draw(t, eps)
    for floor in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"floor={floor} must not be negative"):
            asymflow.velocity(None, Linear(), project(3), floor=floor)
        with pytest.raises(ValueError, match=f"floor={floor} must not be negative"):
            asymflow.loss_at(at, None, Linear(), x0, project=project(3), floor=floor)
    with pytest.raises(ValueError, match="learned variance"):
        asymflow.loss_at(at, lambda xt, t, y: WithVariance(xt, xt), Linear(), x0, project=project(3))
    with pytest.raises(ValueError, match=r"returned shape \(4, 4, 6, 1\)"):
        asymflow.loss_at(at, lambda xt, t, y: xt[..., :1], Linear(), x0, project=project(3))
