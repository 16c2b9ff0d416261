"""From a config to the library's functions: data, path, network and optimiser. `objective` and `drawing` go on."""

import dataclasses
import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion import data, optimize, process
from diffusion.io import stored_config
from diffusion import experts as expert
from diffusion import sample as sampling
from diffusion.models import Model, recomposed
from diffusion.models.blog import blog
from diffusion.models.unet import ADM, unet
from diffusion.models.vit import hidden_matrices, vit
from diffusion.posterior import check_variance
from experiments import config as configs

# The fields of config.model that a network reads.
_SHARED = {"name", "patch_size", "conditional", "heads"}
_COMPUTED = {"dropout", "clock", "dtype", "remat", "attention"}
_VIT = {"stride", "width", "depth", "mlp_ratio", "bottleneck", "norm", "mlp", "qk_norm", "positions"}
_UNET = {"num_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_head_channels"}
_FIELDS = {
    "blog": _SHARED | {"stride", "depth", "head_dim"},
    "vit": _SHARED | _COMPUTED | _VIT | {"class_tokens", "class_tokens_from"},
    "unet": _SHARED | _COMPUTED | _UNET | {"use_scale_shift_norm", "resblock_updown", "adm"},
}
# How a network has the variance that `config.process.variance` says it learns.
_LEARNED = {"learned_range": "channels", "learned_sigmoid": "head"}


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
    values = stored_config.read_config(workdir)
    facts = values.pop("seen", None)
    if facts is None:
        raise ValueError(f"{workdir}/config.json was not written by experiments.train; pass another --workdir")
    return configs.from_dict(values), Seen(tuple(facts["shape"]), tuple(facts["class_names"]))


def check_fields(config: configs.Config) -> None:
    """Raises ValueError for a field that was set and has no effect on this run."""
    p, sized = config.process, bool(config.condition.size)
    used = {
        "process.rate": p.path == "geometric",
        "process.betas": p.path == "vp",
        "process.times_mean": p.times == "logit_normal",
        "process.times_std": p.times == "logit_normal",
        "process.weighting_gamma": p.weighting == "min_snr",
        "process.weighting_bias": p.weighting == "sigmoid",
        "condition.noise": sized,
        "condition.sample_noise": sized,
        "train.matrix_rate": config.train.optimizer != "adamw",
        "model.heads": config.model.num_head_channels is None,
    }
    for name, is_used in used.items():
        section, _, field = name.partition(".")
        value, default = (getattr(getattr(c, section), field) for c in (config, configs.Config()))
        if value != default and not is_used:
            raise ValueError(f"--config.{name}={value} has no effect on this run: leave it at {default}")
    if config.condition.size is not None and len(config.condition.size) != 2:
        raise ValueError(f"--config.condition.size={config.condition.size} must be a pair (height, width)")
    check_variance(p.variance)


def path(config: configs.Config) -> process.Path:
    """The noising process."""
    c = config.process
    options = {
        "linear": process.Linear,
        "cosine": process.Cosine,
        "vp": lambda: process.VP(process.named_betas(c.betas, c.steps)),
        "geometric": lambda: process.Geometric(c.rate, c.steps),
    }
    return choose("process.path", c.path, options)()


def chain(config: configs.Config) -> np.ndarray:
    """All times of a path that is a chain, falling to 0, [T + 1].

    Raises:
      ValueError: the path has no steps.
    """
    c = config.process
    if c.path not in ("vp", "geometric"):
        raise ValueError(f"--config.process.path={c.path} is no chain of steps, which this needs: set it to vp")
    return sampling.respaced_grid("", c.steps)


def boundaries(config: configs.Config) -> np.ndarray:
    """The times at which one expert follows another, [n] for n thresholds."""
    if not config.process.snr_splits:
        raise ValueError(
            f"--config.process.split={config.process.split} needs --config.process.snr_splits, the thresholds between "
            "experts"
        )
    return expert.boundaries(path(config), config.process.snr_splits)


def network(config: configs.Config, seen: Seen) -> Model:
    """The network as it is trained: it answers in patches if the loss is measured there, else in pictures."""
    c = config.model
    choose("model.name", c.name, _FIELDS)
    unused = {f.name: f.default for f in dataclasses.fields(c) if f.name not in _FIELDS[c.name]}
    for name, default in unused.items():
        if getattr(c, name) != default:
            raise ValueError(f"--config.model.{name}={getattr(c, name)} has no effect on --config.model.name={c.name}")
    if config.process.patches and c.name != "blog":
        raise ValueError("--config.process.patches needs --config.model.name=blog, the network that answers in patches")
    if config.condition.size and c.name != "unet":
        raise ValueError(f"--config.condition.size={config.condition.size} needs --config.model.name=unet")
    return {"blog": _blog, "vit": _vit, "unet": _unet}[c.name](config, seen)


