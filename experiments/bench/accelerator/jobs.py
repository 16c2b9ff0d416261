"""The networks and recipes of the accelerator run, and the programs made of them.

A job is what `experiments.config` resolves a config to, in plain arguments, since a device image may lack everything
that configs need: `jit_b16`, `lsun` and `digits` are the configs of these names (a test compares them), `shapes` is a
JiT for 64x64 images. A program is a jitted function with the shapes of its arguments, so that it can be compiled on
the device that runs it and, ahead of time, on a machine that has none.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion import grids, guide, ledger, loss, optimize, process, sample, times, train, vlb
from diffusion.models import Model
from diffusion.models.unet import unet
from diffusion.models.vit import hidden_matrices, vit
from experiments.bench.accelerator import image_grid

LABEL_DROP = 0.1
CHAIN = 1000  # steps of the variance-preserving chain
JIT_CLOCK, INDEX_CLOCK = (lambda t: 1 - t), (lambda t: CHAIN * t - 1)  # what JiT's and Patch Diffusion's networks see

JIT_B16 = dict(patch_size=16, width=768, depth=12, heads=12, bottleneck=128, norm="rms", mlp="swiglu", qk_norm=True)
JIT_B16 |= dict(positions=("sincos", "rotary"), class_tokens=32, class_tokens_from=4, mlp_ratio=4.0)
LSUN = dict(num_channels=256, channel_mult=(1.0, 1.0, 2.0, 2.0), num_res_blocks=2, attention_resolutions=(16, 8))
LSUN |= dict(num_head_channels=64, learned_variance="head")
DIGITS = dict(patch_size=10, stride=6, width=128, depth=6, heads=4, norm="rms", mlp="swiglu", qk_norm=True)
DIGITS |= dict(positions=("learned", "rotary"), class_tokens=4, class_tokens_from=2, mlp_ratio=3.75)
SHAPES = dict(
    patch_size=image_grid.PATCH_SIZE,
    width=384,
    depth=12,
    heads=6,
    bottleneck=48,
    norm="rms",
    mlp="swiglu",
    qk_norm=True,
)
SHAPES |= dict(positions=("sincos", "rotary"), mlp_ratio=4.0)

# What `--tiny` puts in their place: every field is still used. The U-Net has one level and attends in its middle alone,
# since each block takes long to compile, here and in PyTorch; `peers.unet_parity` has two levels, and a block attends.
TINY_VIT = dict(width=32, depth=1, heads=2, class_tokens_from=0)
TINY_UNET = dict(num_channels=8, channel_mult=(1.0,), num_res_blocks=1, attention_resolutions=(), num_head_channels=8)


class Job(NamedTuple):
    """A network, what it is trained on and how, and how it is sampled; images are [H, W, C] in [-1, 1].

    fields: the arguments of `vit` or `unet`, for counting operations and for the same network in PyTorch.
    grid: falling times of the sampler; guided: denoiser to denoiser.
    """

    model: Model
    fields: dict[str, Any]
    shape: tuple[int, int, int]
    num_classes: int
    path: process.Path
    times: times.Times
    weight: loss.Weight
    vlb: vlb.Vlb | None
    optimizer: optax.GradientTransformation
    ema: float
    sampler: sample.Sampler
    grid: np.ndarray
    guided: Callable[[Any], Any]


class Program(NamedTuple):
    """A jitted function, the shapes of its arguments, and options of the compiler."""

    function: Any
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def compile(self, where: jax.sharding.Sharding | None = None, **options: Any) -> jax.stages.Compiled:
        """For the device of a sharding, or the default one, with further options of the compiler.

        XLA's matrix products by Triton do not know every shape (seen: 1,280 x 128 x 128 in float32, jax 0.10.2). A
        program that fails on a GPU because of that is compiled without them.
        """
        options = dict(self.options) | options
        place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)  # noqa: E731
        lowered = self.function.lower(*(self.args if where is None else jax.tree.map(place, self.args)))
        try:
            return lowered.compile(compiler_options=options or None)
        except jax.errors.JaxRuntimeError as e:
            if "tile sizes" not in str(e):
                raise
            return lowered.compile(compiler_options=options | {"xla_gpu_enable_triton_gemm": False})


def jit_b16(
    *, tiny: bool = False, dtype: Any = jnp.bfloat16, attention: str | None = None, depth: int | None = None,
    **changed: Any,
) -> Job:  # fmt: skip
    """JiT-B/16 at 256x256, 1,000 classes, as `configs/jit.py:b16`: AdamW, Heun in 50 steps, guidance in [0, 0.9].

    One average, no floor of the velocity's divisor. With another `depth` its class tokens come in the last block.
    `changed` are fields of the network.
    """
    fields = JIT_B16 | (TINY_VIT | dict(patch_size=4, bottleneck=16, class_tokens=2) if tiny else {})
    fields |= ({} if depth is None else {"depth": depth, "class_tokens_from": depth - 1}) | changed
    shape, classes = ((16, 16, 3), 10) if tiny else ((256, 256, 3), 1000)
    return Job(
        vit(**fields, num_classes=classes, dtype=dtype, attention=attention, clock=JIT_CLOCK),
        fields | {"num_classes": classes},
        shape,
        classes,
        process.Linear(),
        times.logit_normal_times(0.8, 0.8),
        loss.measured_in("flow", "x0"),
        None,
        optimize.adamw(2e-4, steps=750_600, warmup=6255, schedule="constant", b2=0.95),
        0.9999,
        sample.heun(),
        grids.uniform_grid(2 if tiny else 50),
        partial(guide.classifier_free, null=classes, scale=guide.interval(2.9, 0.0, 0.9)),
    )


def lsun(
    size: int | None = None, patch_size: int = 4, *, tiny: bool = False, dtype: Any = jnp.bfloat16,
    attention: str | None = None, sample_steps: int = 25, **changed: Any,
) -> Job:  # fmt: skip
    """Patch Diffusion's U-Net, as `configs/lsun.py:4`, or at another image size (default 256) and patch size.

    The sampler takes the last `sample_steps` of its 250: all of them cost alike. `changed` are fields of the network.
    """
    fields = LSUN | (TINY_UNET if tiny else {}) | {"patch_size": patch_size} | changed
    size = (32 if tiny else 256) if size is None else size
    path = process.VP(process.named_betas("linear", CHAIN))
    chain = grids.respaced_grid("", CHAIN)
    return Job(
        unet(**fields, dtype=dtype, attention=attention, clock=INDEX_CLOCK),
        fields,
        (size, size, 3),
        0,
        path,
        times.grid_times(CHAIN, first=1),
        loss.weighting("sqrt_snr", "x0"),
        vlb.Vlb(chain, "learned_sigmoid", 1.0),
        optimize.adamw(1e-4, steps=275_000, warmup=5000, schedule="constant", b2=0.99),
        0.9999,
        sample.ancestral("learned_sigmoid"),
        grids.respaced_grid("250", CHAIN)[-(2 if tiny else sample_steps) - 1 :],
        partial(guide.clip, path=path, prediction="x0"),
    )


def digits(*, tiny: bool = False) -> Job:
    """The main job, as `configs/mnist.py`: 28x28 digits, float32, Muon."""
    fields = DIGITS | (TINY_VIT | dict(class_tokens=2) if tiny else {})
    return Job(
        vit(**fields, num_classes=10),
        fields | {"num_classes": 10},
        (28, 28, 1),
        10,
        process.Linear(),
        times.logit_normal_times(0.8, 1.0),
        loss.measured_in("flow", "x0"),
        None,
        optimize.muon(3e-3, steps=3600, hidden=hidden_matrices, matrix_rate=0.03, warmup=100, b2=0.99, clip=1.0),
        0.996,
        sample.ancestral(),
        grids.uniform_grid(100, last=0.2),
        partial(guide.classifier_free, null=10, scale=guide.interval(1.42, 0.0, 0.8)),
    )


def shapes(shape: tuple[int, int, int], num_classes: int, *, tiny: bool = False) -> Job:
    """A JiT for small images, for a training of some minutes: Muon at a constant rate, so that it may end any time."""
    fields = SHAPES | ({"class_tokens": 16, "class_tokens_from": 4} if num_classes else {})
    if tiny:
        fields |= {k: v for k, v in TINY_VIT.items() if num_classes or k != "class_tokens_from"}
    guided = partial(guide.classifier_free, null=num_classes, scale=guide.interval(2.0, 0.0, 0.9))
    options = dict(hidden=hidden_matrices, matrix_rate=0.02, schedule="constant", b2=0.99, clip=1.0)
    return Job(
        vit(**fields, num_classes=num_classes, dtype=jnp.float32 if tiny else jnp.bfloat16, clock=JIT_CLOCK),
        fields | {"num_classes": num_classes},
        shape,
        num_classes,
        process.Linear(),
        times.logit_normal_times(0.8, 0.8),
        loss.measured_in("flow", "x0"),
        None,
        optimize.muon(1e-3, steps=10**6, warmup=2 if tiny else 100, **options),
        0.5 if tiny else 0.998,
        sample.heun(),
        grids.uniform_grid(2 if tiny else 50),
        guided if num_classes else (lambda denoise: denoise),
    )


def loss_at(job: Job, params: Any, drawn: loss.Draw, x0: jax.Array, y: jax.Array | None) -> jax.Array:
    """Mean loss of images x0 [B, H, W, C] at given times and noise."""
    denoise = partial(job.model.apply, params)
    settings = dict(prediction="x0", weight=job.weight, vlb=job.vlb)
    return loss.loss_at(drawn, denoise, job.path, x0, y, **settings)[0].mean()


def training_step(job: Job) -> train.StepFn:
    """(key, state, {"x": uint8 [B, H, W, C], "y": int32 [B]}) -> (state, metrics): noising to averaged weights."""

    def mean_loss(params: Any, key: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
        key_loss, key_labels = jax.random.split(key)
        x0 = batch["x"].astype(jnp.float32) / 127.5 - 1
        y = guide.drop_condition(key_labels, batch["y"], job.num_classes, LABEL_DROP) if job.num_classes else None
        return loss_at(job, params, loss.draw(key_loss, x0, job.times), x0, y), {}

    return train.make_step(mean_loss, job.optimizer, ema_decay=job.ema)


def step_program(job: Job, batch_size: int, steps: int | None = None) -> Program:
    """One step of training, or with `steps` a scan of so many: (key, state, batch or batches) -> (state, metrics)."""
    step, batch = training_step(job), batch_like(job, batch_size)
    if steps is None:
        return Program(jax.jit(step, donate_argnums=1), (key_like(), state_like(job), batch))

    def several(key: jax.Array, state: train.State, batches: Any) -> tuple[train.State, Any]:
        return jax.lax.scan(lambda state, batch: step(key, state, batch), state, batches)

    stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((steps, *a.shape), a.dtype), batch)
    return Program(jax.jit(several, donate_argnums=1), (key_like(), state_like(job), stacked))


def epoch_program(job: Job, batch_size: int, steps: int, count: int) -> Program:
    """(key, state, `count` images with labels) -> (state, losses [steps]): batches are chosen on the device."""
    step = training_step(job)

    def several(key: jax.Array, state: train.State, data: dict[str, jax.Array]) -> tuple[train.State, jax.Array]:
        def one(state: train.State, _: None) -> tuple[train.State, jax.Array]:
            chosen = jax.random.randint(jax.random.fold_in(key, state.step), (batch_size,), 0, count)
            # The step folds in its number too: it gets another key.
            state, metrics = step(jax.random.fold_in(key, 2**31 - 1), state, {k: v[chosen] for k, v in data.items()})
            return state, metrics["loss"]

        return jax.lax.scan(one, state, None, length=steps)

    return Program(jax.jit(several, donate_argnums=1), (key_like(), state_like(job), batch_like(job, count)))


def sample_program(job: Job, batch_size: int, grid: np.ndarray | None = None) -> Program:
    """(params, key, index [B], y [B]) -> uint8 [B, H, W, C]; sample i depends on the key, its number and its label."""
    grid = job.grid if grid is None else grid

    def samples(params: Any, key: jax.Array, index: jax.Array, y: jax.Array) -> jax.Array:
        keys = sample.sample_keys(key, index)
        denoise, x1 = job.guided(partial(job.model.apply, params)), sample.initial_noise(keys, job.shape)
        labels = y if job.num_classes else None
        x0 = sample.sample(keys, denoise, job.path, x1, grid, labels, prediction="x0", sampler=job.sampler)
        return jnp.round((jnp.clip(x0, -1, 1) + 1) * 127.5).astype(jnp.uint8)

    numbers = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return Program(jax.jit(samples), (params_like(job), key_like(), numbers, numbers))


def gradient_program(job: Job, batch_size: int, precision: str | None = None) -> Program:
    """(params, key, batch) -> gradients of the loss; the same key gives the same noise to every network.

    `precision` is that of float32 products, "highest" for all of float32.
    """

    def gradient(params: Any, key: jax.Array, batch: dict[str, jax.Array]) -> Any:
        x0 = batch["x"].astype(jnp.float32) / 127.5 - 1
        drawn, y = loss.draw(key, x0, job.times), batch["y"] if job.num_classes else None
        with jax.default_matmul_precision(precision):
            return jax.grad(lambda p: loss_at(job, p, drawn, x0, y))(params)

    return Program(jax.jit(gradient), (params_like(job), key_like(), batch_like(job, batch_size)))


def forward_flops(job: Job) -> int:
    """Operations of one image's forward pass."""
    return ledger.flops(job.model.apply, params_like(job), *_init_arguments(job))


