"""From a config to the library's functions: the one place that knows both."""

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion import checkpoint, data, guide, process, train
from diffusion import loss as losses
from diffusion import sample as sampling
from diffusion.models import Model, recomposed
from diffusion.models.blog import blog
from diffusion.models.vit import vit
from diffusion.patch import patchify
from diffusion.predict import Denoise
from experiments import config as configs

Images = np.ndarray
Draw = Callable[..., jax.Array]

# The fields of config.model that a network reads.
_FIELDS = {
    "blog": {"name", "patch_size", "stride", "depth", "heads", "head_dim", "conditional"},
    "vit": {field.name for field in dataclasses.fields(configs.Model)} - {"head_dim"},
}


def choose(name: str, value: str, options: dict[str, Any]) -> Any:
    """options[value], or an error that names the flag and the choices."""
    if value not in options:
        raise ValueError(f"--config.{name}={value!r} is not one of {', '.join(options)}")
    return options[value]


def source(config: configs.Config, split: str = "train") -> data.Source:
    """The pictures of a split."""
    c = config.data
    if not c.low < c.high:
        raise ValueError(f"--config.data.low={c.low} must be below --config.data.high={c.high}")
    return data.load(c.name, split, size=c.size, crop=c.crop, channels=c.channels, data_dir=c.data_dir)


class Seen(NamedTuple):
    """What a network must know of its data: pictures (H, W, C), and the classes if it is conditioned on them."""

    shape: tuple[int, ...]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """0 without labels; the null label is this number."""
        return len(self.class_names)


def seen(config: configs.Config, pictures: data.Source) -> Seen:
    """The part of the data that the network depends on."""
    return Seen(tuple(pictures.images.shape[1:]), tuple(pictures.class_names) if config.model.conditional else ())


def to_stored(config: configs.Config, seen: Seen) -> dict[str, Any]:
    """What config.json of a run holds: enough to rebuild its network without its data."""
    return configs.to_dict(config) | {"seen": {"shape": list(seen.shape), "class_names": list(seen.class_names)}}


def stored(workdir: Path) -> tuple[configs.Config, Seen]:
    """Config and data facts of the run in `workdir`.

    Raises:
      FileNotFoundError: no run was made there.
      ValueError: it was made by a version with other fields.
    """
    values = checkpoint.read_config(workdir)
    facts = values.pop("seen", None)
    if facts is None:
        raise ValueError(f"{workdir}/config.json was not written by experiments.train; pass another --workdir")
    return configs.from_dict(values), Seen(tuple(facts["shape"]), tuple(facts["class_names"]))


def path(config: configs.Config) -> process.Path:
    """The noising process."""
    c = config.process
    options = {
        "linear": process.Linear,
        "cosine": process.Cosine,
        "vp": lambda: process.VP(process.linear_betas(c.steps)),
        "geometric": lambda: process.Geometric(c.rate, c.steps),
    }
    return choose("process.path", c.path, options)()


def network(config: configs.Config, seen: Seen) -> Model:
    """The network as it is trained: it answers in patches if the loss is measured there, else in pictures."""
    c = config.model
    choose("model.name", c.name, _FIELDS)
    unused = {f.name: f.default for f in dataclasses.fields(c) if f.name not in _FIELDS[c.name]}
    for name, default in unused.items():
        if getattr(c, name) != default:
            raise ValueError(f"--config.model.{name}={getattr(c, name)} has no effect on --config.model.name={c.name}")
    if c.name == "blog":
        if seen.num_classes:
            raise ValueError("--config.model.name=blog knows no labels: set --noconfig.model.conditional")
        shape = {"patch_size": c.patch_size, "stride": c.stride, "depth": c.depth}
        trained = blog(path(config), heads=c.heads, head_dim=c.head_dim, **shape)
        return trained if config.process.patches else recomposed(trained, c.patch_size, c.stride)
    if config.process.patches:
        raise ValueError("--config.process.patches needs --config.model.name=blog, the network that answers in patches")
    dtypes = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    return vit(
        patch_size=c.patch_size,
        stride=c.stride,
        width=c.width,
        depth=c.depth,
        heads=c.heads,
        num_classes=seen.num_classes,
        bottleneck=c.bottleneck,
        mlp_ratio=c.mlp_ratio,
        norm=c.norm,
        mlp=c.mlp,
        qk_norm=c.qk_norm,
        positions=c.positions,
        class_tokens=c.class_tokens if seen.num_classes else 0,
        class_tokens_from=c.class_tokens_from,
        dropout=c.dropout,
        dtype=choose("model.dtype", c.dtype, dtypes),
        remat=c.remat,
        attention=c.attention,
        clock=choose("model.clock", c.clock, {"1000 t": lambda t: 1000 * t, "1 - t": lambda t: 1 - t}),
    )


def times(config: configs.Config) -> losses.Times:
    """The time sampler of the loss."""
    c = config.process
    options = {
        "uniform": lambda: losses.uniform_times,
        "antithetic": lambda: losses.antithetic_times,
        "logit_normal": lambda: losses.logit_normal_times(c.times_mean, c.times_std),
        "grid": lambda: losses.grid_times(c.steps, first=1 if c.path == "vp" else 0),
    }
    return choose("process.times", c.times, options)()


