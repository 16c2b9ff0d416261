"""The PyTorch side of `experiments.bench.vit`: `torch_vit` with a config's fields and our parameters."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from diffusion import layers
from diffusion.grids import shifted_grid
from experiments.bench import jax_run, peers, torch_run, torch_vit
from experiments.config import Config
from experiments.parts import DataSpec, resolve

FIELDS = ("patch_size", "stride", "width", "depth", "heads", "mlp_ratio", "bottleneck", "norm", "mlp", "qk_norm")
CLOCKS = {"1000 t": lambda t: 1000 * t, "1 - t": lambda t: 1 - t}


def versions() -> dict[str, Any]:
    """What to know of PyTorch, for the result."""
    return {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}


def network(config: Config, spec: DataSpec, params: Any) -> torch_vit.ViT:
    """Our network in PyTorch, our parameters in it, on our device."""
    c = config.model
    module = torch_vit.ViT(
        spec.shape[:-1],
        spec.shape[-1],
        **{name: getattr(c, name) for name in FIELDS},
        num_classes=spec.num_classes,
        positions=c.positions,
        class_tokens=c.class_tokens if spec.num_classes else 0,
        class_tokens_from=c.class_tokens_from,
        clock=CLOCKS[c.clock],
    )
    return torch_vit.copy_params(module, layers.unstacked(params)).to(torch_run.device())


def parity(config: Config, spec: DataSpec, params: Any, count: int = 4) -> dict[str, float]:
    """Largest difference of outputs, and of gradients in norm, between the networks in float32.

    Raises:
      AssertionError: they are not the same network.
    """
    rng = np.random.default_rng(2)
    xt, wanted = rng.standard_normal((2, count, *spec.shape), np.float32)
    t = rng.uniform(size=count).astype(np.float32)
    y = rng.integers(0, spec.num_classes + 1, count).astype(np.int32)

    apply = resolve(jax_run.with_model(config, dtype="float32", attention=None), spec).model.apply

    def error(params: Any) -> tuple[jax.Array, jax.Array]:
        pred = apply(params, xt, t, y if spec.num_classes else None)
        return jnp.square(pred - wanted).mean(), pred

    with jax.default_matmul_precision("highest"):
        grads, pred = jax.jit(jax.grad(error, has_aux=True))(params)
    torch_run.full_precision()
    module = network(config, spec, params)
    theirs = module(*map(torch_run.to_device, (xt, t, y)))
    (theirs - torch_run.to_device(wanted)).square().mean().backward()
    output = np.abs(theirs.detach().cpu().numpy() - pred).max() / max(1, np.abs(pred).max())

    slopes = network(config, spec, jax.tree.map(np.asarray, grads))
    pairs = [(p.grad, g) for p, g in zip(module.parameters(), slopes.parameters(), strict=True)]
    squares = [((a - b).square().sum().item(), b.square().sum().item()) for a, b in pairs]
    gradient = math.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares))
    return peers.check_same("the network in PyTorch", {"outputs": float(output), "gradients": gradient})


def train(
    config: Config, spec: DataSpec, params: Any, batch: dict[str, np.ndarray], steps: int, mode: str
) -> Callable[[], None]:
    """`jax_run.train` in PyTorch, `mode` "eager" or "compile"."""
    c, p, d = config.train, config.process, config.data
    module = network(config, spec, params)
    settings = {"null": spec.num_classes, "drop": c.label_drop if spec.num_classes else 0.0, "floor": p.loss_floor}
    settings |= {"mean": p.times_mean, "std": p.times_std, "low": d.low, "high": d.high}
    loss = torch_run.compiled(partial(torch_vit.image_loss, module, **settings), mode)
    adamw = torch_vit.optimizer(module, rate=c.learning_rate, b2=c.b2, weight_decay=c.weight_decay)

    def narrow_loss(images: Any, y: Any) -> Any:
        with torch_run.narrow(config.model.dtype):
            return loss(images, y)

    step = torch_vit.make_step(module, narrow_loss, adamw, clip=c.clip, ema=c.ema[0])
    x, y = torch.from_numpy(batch["x"]), torch.from_numpy(batch["y"].astype(np.int64))

    def run() -> None:
        for _ in range(steps):
            step(x.to(torch_run.device()), y.to(torch_run.device()))
        torch_run.wait()

    return run


def sample(config: Config, spec: DataSpec, params: Any, labels: np.ndarray, mode: str) -> Callable[[], np.ndarray]:
    """`jax_run.sample` in PyTorch, by the steps of `config`, `mode` "eager" or "compile"."""
    times = shifted_grid(config.sample.steps, config.sample.shift).tolist()
    make = partial(
        torch_vit.sample,
        torch_run.compiled(network(config, spec, params), mode),
        shape=spec.shape,
        times=times,
        null=spec.num_classes,
        scales=guidance(config, times) if jax_run.guided(config, spec) else None,
        low=config.data.low,
        high=config.data.high,
    )
    labels = labels.astype(np.int64)

    def run() -> np.ndarray:
        with torch_run.narrow(config.model.dtype):
            return make(torch_run.to_device(labels)).cpu().numpy()

    return run


def guidance(config: Config, times: list[float]) -> list[float]:
    """Guidance scale of each step."""
    c = config.sample
    ends = (c.guidance_low, c.guidance_high) if c.guidance_open else ()
    inside = lambda t: c.guidance_low <= t <= c.guidance_high and (t not in ends or t == 1)  # noqa: E731
    return [c.guidance if inside(t) else 1.0 for t in times[:-1]]
