"""From a config and facts about the data to `Parts`: the functions and numbers that training and sampling are made of.

Path, times, sampler, guidance and optimiser are chosen here by their names in the config; the names of predictions,
weights and variances go to the library functions that know them. What comes after, `objective` and `sampling`, takes
parts and no config.
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion import averages, experts, grids, guide, loss, optimize, process, sample, solvers, superres, times, vlb
from diffusion.data.values import PLAIN, is_plain
from diffusion.methods import distill, meanflow
from diffusion.models import Model, Task, recomposed
from diffusion.patch import patchify
from diffusion.posterior import Variance
from diffusion.predict import Denoise, Prediction
from experiments import checks, guidance, methods
from experiments.checks import choose, named
from experiments.config import Config, network_name

# Where float16's loss scaling begins, log2.
_LOG2_SCALE = 20.0
# How a network has the variance that `config.process.variance` says it learns.
_LEARNED = {"learned_range": "channels", "learned_sigmoid": "head"}


class DataSpec(NamedTuple):
    """What a run must know of its data: the shape (H, W, C) of an image, (*S, C) of another array, the classes if the
    network is conditional, and the type and the range of values.
    """

    shape: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    dtype: str = "uint8"
    value_range: tuple[float, float] = PLAIN

    @property
    def num_classes(self) -> int:
        """0 without labels; the null label is this number."""
        return len(self.class_names)

    @property
    def plain(self) -> bool:
        """Whether values are those of ordinary images, uint8 in 0 .. 255."""
        return is_plain(self.dtype, self.value_range)


class Superres(NamedTuple):
    """The low-resolution conditioning image: its size (h, w), and the standard deviations of noise on it."""

    size: tuple[int, int]
    noise: float  # the largest in training
    sample_noise: float  # in sampling


class Parts(NamedTuple):
    """Everything that a config resolves to. Grouped by who uses it."""

    # Both training and sampling.
    spec: DataSpec
    value_range: tuple[float, float]  # of black and of white, in the network
    path: process.Path
    prediction: Prediction
    variance: str
    model: Model  # as trained: predicts tokens if the loss is measured on patches, else images
    chain: np.ndarray | None  # all times of a discrete path [T + 1], falling to 0
    superres: Superres | None
    bounds: np.ndarray | None  # the times between SNR experts, [n]
    split: int | None  # which expert this is
    # Training.
    seed: int
    method: methods.Method | None  # None: to denoise
    times: times.Times
    history: times.History | None  # initial value, if times follow the loss
    weight: loss.Weight | None
    space: Callable[[jax.Array], jax.Array] | None
    vlb: vlb.Vlb | None
    optimizer: optax.GradientTransformation
    repeat: int
    label_drop: float
    dropout: bool
    ema: tuple[float, ...]
    ema_warmup: bool
    gammas: tuple[float, ...]  # of power-function averages
    microbatch: int | None
    log2_scale: float | None
    # Sampling.
    image_model: Model  # predicts images
    sampler: sample.Sampler
    grid: np.ndarray  # [steps + 1]
    scaled_noise: bool  # samples start from noise of the path's scale at grid[0], not of unit scale
    guidance: Callable[[Denoise, Any], Denoise]  # (denoiser, null condition) -> denoiser; of conditional networks
    guidance_scale: guide.Scale
    # (sampler, denoiser, null condition, prediction=) -> sampler: in place of `guidance`, where that has a memory.
    guided_sampler: Callable[..., sample.Sampler] | None
    threshold: Callable[[Denoise], Denoise] | None
    floor: float  # of the divisor in the velocity, 0 for none
    sample_seed: int

    @property
    def denoiser_prediction(self) -> Prediction:
        """What `sampling.denoiser` predicts: the velocity, where the division for it has a floor."""
        return "flow" if self.floor else self.prediction


def resolve(config: Config, spec: DataSpec) -> Parts:
    """The parts of a run.

    Raises:
      ValueError: a field has a value that is not known or out of range, does not fit another field or the data, or has
        no effect; the message names the flag.
    """
    p, c = config.process, config.train
    fixed = _without_data(config)
    model, image_model = _models(config, spec, fixed["path"])
    if fixed["vlb"] is not None and not spec.plain:
        raise ValueError(
            f"--config.process.vlb_weight={p.vlb_weight} counts the bits of uint8 in 0 .. 255, not of {spec.dtype} in "
            f"{spec.value_range}: set it to 0.0, with --config.process.variance=fixed_small"
        )
    return Parts(
        spec=spec,
        model=model,
        image_model=image_model,
        method=methods.method(config, spec.shape),
        superres=_superres(config, spec),
        value_range=(config.data.low, config.data.high),
        prediction=p.prediction,
        variance=p.variance,
        split=p.split,
        seed=config.seed,
        repeat=c.repeat,
        label_drop=c.label_drop,
        dropout=any(getattr(config.model, name, 0.0) > 0 for name in ("dropout", "attention_dropout")),
        ema=c.ema,
        ema_warmup=c.ema_warmup,
        gammas=tuple(map(averages.gamma_of, c.ema_power)),
        microbatch=c.microbatch,
        log2_scale=_LOG2_SCALE if getattr(config.model, "dtype", "float32") == "float16" else None,
        sample_seed=config.sample.seed,
        **fixed,
    )


def check(config: Config) -> None:
    """Raises the errors of `resolve` that do not depend on the data."""
    _without_data(config)


def key(seed: int, use: str) -> jax.Array:
    """The key for one use of a seed, such as "init", "train" or "sample": uses share no random numbers."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(use.encode()))


def example(parts: Parts) -> tuple[jax.Array, jax.Array, Any]:
    """Zeros as the network's inputs (xt, t, y) for one image."""
    *size, channels = parts.spec.shape
    xt = jnp.zeros((1, *size, channels + extra_channels(parts)))
    t, y = jnp.zeros(1), jnp.zeros(1, int) if parts.spec.num_classes else None
    if isinstance(parts.method, methods.MeanFlow):
        t, y = jnp.zeros((1, 2)), meanflow.guided(y, 1.0, 0.0, 1.0, xt)
    return xt, t, y


def init_params(parts: Parts, shardings: Any = None) -> Any:
    """Parameters from the config's seed; with `shardings`, for each of them, on those devices from the start."""
    return jax.jit(parts.model.init, out_shardings=shardings)(key(parts.seed, "init"), *example(parts))


def extra_channels(parts: Parts) -> int:
    """How many channels the conditioning image adds to the network's input: its own, and one for its noise level."""
    return parts.spec.shape[-1] + (parts.superres.noise > 0) if parts.superres else 0


def to_float(parts: Parts, images: jax.Array) -> jax.Array:
    """Images of the data's type to the network's range of values."""
    low, high = parts.value_range
    if not parts.spec.plain:
        first, last = parts.spec.value_range
        return low + (high - low) * ((images.astype(jnp.float32) - first) / (last - first))
    return low + (high - low) * (images.astype(jnp.float32) / 255)


def to_uint8(parts: Parts, x: jax.Array) -> jax.Array:
    """Inverse of `to_float` for uint8 images, rounded and clipped."""
    low, high = parts.value_range
    return jnp.round(jnp.clip((x - low) / (high - low), 0, 1) * 255).astype(jnp.uint8)


def to_data(parts: Parts, x: jax.Array) -> jax.Array:
    """Inverse of `to_float`: in the data's range and type, or with 32 bits where that has 64; integers are rounded."""
    if parts.spec.plain:
        return to_uint8(parts, x)
    (low, high), (first, last) = parts.value_range, parts.spec.value_range
    values = first + (last - first) * jnp.clip((x - low) / (high - low), 0, 1)
    dtype = jax.dtypes.canonicalize_dtype(parts.spec.dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    return jnp.clip(values, first, last).astype(dtype)


def chain_of(parts: Parts) -> np.ndarray:
    """The times of the chain, [T + 1].

    Raises:
      ValueError: the path is not a chain.
    """
    if parts.chain is None:
        raise ValueError("--config.process.path is not a chain of steps, which this needs: set it to vp")
    return parts.chain


def _without_data(config: Config) -> dict[str, Any]:
    """The parts that do not depend on the data, by their names in `Parts`."""
    p = config.process
    checks.check(config)
    for name in ("prediction", "loss_in"):
        if getattr(p, name) is not None:
            choose(f"process.{name}", getattr(p, name), dict.fromkeys(get_args(Prediction)))
    choose("process.variance", p.variance, dict.fromkeys(get_args(Variance)))
    if not config.data.low < config.data.high:
        raise ValueError(f"--config.data.low={config.data.low} must be below --config.data.high={config.data.high}")
    path = _path(config)
    chain = grids.respaced_grid("", p.steps) if p.path in checks.CHAINS else None
    bounds = _bounds(config, path)
    patches = dict(patch_size=config.model.patch_size, stride=getattr(config.model, "stride", None))
    return {
        "path": path,
        "chain": chain,
        "bounds": bounds,
        "times": _times(config, chain, bounds),
        "history": times.empty_history(p.steps) if p.times == "loss_second_moment" else None,
        "weight": _weight(config),
        "space": partial(patchify, **patches) if p.patches else None,
        "vlb": _vlb(config, chain),
        "optimizer": _optimizer(config),
        "sampler": _sampler(config),
        "grid": (grid := _grid(config, path)),
        "scaled_noise": config.sample.rho is not None or config.process.noise_scale != 1,
        "guidance": guidance.guidance(config, path, grid),
        "guidance_scale": guidance.scale(config),
        "guided_sampler": guidance.guided_sampler(config),
        "threshold": _threshold(config, path),
        "floor": _of_noise(config, config.sample.floor),
    }


def _path(config: Config) -> process.Path:
    c = config.process
    options = {
        "linear": lambda: process.Linear(c.noise_scale),
        "cosine": process.Cosine,
        "vp": lambda: process.VP(process.named_betas(c.betas, c.steps)),
        "geometric": lambda: process.Geometric(c.rate, c.steps),
    }
    with named("process.betas" if c.path == "vp" else "process"):
        return choose("process.path", c.path, options)()


def _models(config: Config, spec: DataSpec, path: process.Path) -> tuple[Model, Model]:
    """The network as it is trained, and with images as predictions."""
    c, p = config.model, config.process
    name = network_name(c)
    if spec.num_classes and not c.conditional:
        raise ValueError(f"the network {name} is unconditional: set --noconfig.data.labels")
    if p.patches and not c.returns_tokens:
        raise ValueError(f"--config.process.patches needs a network that predicts patches, such as blog, not {name}")
    two_times = config.objective.kind == "mean_flow"
    task = Task(
        num_classes=spec.num_classes,
        scalars=meanflow.SCALARS if two_times else 0,
        velocity=two_times,
        out_channels=spec.shape[-1],
        learned_variance=_LEARNED.get(p.variance, "none"),
        path=path,
        steps=p.steps if p.path in checks.CHAINS else None,
    )
    if two_times and getattr(c, "times", None) is None:
        raise ValueError(f"--config.objective.kind=mean_flow needs a network of two times, vit, not {name}")
    if two_times and c.times != 2:
        raise ValueError(
            f"--config.objective.kind=mean_flow passes two times: set --config.model.times=2, not {c.times}"
        )
    if not two_times and getattr(c, "times", 1) != 1:
        raise ValueError(f"--config.model.times={c.times}: the losses and samplers of a run pass one time, times=1")
    with named("model"):
        model = c.model(task)
    if two_times:
        return model, methods.told(model)
    images = recomposed(model, c.patch_size, c.stride) if c.returns_tokens else model
    if config.objective.kind == "consistency":
        return images, methods.anchored(images, config, path)
    return (model if p.patches else images), images


def _bounds(config: Config, path: process.Path) -> np.ndarray | None:
    c = config.process
    if c.snr_splits:
        with named("process"):
            return experts.boundaries(path, c.snr_splits)
    if c.split is not None:
        raise ValueError(
            f"--config.process.split={c.split} needs --config.process.snr_splits, the thresholds between experts"
        )
    return None


def _times(config: Config, chain: np.ndarray | None, bounds: np.ndarray | None) -> times.Times:
    c = config.process
    if c.times == "loss_second_moment" or (bounds is not None and c.times == "grid"):
        _need_chain(config)
    if bounds is not None:
        return _expert_times(config, chain, bounds)
    options = {
        "uniform": lambda: times.uniform_times,
        "antithetic": lambda: times.antithetic_times,
        "logit_normal": lambda: times.logit_normal_times(c.times_mean, c.times_std),
        "grid": lambda: times.grid_times(c.steps, first=1 if c.path == "vp" else 0),
        "loss_second_moment": lambda: times.listed_times(chain[:-1]),
    }
    return choose("process.times", c.times, options)()


def _expert_times(config: Config, chain: np.ndarray | None, bounds: np.ndarray) -> times.Times:
    c = config.process
    if c.split is None:
        return times.uniform_times  # of the experts together, which are sampled from and not trained
    options = {
        "uniform": lambda: experts.expert_times(bounds, c.split),
        "grid": lambda: experts.expert_times(bounds, c.split, chain),
    }
    if c.times not in options:
        raise ValueError(f"--config.process.times={c.times} is not one of {', '.join(options)}, which experts can have")
    with named(f"process.split={c.split}"):
        return options[c.times]()


def _need_chain(config: Config) -> None:
    if config.process.path not in checks.CHAINS:
        raise ValueError(
            f"--config.process.path={config.process.path} is not a chain of steps, which this needs: set it to vp"
        )


def _weight(config: Config) -> loss.Weight | None:
    c = config.process
    if c.weighting is not None:
        with named("process"):
            return loss.weighting(c.weighting, c.prediction, gamma=c.weighting_gamma, bias=c.weighting_bias)
    if c.loss_in in (None, c.prediction):
        return None
    return loss.measured_in(c.loss_in, c.prediction, _of_noise(config, c.loss_floor))


def _of_noise(config: Config, floor: float) -> float:
    """A floor of t as one of the determinant, which for a prediction of x0 is sigma = noise_scale t."""
    return floor * config.process.noise_scale if config.process.prediction == "x0" else floor


def _vlb(config: Config, chain: np.ndarray | None) -> vlb.Vlb | None:
    c = config.process
    if not c.vlb_weight:
        if c.variance in _LEARNED:
            raise ValueError(
                f"--config.process.variance={c.variance} is learned from the variational term: set "
                "--config.process.vlb_weight=1.0"
            )
        if c.vlb_only:
            raise ValueError("--config.process.vlb_only needs a weight, --config.process.vlb_weight")
        return None
    if c.times not in ("grid", "loss_second_moment") or c.path != "vp":
        raise ValueError(
            f"--config.process.vlb_weight={c.vlb_weight} is measured between steps of a chain: it needs "
            f"--config.process.path=vp and times=grid or loss_second_moment, not path={c.path}, times={c.times}"
        )
    if (config.data.low, config.data.high) != (-1, 1):
        raise ValueError(
            f"--config.process.vlb_weight={c.vlb_weight} needs images in [-1, 1], not "
            f"[{config.data.low}, {config.data.high}]"
        )
    return vlb.Vlb(chain, c.variance, c.vlb_weight, c.vlb_only)


def _optimizer(config: Config) -> optax.GradientTransformation:
    c = config.train
    hidden = getattr(config.model, "hidden_matrices", None)
    if c.optimizer == "muon" and hidden is None:
        raise ValueError(
            f"--config.train.optimizer=muon needs a network that marks its hidden matrices, such as vit, not "
            f"{network_name(config.model)}: set it to adamw"
        )
    kinds = {"adamw": optimize.adamw, "muon": partial(optimize.muon, hidden=hidden, matrix_rate=c.matrix_rate)}
    kind = choose("train.optimizer", c.optimizer, kinds)
    with named("train"):
        return kind(
            c.learning_rate,
            steps=c.steps,
            warmup=c.warmup,
            schedule=c.schedule,
            b2=c.b2,
            eps=c.adam_eps,
            weight_decay=c.weight_decay,
            clip=c.clip,
        )


def _superres(config: Config, spec: DataSpec) -> Superres | None:
    c = config.condition
    if c.size is None:
        return None
    if len(spec.shape) != 3:
        raise ValueError(
            f"--config.condition.size={c.size}: super-resolution is of images [H, W, C], not of arrays of shape "
            f"{spec.shape}; set it to None"
        )
    if len(c.size) != 2:
        raise ValueError(f"--config.condition.size={c.size} must be a pair (height, width)")
    if c.sample_noise > c.noise:
        raise ValueError(
            f"--config.condition.sample_noise={c.sample_noise} must not exceed --config.condition.noise={c.noise}, the "
            "largest of training"
        )
    with named("condition.size"):
        jax.eval_shape(lambda x: superres.shrink(x, c.size), jnp.zeros((1, *spec.shape)))
    return Superres(tuple(c.size), c.noise, c.sample_noise)


def _sampler(config: Config) -> sample.Sampler:
    c = config.sample
    options = {
        "ddim": lambda: sample.ddim(c.eta, c.overstep),
        "ancestral": lambda: sample.ancestral(config.process.variance),
        "heun": sample.heun,
        "dpmpp_2m": sample.dpmpp_2m,
        "euler": solvers.euler,
        "unipc": lambda: solvers.unipc(c.order),
        "adams_bashforth": lambda: solvers.adams_bashforth(c.order),
        "dpmpp_2m_sde": solvers.dpmpp_2m_sde,
        "edm": lambda: _edm(config),
        "mean_flow": meanflow.sampler,
        "consistency": distill.consistency,
    }
    if c.sampler == "mean_flow" and config.objective.kind != "mean_flow":
        raise ValueError(
            "--config.sample.sampler=mean_flow needs a network that was trained with --config.objective.kind=mean_flow"
        )
    with named("sample"):
        return choose("sample.sampler", c.sampler, options)()


def _edm(config: Config) -> sample.Sampler:
    c = config.sample
    high = float("inf") if c.churn_high is None else c.churn_high
    if not c.churn and (c.churn_low, c.churn_high, c.churn_noise) != (0, None, 1):
        raise ValueError("churn_low, churn_high and churn_noise have no effect without churn, the noise to add")
    if not c.churn_low < high:
        raise ValueError(f"churn_low={c.churn_low} must be below churn_high={c.churn_high}")
    if c.respacing is not None and c.churn:
        raise ValueError(f"churn={c.churn} is spread over sample.steps: leave out --config.sample.respacing")
    return solvers.edm(c.churn / c.steps, low=c.churn_low, high=high, noise=c.churn_noise)


def _grid(config: Config, path: process.Path) -> np.ndarray:
    c = config.sample
    if c.respacing is not None:
        if (c.shift, c.last) != (1, None):
            raise ValueError(
                f"--config.sample.respacing={c.respacing!r} names the steps: leave out sample.shift and sample.last"
            )
        _need_chain(config)
        if c.rho is not None:
            raise ValueError(f"--config.sample.respacing={c.respacing!r} names the steps: leave out sample.rho")
        with named("sample"):
            return grids.respaced_grid(c.respacing, config.process.steps)
    if c.rho is not None:
        if (c.shift, c.last) != (1, None):
            raise ValueError(f"--config.sample.rho={c.rho} sets the times: leave out sample.shift and sample.last")
        with named("sample.rho, sigma_min, sigma_max"):
            return grids.rho_grid(path, c.steps, c.sigma_max, c.sigma_min, c.rho)
    # Where alpha = 0 a prediction of eps does not determine x0: begin just below.
    with jax.ensure_compile_time_eval():
        singular = config.process.prediction == "eps" and float(path(jnp.ones(()))[0]) < 1e-6
    with named("sample"):
        return grids.shifted_grid(c.steps, c.shift, 0.999 if singular else 1.0, c.last)


def _threshold(config: Config, path: process.Path) -> Callable[[Denoise], Denoise] | None:
    c, about = config.sample, dict(path=path, prediction=config.process.prediction)
    about |= dict(low=config.data.low, high=config.data.high)
    if c.threshold is not None and c.clip:
        raise ValueError(f"--config.sample.threshold={c.threshold} keeps estimates in range already: leave out clip")
    if c.threshold is not None:
        return lambda denoise: guide.dynamic_threshold(denoise, quantile=c.threshold, **about)
    return (lambda denoise: guide.clip(denoise, **about)) if c.clip else None