def example_loss(config: configs.Config, seen: Seen) -> Callable[..., jax.Array]:
    """(params, key, batch, training: bool) -> loss of each noised picture [B * repeat]."""
    c = config.process
    space = partial(patchify, patch_size=config.model.patch_size, stride=config.model.stride) if c.patches else None
    weight = None if c.loss_in in (None, c.prediction) else losses.measured_in(c.loss_in, c.prediction, c.loss_floor)
    noising, sampler, model, classes = path(config), times(config), network(config, seen), seen.num_classes

    def example_losses(params: Any, key: jax.Array, batch: dict[str, jax.Array], training: bool) -> jax.Array:
        key_loss, key_labels, key_dropout = jax.random.split(key, 3)
        x0 = jnp.repeat(to_float(config, batch["x"]), config.train.repeat, 0)
        y = None
        if classes:
            y = jnp.repeat(batch["y"], config.train.repeat, 0)
            y = guide.drop_labels(key_labels, y, classes, config.train.label_drop if training else 0.0)
        denoise = partial(model.apply, params, key=key_dropout if training and config.model.dropout else None)
        values, _ = losses.loss(
            key_loss, denoise, noising, x0, y, prediction=c.prediction, times=sampler, weight=weight, space=space
        )
        return values

    return example_losses


def loss_fn(config: configs.Config, seen: Seen) -> train.LossFn:
    """(params, key, batch) -> (mean loss, no further metrics), for `train.make_step`."""
    examples = example_loss(config, seen)
    return lambda params, key, batch: (examples(params, key, batch, True).mean(), {})


def optimizer(config: configs.Config) -> optax.GradientTransformation:
    """AdamW as configured."""
    c = config.train
    return train.adamw(
        c.learning_rate,
        c.steps,
        warmup=c.warmup,
        schedule=c.schedule,
        b2=c.b2,
        eps=c.adam_eps,
        weight_decay=c.weight_decay,
        clip=c.clip,
    )


def key(seed: int, use: str) -> jax.Array:
    """The key for one use of a seed ("init", "train", "held out", "sample"): uses share no random numbers."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(use.encode()))


def init_params(config: configs.Config, seen: Seen) -> Any:
    """Parameters from the config's seed."""
    init = jax.jit(network(config, seen).init)
    return init(key(config.seed, "init"), jnp.zeros((1, *seen.shape)), jnp.zeros(1), jnp.zeros(1, int))


def denoiser(config: configs.Config, seen: Seen, params: Any) -> Denoise:
    """The trained denoiser in pictures, with the config's guidance and clipping."""
    c = config.sample
    model = network(config, seen)
    if config.process.patches:
        model = recomposed(model, config.model.patch_size, config.model.stride)
    denoise = partial(model.apply, params)
    if seen.num_classes:
        scale = c.guidance if c.guidance in (0, 1) else guide.interval(c.guidance, c.guidance_low, c.guidance_high)
        denoise = guide.classifier_free(denoise, seen.num_classes, scale)
    if c.clip:
        denoise = guide.clip(denoise, path(config), config.process.prediction, config.data.low, config.data.high)
    return denoise


def sampler_step(config: configs.Config) -> sampling.Step:
    """One step of the configured sampler."""
    c = config.sample
    options = {
        "ddim": lambda: sampling.ddim(overstep=c.overstep),
        "ancestral": lambda: sampling.ddim(eta=1.0),
        "heun": sampling.heun,
    }
    if c.overstep != 1 and c.sampler != "ddim":
        raise ValueError(f"--config.sample.overstep={c.overstep} belongs to the ddim sampler, not to {c.sampler}")
    return choose("sample.sampler", c.sampler, options)()


def drawer(config: configs.Config, seen: Seen, keep: int | None = None) -> Draw:
    """Compiled (params, index [B], y [B]) -> uint8 pictures [B, H, W, C]; with `keep`, also frames [keep, B, H, W, C].

    Picture i depends on the sample seed, its number i and its label alone.
    """
    noising, step = path(config), sampler_step(config)
    # Where no data is left (alpha = 0) a prediction of eps says nothing about it: begin just below.
    blind = config.process.prediction == "eps" and float(noising(jnp.ones(()))[0]) < 1e-6
    c = config.sample
    grid = sampling.shifted_grid(c.steps, c.shift, 0.999 if blind else 1.0, c.last if c.steps > 1 else None)
    sample_key = key(config.sample.seed, "sample")

    @jax.jit
    def draw(params: Any, index: jax.Array, y: jax.Array) -> Any:
        keys = sampling.sample_keys(sample_key, index)
        drawn = sampling.sample(
            keys,
            denoiser(config, seen, params),
            noising,
            sampling.initial_noise(keys, seen.shape),
            grid,
            y if seen.num_classes else None,
            prediction=config.process.prediction,
            step=step,
            keep=keep,
        )
        return jax.tree.map(partial(to_uint8, config), drawn)

    return draw


def in_batches(draw: Draw, params: Any, labels: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Draws pictures 0..len(labels) - 1 batch by batch; the last one is filled up, so that one program serves all."""
    batch_size = min(batch_size, len(labels))
    for start in range(0, len(labels), batch_size):
        index = np.arange(start, start + batch_size)
        yield np.asarray(draw(params, index, labels[index % len(labels)]))[: len(labels) - start]


def to_float(config: configs.Config, images: jax.Array) -> jax.Array:
    """uint8 pictures to the network's range [low, high]."""
    c = config.data
    return c.low + (c.high - c.low) * (images.astype(jnp.float32) / 255)


def to_uint8(config: configs.Config, x: jax.Array) -> jax.Array:
    """Inverse of `to_float`, rounded and clipped."""
    c = config.data
    return jnp.round(jnp.clip((x - c.low) / (c.high - c.low), 0, 1) * 255).astype(jnp.uint8)
