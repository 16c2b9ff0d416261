"""From parts to a training step: what is random in a batch, its loss, and what is kept and reported."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion import guide, sharding, superres, times, train
from diffusion import loss as losses
from diffusion.methods import distill, meanflow
from diffusion.predict import Predict, predictor
from diffusion.process import noise
from experiments.methods import Consistency, MeanFlow, Progressive, features
from experiments.parts import Parts, to_float


class Objective(NamedTuple):
    """The loss of a run, in the pieces that `train.make_step` takes; a batch is {"x": [B, *S, C], "y": [B]}."""

    draw: train.DrawFn  # (key, batch, state) -> all that is random: noise, times, dropped labels
    loss: train.LossFn  # (params, key, drawn) -> (mean, {"loss": [B], "t": [B], ...})
    report: train.ReportFn


def objective(parts: Parts, *, training: bool = True) -> Objective:
    """The objective of a run; without `training`: no dropped labels, no dropout, and times that ignore the history."""
    kinds = {MeanFlow: mean_flow, Progressive: progressive, Consistency: consistency}
    return kinds.get(type(parts.method), denoising)(parts, training)


def denoising(parts: Parts, training: bool) -> Objective:
    """The weighted squared error of `loss`."""

    def draw(key: jax.Array, batch: dict[str, jax.Array], state: train.State | None) -> dict[str, Any]:
        key_loss, key_labels, key_condition = jax.random.split(key, 3)
        x0 = jnp.repeat(to_float(parts, batch["x"]), parts.repeat, 0)
        drawn = {"x0": x0}
        if parts.spec.num_classes:
            y = jnp.repeat(batch["y"], parts.repeat, 0)
            rate = parts.label_drop if training else 0.0
            drawn["y"] = guide.drop_condition(key_labels, y, parts.spec.num_classes, rate)
        if parts.superres:
            drawn["conditioning"] = conditioning(parts, key_condition, x0)
        follow = training and parts.history is not None
        now = times.history_times(state.carry) if follow else parts.times
        return drawn | {"at": losses.draw(key_loss, x0, now)}

    def loss(params: Any, key: jax.Array, drawn: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        denoise = partial(parts.model.apply, params, key=key if training and parts.dropout else None)
        if parts.superres:
            denoise = superres.conditioned(denoise, drawn["conditioning"])
        values, aux = losses.loss_at(
            drawn["at"],
            denoise,
            parts.path,
            drawn["x0"],
            drawn.get("y"),
            prediction=parts.prediction,
            weight=parts.weight,
            space=parts.space,
            vlb=parts.vlb,
        )
        return values.mean(), aux

    def report(aux: dict[str, jax.Array], carry: Any) -> tuple[dict[str, jax.Array], Any]:
        metrics = by_quartile(aux["t"], aux["loss"])
        metrics |= {name: aux[name].mean() for name in ("mse", "vlb") if name in aux}
        if parts.history is not None:
            carry = times.remember(carry, aux["t"], aux["loss"])
        return metrics, carry

    return Objective(draw, loss, report)


def mean_flow(parts: Parts, training: bool) -> Objective:
    """The loss of `meanflow`; without `training` the mean square of V - v_g, since the loss itself hardly changes."""
    # Loaded here, so that sampling does without them.
    options = parts.method.loss | {"features": features(parts.method.loss["features"], *parts.value_range)}

    def draw(key: jax.Array, batch: dict[str, jax.Array], state: train.State | None) -> dict[str, Any]:
        del state
        drawn, drop = _examples(parts, batch), parts.label_drop if training else 0.0
        return drawn | {"at": meanflow.draw(key, drawn["x0"], parts.times, drop=drop, **parts.method.draw)}

    def loss(params: Any, key: jax.Array, drawn: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        values, aux = meanflow.loss_at(
            drawn["at"],
            partial(parts.model.apply, params, key=key if training and parts.dropout else None),
            parts.path,
            drawn["x0"],
            drawn.get("y"),
            null=parts.spec.num_classes,
            prediction=parts.prediction,
            **options,
        )
        return (values if training else aux["loss"]).mean(), aux

    def report(aux: dict[str, jax.Array], carry: Any) -> tuple[dict[str, jax.Array], Any]:
        means = {name: aux[name].mean() for name in ("mse", "velocity_mse")}
        return by_quartile(aux["t"], aux["loss"]) | means, carry

    return Objective(draw, loss, report)


def progressive(parts: Parts, training: bool) -> Objective:
    """The loss of `denoising` with image and noise of `distill.two_steps`, at the times of the sampling grid."""
    denoise = denoising(parts, training)

    def draw(key: jax.Array, batch: dict[str, jax.Array], state: train.State) -> dict[str, Any]:
        drawn, (key_t, key_eps) = _examples(parts, batch), jax.random.split(key)
        x0, grid = drawn["x0"], jnp.asarray(parts.grid, drawn["x0"].dtype)
        i = jax.random.randint(key_t, (len(x0),), 0, len(grid) - 1)
        t, s = grid[i], grid[i + 1]
        xt = noise(parts.path, x0, t, jax.random.normal(key_eps, x0.shape))
        found = distill.two_steps(_teacher(parts, state, drawn), parts.path, xt, t, s)
        return drawn | {"x0": found.x0, "at": losses.Draw(t, found.eps)}

    return denoise._replace(draw=draw)


def consistency(parts: Parts, training: bool) -> Objective:
    """The loss of `distill.consistency_loss_at`."""
    del training  # there is no validation: it would need the teacher

    def draw(key: jax.Array, batch: dict[str, jax.Array], state: train.State) -> dict[str, Any]:
        drawn, (key_t, key_eps) = _examples(parts, batch), jax.random.split(key)
        x0, y = drawn.pop("x0"), drawn.get("y")
        t, s = distill.consistency_times(state.step, parts.times(key_t, len(x0)), **parts.method.times)
        xt = noise(parts.path, x0, t, jax.random.normal(key_eps, x0.shape))
        student = predictor(partial(parts.image_model.apply, state.params), parts.path, parts.prediction, y)
        wanted = distill.consistency_target(_teacher(parts, state, drawn), student, parts.path, xt, t, s)
        return drawn | {"xt": xt, "t": t, "s": s, "wanted": wanted}

    def loss(params: Any, key: jax.Array, drawn: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        denoise = partial(parts.image_model.apply, params, key=key if parts.dropout else None)
        given = (drawn[name] for name in ("xt", "t", "s", "wanted"))
        values, aux = distill.consistency_loss_at(
            denoise, parts.path, *given, drawn.get("y"), prediction=parts.prediction
        )
        return values.mean(), aux

    def report(aux: dict[str, jax.Array], carry: Any) -> tuple[dict[str, jax.Array], Any]:
        return by_quartile(aux["t"], aux["mse"], "mse") | {"mse": aux["mse"].mean()}, carry

    return Objective(draw, loss, report)


def _examples(parts: Parts, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Images {"x0": [B, *S, C]} in the network's range of values, and their labels "y" [B] if it is conditional."""
    x0 = jnp.repeat(to_float(parts, batch["x"]), parts.repeat, 0)
    return {"x0": x0} | ({"y": jnp.repeat(batch["y"], parts.repeat, 0)} if parts.spec.num_classes else {})


def _teacher(parts: Parts, state: train.State, drawn: dict[str, Any]) -> Predict:
    """The network whose parameters the state carries, with its guidance and the thresholds of sampling."""
    denoise = partial(parts.model.apply, state.carry)
    if parts.spec.num_classes:
        denoise = parts.method.guidance(denoise, parts.spec.num_classes)
    denoise = denoise if parts.threshold is None else parts.threshold(denoise)
    return predictor(denoise, parts.path, parts.prediction, drawn.get("y"))


def make_step(parts: Parts) -> train.StepFn:
    """(key, state, batch) -> (state, metrics): one step of training."""
    pieces = objective(parts)
    return train.make_step(
        pieces.loss,
        parts.optimizer,
        ema_decay=parts.ema,
        ema_warmup=parts.ema_warmup,
        draw=pieces.draw,
        report=pieces.report,
        microbatch=parts.microbatch,
        gammas=parts.gammas,
    )


def sharded_step(parts: Parts, mesh: jax.sharding.Mesh, placed: train.State) -> train.StepFn:
    """`make_step`, compiled for a mesh, with a state that lies and stays where `placed` says, and is given away."""
    step = make_step(parts)

    def on_mesh(key: jax.Array, state: train.State, batch: Any) -> tuple[train.State, dict[str, jax.Array]]:
        with sharding.in_use(mesh):
            return step(key, state, batch)

    return jax.jit(on_mesh, donate_argnums=1, out_shardings=(placed, sharding.whole(mesh)))


def init_state(parts: Parts, params: Any) -> train.State:
    """The state before the first of these steps. In distillation it carries the teacher, which is `params`."""
    distilled = isinstance(parts.method, Progressive | Consistency)
    return train.init_state(
        params,
        parts.optimizer,
        ema_decay=parts.ema,
        log2_scale=parts.log2_scale,
        carry=jax.tree.map(jnp.array, params) if distilled else parts.history,
        gammas=parts.gammas,
    )


def conditioning(parts: Parts, key: jax.Array, x0: jax.Array) -> jax.Array:
    """The conditioning channels of images x0 [B, H, W, C] in training, with noise of a random level."""
    low, largest = superres.shrink(x0, parts.superres.size), parts.superres.noise
    if not largest:
        return superres.conditioning(low, x0.shape[1:-1])
    key_level, key_noise = jax.random.split(key)
    level = largest * jax.random.uniform(key_level, x0.shape[:1])
    low = low + level[:, None, None, None] * jax.random.normal(key_noise, low.shape)
    return superres.conditioning(low, x0.shape[1:-1], level)


def by_quartile(t: jax.Array, values: jax.Array, name: str = "loss") -> dict[str, jax.Array]:
    """Means of `values` [B] whose times t [B] lie in (0, 1/4], (1/4, 1/2], ...: {"loss_q0": [], ..., "loss_q3": []}.

    NaN for a quartile without examples. On a chain of T steps, t = i / T, these are quarters of its steps.
    """
    quartile = jnp.clip(jnp.ceil(4 * t) - 1, 0, 3)
    return {f"{name}_q{i}": jnp.mean(values, where=quartile == i) for i in range(4)}