def init_program(job: Job) -> Program:
    """key -> the network's first parameters."""

    def init(key: jax.Array) -> Any:
        return job.model.init(key, *(jnp.zeros(a.shape, a.dtype) for a in _init_arguments(job)))

    return Program(jax.jit(init), (key_like(),))


def key_like() -> jax.ShapeDtypeStruct:
    """A typed key, as a shape."""
    return jax.eval_shape(lambda: jax.random.key(0))


def params_like(job: Job) -> Any:
    """The network's parameters, as shapes."""
    return jax.eval_shape(job.model.init, key_like(), *_init_arguments(job))


def _init_arguments(job: Job) -> tuple[jax.ShapeDtypeStruct, ...]:
    xt, t = jax.ShapeDtypeStruct((1, *job.shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    return (xt, t, jax.ShapeDtypeStruct((1,), jnp.int32)) if job.num_classes else (xt, t)


def state_like(job: Job) -> train.State:
    """The state of training, as shapes."""
    return jax.eval_shape(lambda params: train.init_state(params, job.optimizer, ema_decay=job.ema), params_like(job))


def batch_like(job: Job, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of images and labels, as shapes."""
    x = jax.ShapeDtypeStruct((batch_size, *job.shape), jnp.uint8)
    return {"x": x, "y": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}


def random_params(like: Any) -> Any:
    """NumPy parameters of these shapes, none at its initial zero, of a size that keeps activations near one."""
    rng = np.random.default_rng(0)

    def value(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        fan = leaf.shape[0] if len(leaf.shape) == 2 else np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
        return rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(fan))

    return jax.tree.map(value, like)


def random_state(job: Job) -> train.State:
    """A state of training with random parameters, on the device."""
    return first_state(job, random_params(params_like(job)))


def first_state(job: Job, params: Any) -> train.State:
    """The state of training that begins with `params`; one program, where `train.init_state` alone is one an array."""
    return jax.jit(lambda p: train.init_state(p, job.optimizer, ema_decay=job.ema))(params)


def random_batch(job: Job, batch_size: int, leading: Sequence[int] = ()) -> dict[str, np.ndarray]:
    """uint8 noise and labels as a batch, with further axes before it."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (*leading, batch_size, *job.shape), np.uint8)
    return {"x": x, "y": rng.integers(0, max(job.num_classes, 1), (*leading, batch_size)).astype(np.int32)}


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program holds at a time: arguments, results and temporary arrays; results that replace arguments once."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes
