"""The other side of the sections: the same networks in PyTorch, under `torch.compile` and autocast to bfloat16.

They run in processes of their own, so that either framework's memory is its own. The two networks are shown to be one:
with our parameters copied, outputs and gradients must agree in float32, with fewer blocks (and a narrower U-Net).
Attention is PyTorch's `scaled_dot_product_attention`.
"""

import gc
import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.predict import WithVariance, pred_of
from experiments.bench.accelerator import jobs, sections
from experiments.bench.accelerator.record import Attempt, Record, read

TOLERANCE = 1e-4  # of outputs and gradients in float32, relative to the largest output and the gradient's norm


def attempted(record: Record, make: Callable[[Any], dict[str, Attempt]]) -> None:
    """Makes the attempts if PyTorch is there and can use the device that JAX was measured on."""
    try:
        import torch
    except ImportError:
        record.leave_out("PyTorch", "it is not installed")
        return
    measured = read(record.folder, "machine").get("machine", {}).get("backend", "cpu")
    if measured != "cpu" and not torch.cuda.is_available():
        record.leave_out("PyTorch", "this build of it has no GPU")
        return
    record.values["torch"] = torch.__version__
    # Only a GPU's peer is compiled to machine code; tiny ones are traced, to see that they can be.
    record.values["torch_mode"] = "torch.compile" if device(torch) == "cuda" else "torch.compile(backend='aot_eager')"
    record.run(make(torch))


def jit_train(record: Record) -> None:
    """JiT-B/16's training step in PyTorch."""

    def make(torch: Any) -> dict[str, Attempt]:
        from experiments.bench import torch_vit

        job = jobs.jit_b16(tiny=record.tiny)

        def measure(b: int) -> dict[str, Any]:
            with _fresh(torch):
                network = _vit(torch, torch_vit, job)
                settings = dict(null=job.num_classes, drop=jobs.LABEL_DROP, mean=0.8, std=0.8)
                settings |= dict(low=-1.0, high=1.0, floor=0.05)
                loss = _compiled(torch, partial(torch_vit.image_loss, network, **settings))
                return _trained(torch, record, network, loss, b2=0.95, rate=2e-4, batch=jobs.random_batch(job, b))

        first, *others = sections.batches(record.tiny)
        attempts = {f"PyTorch, batch {first}": Attempt(20, 50, partial(measure, first))}
        attempts["PyTorch is the same network"] = Attempt(25, 0, partial(vit_parity, torch, torch_vit, record.tiny))
        return attempts | {f"PyTorch, batch {b}": Attempt(15, 50, partial(measure, b)) for b in others}

    attempted(record, make)


def jit_sample(record: Record) -> None:
    """Sampling with JiT-B/16 in PyTorch, by Heun's method."""

    def make(torch: Any) -> dict[str, Attempt]:
        from experiments.bench import torch_vit

        job, b = jobs.jit_b16(tiny=record.tiny), sections.sample_batch(record.tiny)

        def measure() -> dict[str, Any]:
            with _fresh(torch):
                network = _compiled(torch, _vit(torch, torch_vit, job))
                labels = torch.arange(b, device=device(torch)) % job.num_classes
                scales = [2.9 if t <= 0.9 else 1.0 for t in job.grid]
                sample = partial(heun, torch, network, labels, job.shape, job.grid.tolist(), job.num_classes, scales)
                return _sampled(torch, record, sample, b)

        return {f"PyTorch, batch {b}": Attempt(20, 30, measure)}

    attempted(record, make)


def unet(record: Record) -> None:
    """Patch Diffusion's U-Net in PyTorch."""

    def make(torch: Any) -> dict[str, Attempt]:
        from experiments.bench import torch_patch_unet

        (size, patch_size), _ = sections.unet_sizes(record.tiny)
        job, name = jobs.lsun(size, patch_size, tiny=record.tiny), sections.unet_name(size, patch_size)
        chain = torch_patch_unet.linear_chain(device(torch))

        def network() -> Any:
            return torch_patch_unet.UNet(size, 3, **job.fields).to(device(torch))

        def train() -> dict[str, Any]:
            with _fresh(torch):
                module = network()
                inner = _compiled(torch, partial(torch_patch_unet.image_loss, module, chain))
                batch = jobs.random_batch(job, sections.unet_batch(record.tiny))
                return _trained(torch, record, module, lambda x, y: inner(x), b2=0.99, rate=1e-4, batch=batch)

        def sample() -> dict[str, Any]:
            with _fresh(torch):
                b = sections.sample_batch(record.tiny)
                steps = [round(jobs.CHAIN * t) for t in job.grid]
                module = _compiled(torch, network())

                def sample() -> Any:
                    noise = torch.randn(b, *job.shape, device=device(torch))
                    return torch_patch_unet.sample(module, chain, noise, steps)

                return _sampled(torch, record, sample, b)

        return {
            f"PyTorch, training, {name}": Attempt(15, 50, train),
            f"PyTorch, sampling, {name}": Attempt(12, 35, sample),
            "PyTorch is the same network": Attempt(10, 0, partial(unet_parity, torch, torch_patch_unet)),
        }

    attempted(record, make)


# The attempts of each section, at its full size, that are compiled before (`prepare`): each size is compiled anew.
FIRST: dict[str, tuple[str, ...]] = {
    "jit_train": (f"PyTorch, batch {sections.batches(False)[0]}",),
    "jit_sample": (f"PyTorch, batch {sections.sample_batch(False)}",),
    "unet": tuple(
        f"PyTorch, {kind}, {sections.unet_name(*sections.unet_sizes(False)[0])}" for kind in ("training", "sampling")
    ),
}

PEERS: dict[str, Callable[[Record], None]] = {"jit_train": jit_train, "jit_sample": jit_sample, "unet": unet}


def heun(
    torch: Any, network: Callable[..., Any], y: Any, shape: Sequence[int], times: Sequence[float], null: int,
    scales: Sequence[float],
) -> Any:  # fmt: skip
    """uint8 samples [B, *shape] along falling `times` to 0, guided at every time, as `diffusion.sample.heun`."""
    with torch.no_grad():
        x = torch.randn(len(y), *shape, device=y.device)
        both = torch.cat([y, torch.full_like(y, null)])

        def velocity(x: Any, k: int) -> Any:
            t = times[k]
            halves = network(torch.cat([x, x]), torch.full((len(both),), t, device=x.device), both)
            conditional, unconditional = halves.chunk(2)
            return (x - (unconditional + scales[k] * (conditional - unconditional))) / t

        for k, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
            here = velocity(x, k)
            euler = x + (s - t) * here
            x = euler if s == 0 else x + (s - t) * (here + velocity(euler, k + 1)) / 2
    return ((x + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8)


def vit_parity(torch: Any, torch_vit: Any, tiny: bool) -> dict[str, float]:
    """Differences of outputs and gradients between the two transformers.

    Raises:
      AssertionError: one is larger than TOLERANCE.
    """
    job = jobs.jit_b16(tiny=tiny, dtype=jnp.float32, depth=2 if tiny else 5)
    make = partial(_vit, torch, torch_vit, job)
    return parity(torch, job, lambda params: torch_vit.copy_params(make(), params), lambda t: t)


def unet_parity(torch: Any, torch_patch_unet: Any) -> dict[str, float]:
    """Differences of outputs, variances and gradients between the two U-Nets, at a small width.

    Raises:
      AssertionError: one is larger than TOLERANCE.
    """
    job = jobs.lsun(tiny=True, dtype=jnp.float32, channel_mult=(1.0, 2.0), attention_resolutions=(8,))

    def copied(params: Any) -> Any:
        module = torch_patch_unet.UNet(job.shape[0], job.shape[2], **job.fields).to(device(torch))
        return torch_patch_unet.copy_params(module, params)

    return parity(torch, job, copied, jobs.INDEX_CLOCK)


def parity(torch: Any, job: jobs.Job, copied: Callable[[Any], Any], clock: Callable[[Any], Any]) -> dict[str, float]:
    """Largest difference of outputs, and of gradients in norm, between our network and `copied(params)`, in float32.

    Raises:
      AssertionError: one is larger than TOLERANCE: they are not the same network.
    """
    rng = np.random.default_rng(2)
    xt, wanted = rng.standard_normal((2, 2, *job.shape), np.float32)
    t, y = np.array([0.25, 0.75], np.float32), np.array([0, job.num_classes], np.int32)
    params = jobs.random_params(jobs.params_like(job))

    def error(params: Any) -> tuple[jax.Array, Any]:
        output = job.model.apply(params, xt, t, y if job.num_classes else None)
        loss = jnp.square(pred_of(output) - wanted).mean()
        return loss + (jnp.square(output.v).mean() if isinstance(output, WithVariance) else 0.0), output

    with jax.default_matmul_precision("highest"):
        lowered = jax.jit(jax.grad(error, has_aux=True)).lower(params)
    quick = sections.QUICK if jax.default_backend() == "cpu" and job.shape[0] < 64 else None
    grads, output = lowered.compile(compiler_options=quick)(params)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    network = copied(params)
    there = lambda a: torch.from_numpy(np.asarray(a)).to(device(torch))  # noqa: E731
    inputs = [there(xt), there(clock(t)), *([there(y)] if job.num_classes else [])]
    theirs = network(*inputs)
    pred, v = theirs if isinstance(theirs, tuple) else (theirs, None)
    loss = (pred - there(wanted)).square().mean()
    (loss if v is None else loss + v.square().mean()).backward()
    ours = [pred_of(output)] + ([output.v] if v is not None else [])
    pairs = zip(ours, [pred] if v is None else [pred, v], strict=True)
    output = max(float(np.abs(b.detach().cpu().numpy() - a).max() / np.abs(a).max()) for a, b in pairs)
    slopes = copied(jax.tree.map(np.asarray, grads))
    pairs = [(p.grad, g) for p, g in zip(network.parameters(), slopes.parameters(), strict=True)]
    squares = [((a - b).square().sum().item(), b.square().sum().item()) for a, b in pairs]
    errors = {"output": output, "gradient": math.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares))}
    if not max(errors.values()) <= TOLERANCE:
        raise AssertionError(f"the PyTorch network is not ours: {errors} exceed {TOLERANCE}")
    return errors


def device(torch: Any) -> str:
    """What PyTorch computes on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _vit(torch: Any, torch_vit: Any, job: jobs.Job) -> Any:
    height, width, channels = job.shape
    fields = {"stride": None} | job.fields
    return torch_vit.ViT((height, width), channels, **fields, clock=jobs.JIT_CLOCK).to(device(torch))


def _compiled(torch: Any, f: Any) -> Any:
    """`f` under torch.compile, for one shape."""
    if device(torch) == "cuda":
        return torch.compile(f, dynamic=False)
    return torch.compile(f, dynamic=False, backend="aot_eager")


class _fresh:
    """Nothing left of what was compiled and allocated before, float32 products as JAX does them."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch

    def __enter__(self) -> None:
        torch = self.torch
        self.quiet = warnings.catch_warnings()
        self.quiet.__enter__()
        warnings.simplefilter("ignore")  # PyTorch on its own kernels for mixed types
        torch._dynamo.reset()
        gc.collect()
        if device(torch) == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.set_float32_matmul_precision("high")  # JAX's default on GPUs
            torch.backends.cudnn.allow_tf32 = True

    def __exit__(self, *error: Any) -> None:
        self.quiet.__exit__(*error)
        gc.collect()


def _trained(
    torch: Any, record: Record, module: Any, loss: Callable[..., Any], *, b2: float, rate: float, batch: dict[str, Any]
) -> dict[str, Any]:
    """A training step's time and memory: loss, backward, AdamW, average."""
    from experiments.bench import torch_vit

    where = device(torch)
    x, y = (torch.from_numpy(batch[k]).to(where) for k in ("x", "y"))
    y = y.long()
    adamw = torch_vit.optimizer(module, rate=rate, b2=b2, weight_decay=0.0)

    def narrow(images: Any, y: Any) -> Any:
        with torch.autocast(where, torch.bfloat16):
            return loss(images, y)

    step = torch_vit.make_step(module, narrow, adamw, clip=None, ema=0.9999)
    return _timed(torch, record, partial(step, x, y), len(x))


def _sampled(torch: Any, record: Record, sample: Callable[[], Any], count: int) -> dict[str, Any]:
    """The time and memory of sampling."""

    def narrow() -> Any:
        with torch.autocast(device(torch), torch.bfloat16):
            return sample()

    return _timed(torch, record, narrow, count)


def _timed(torch: Any, record: Record, call: Callable[[], Any], count: int) -> dict[str, Any]:
    wait = (lambda _: torch.cuda.synchronize()) if device(torch) == "cuda" else (lambda _: None)
    begin = time.perf_counter()
    wait(call())
    compiling = time.perf_counter() - begin
    if record.rehearsed:
        return {"compile_seconds": compiling}
    timed = sections.timing(call, record, wait)
    used = torch.cuda.max_memory_allocated() if device(torch) == "cuda" else None
    row = {"compile_seconds": compiling, "bytes": used, "batch_size": count}
    return timed | row | {"images_per_second": count / timed["seconds"]}