def _blog(config: configs.Config, seen: Seen) -> Model:
    c = config.model
    if seen.num_classes:
        raise ValueError("--config.model.name=blog knows no labels: set --noconfig.model.conditional")
    if config.process.variance in _LEARNED:
        raise ValueError(f"--config.process.variance={config.process.variance}: the blog's network learns none")
    shape = {"patch_size": c.patch_size, "stride": c.stride, "depth": c.depth}
    trained = blog(path(config), heads=c.heads, head_dim=c.head_dim, **shape)
    return trained if config.process.patches else recomposed(trained, c.patch_size, c.stride)


def _vit(config: configs.Config, seen: Seen) -> Model:
    c = config.model
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
        **_computed(config),
    )


def _unet(config: configs.Config, seen: Seen) -> Model:
    c = config.model
    return unet(
        **(ADM if c.adm else {}),
        patch_size=c.patch_size,
        num_channels=c.num_channels,
        channel_mult=c.channel_mult,
        num_res_blocks=c.num_res_blocks,
        attention_resolutions=c.attention_resolutions,
        num_heads=c.heads,
        num_head_channels=c.num_head_channels,
        num_classes=seen.num_classes,
        out_channels=seen.shape[-1],
        use_scale_shift_norm=c.use_scale_shift_norm,
        resblock_updown=c.resblock_updown,
        **_computed(config),
    )


def _computed(config: configs.Config) -> dict[str, Any]:
    """What vit and unet have in common: how they are computed, and what surrounds them."""
    c, steps = config.model, config.process.steps
    clocks = {"1000 t": lambda t: 1000 * t, "1 - t": lambda t: 1 - t, "index": lambda t: steps * t - 1}
    if c.clock == "index":
        chain(config)
    dtypes = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    if c.name == "unet":
        dtypes["float16"] = jnp.float16
    return {
        "learned_variance": _LEARNED.get(config.process.variance, "none"),
        "dropout": c.dropout,
        "dtype": choose("model.dtype", c.dtype, dtypes),
        "remat": c.remat,
        "attention": c.attention,
        "clock": choose("model.clock", c.clock, clocks),
    }


def optimizer(config: configs.Config) -> optax.GradientTransformation:
    """The optimiser as configured.

    Raises:
      ValueError: there is none of that name, or it is not for this network.
    """
    c = config.train
    if c.optimizer == "muon" and config.model.name != "vit":
        raise ValueError(
            f"--config.train.optimizer=muon knows the matrices of --config.model.name=vit, not those of "
            f"{config.model.name}: set it to adamw"
        )
    kinds = {
        "adamw": optimize.adamw,
        "muon": partial(optimize.muon, hidden=hidden_matrices, matrix_rate=c.matrix_rate),
    }
    return choose("train.optimizer", c.optimizer, kinds)(
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
    """The key for one use of a seed, such as "init", "train" or "sample": uses share no random numbers."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(use.encode()))


def init_params(config: configs.Config, seen: Seen) -> Any:
    """Parameters from the config's seed."""
    init = jax.jit(network(config, seen).init)
    *size, channels = seen.shape
    xt = jnp.zeros((1, *size, channels + planes(config, seen)))
    return init(key(config.seed, "init"), xt, jnp.zeros(1), jnp.zeros(1, int))


def planes(config: configs.Config, seen: Seen) -> int:
    """How many channels the condition adds to what the network sees: a smaller picture's, and how noisy it is."""
    return seen.shape[-1] + (config.condition.noise > 0) if config.condition.size else 0


def to_float(config: configs.Config, images: jax.Array) -> jax.Array:
    """uint8 pictures to the network's range [low, high]."""
    c = config.data
    return c.low + (c.high - c.low) * (images.astype(jnp.float32) / 255)


def to_uint8(config: configs.Config, x: jax.Array) -> jax.Array:
    """Inverse of `to_float`, rounded and clipped."""
    c = config.data
    return jnp.round(jnp.clip((x - c.low) / (c.high - c.low), 0, 1) * 255).astype(jnp.uint8)
