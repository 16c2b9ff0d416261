"""What a run is made of, as typed dataclasses: every field is a flag, `--config.model.depth=8`.

`config.model` is the dataclass of the network that the config file chose: `ViT`, `UNet` or `Blog`, explained in
`diffusion/models/`. The resolved config is stored as JSON beside the checkpoints, where sampling, evaluation and
resuming read it.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from diffusion.models.blog import Blog
from diffusion.models.unet import UNet
from diffusion.models.vit import ViT

AnyNetwork = ViT | UNet | Blog
VERSION = 3  # of the stored config; `stored_versions` reads the earlier ones


def _only(default: Any, **values: Any) -> Any:
    """A field that has an effect only where another field of its section has this value, or one of a tuple."""
    return field(default=default, metadata={"only": values})


def _path() -> Any:
    """A field that names a file or folder, or is None."""
    return field(default=None, metadata={"path": True})


@dataclass
class Data:
    """Images, or other arrays; `diffusion.data.load` explains name, size, crop, channels, class_names_in, bad_files."""

    name: str = "mnist5k"  # a TFDS data set, folder:PATH, array:PATH or datasets:PATH (Parquet)
    data_dir: str | None = _path()  # where TFDS keeps its data sets
    held_out: str = "test"  # the split that training leaves out; of ImageNet and LSUN it is "validation"
    size: tuple[int, ...] | None = None  # (height, width); None keeps the images' own
    crop: str = "center"  # or resize, none
    channels: int | None = None  # 1, 3, or 4 with transparency; None keeps the images' own, or 3; arrays: any number
    range: tuple[float, ...] | None = None  # of arrays: smallest and largest value, which become low and high
    class_names_in: str = "folders"  # of a folder; or names (airplane_00001.png), none
    bad_files: str = "raise"  # of a folder: what to do with files that cannot be read; or skip, one of 20 at most
    labels: bool = True  # condition the network on labels, where the data has them
    flip: bool = False  # random horizontal flips
    shift: int = 0  # random shifts by up to this many pixels
    low: float = -1.0  # value of black in the network
    high: float = 1.0  # value of white in the network


@dataclass
class Process:
    """The noising process and the loss."""

    path: str = "linear"  # linear, cosine, vp (a chain of betas), geometric (the blog's)
    noise_scale: float = _only(1.0, path="linear")  # standard deviation of the noise (JiT: image size / 256)
    betas: str = _only("linear", path="vp")  # linear, linear<beta_max> (linear0.025), cosine
    rate: float = _only(0.99, path="geometric")  # alpha is multiplied by this at each step
    steps: int = 1000  # T of the discrete paths, vp and geometric
    prediction: str = "x0"  # of the network: x0, eps, v (Salimans & Ho) or flow (eps - x0)
    loss_in: str | None = "flow"  # prediction in whose coordinates the error is measured; None: its own
    loss_floor: float = 0.05  # smallest divisor in that change of coordinates (JiT: 1 - t >= 0.05)
    weighting: str | None = None  # instead of loss_in: sqrt_snr, snr, snr+1, truncated_snr, p2, min_snr, sigmoid
    weighting_gamma: float = _only(5.0, weighting="min_snr")
    weighting_bias: float = _only(2.0, weighting="sigmoid")
    # Of an ancestral step: fixed_small, fixed_large, or learned: learned_range (a second half of the last layer: ADM,
    # DiT) or learned_sigmoid (layers of its own: Patch Diffusion). A learned variance needs a vlb_weight.
    variance: str = "fixed_small"
    vlb_weight: float = 0.0  # of the variational term, in bits per dimension
    vlb_only: bool = False  # the loss is the variational term alone (guided-diffusion's use_kl)
    patches: bool = False  # measure the error on overlapping patches rather than pixels (blog)
    times: str = "logit_normal"  # uniform, antithetic, logit_normal, grid (the discrete steps), loss_second_moment
    times_mean: float = _only(0.0, times="logit_normal")  # of the normal distribution of log(t / (1 - t))
    times_std: float = _only(1.0, times="logit_normal")
    snr_splits: tuple[float, ...] = ()  # falling thresholds: one network (expert) more than there are of these
    split: int | None = None  # which expert this run trains, 0 the one with the least noise; --split for short


@dataclass
class Objective:
    """What the network learns: to denoise, or to sample in few steps (`meanflow`, `distill` of `diffusion.methods`)."""

    # denoise; mean_flow: in one step or few, from data; progressive, consistency: from the run train.init_from, whose
    # network it shares; progressive learns the sample.steps of ddim, consistency those of the sampler consistency.
    kind: str = "denoise"
    instant: float = _only(0.5, kind="mean_flow")  # share of a batch that learns the instantaneous velocity
    to_data: float = _only(0.0, kind="mean_flow")  # share of the rest whose interval ends at t = 0, as one step's does
    scale_max: float = _only(8.0, kind="mean_flow")  # largest guidance scale, of a density scale^-scale_power
    scale_power: float = _only(1.0, kind="mean_flow")
    adaptive_power: float = _only(1.0, kind="mean_flow")  # 0: the plain squared error
    features: str | None = _only(None, kind="mean_flow")  # digits or efficientnet: their error is a term of the loss
    feature_weight: float = _only(0.4, kind="mean_flow")
    feature_until: float = _only(0.8, kind="mean_flow")  # time from which on there is no such term
    guidance: float = _only(1.0, kind=("progressive", "consistency"))  # of the teacher; then sample with guidance 1
    guidance_low: float = _only(0.0, kind=("progressive", "consistency"))
    guidance_high: float = _only(1.0, kind=("progressive", "consistency"))
    first_steps: int = _only(10, kind="consistency")  # steps of the teacher's path at the start of training
    last_steps: int = _only(1280, kind="consistency")  # and at its end; they double in between
    data_std: float = _only(0.5, kind="consistency")  # of the data: how far from t = 0 the network's input is kept


@dataclass
class Condition:
    """A low-resolution image as conditioning input: super-resolution."""

    size: tuple[int, ...] | None = None  # (height, width) of it; None for no condition
    noise: float = 0.0  # largest standard deviation of noise on it in training; the network is told the value
    sample_noise: float = 0.0  # standard deviation of that noise in sampling


@dataclass
class Mesh:
    """The devices of a training (`diffusion.sharding`): data x fsdp of them. A run may go on with others."""

    data: int | None = None  # number of groups, each with a whole state; None: the number of devices over fsdp
    fsdp: int = 1  # devices of a group, over which parameters, averages and the state of the optimiser are split


@dataclass
class Train:
    """Optimisation, and how often to log, sample and save (in steps)."""

    steps: int = 2000
    batch_size: int = 64
    microbatch: int | None = None  # examples to differentiate at a time, to save memory; the same step
    repeat: int = 1  # noise samples per image in a batch
    optimizer: str = "adamw"  # or muon, for a ViT's matrices, with NAdam for all else (`diffusion.optimize`)
    learning_rate: float = 1e-3
    matrix_rate: float = _only(0.03, optimizer="muon")  # the learning rate of those matrices
    warmup: int = 100  # steps in which the rate rises from 0
    schedule: str = "cosine"  # or linear, constant
    b2: float = 0.99  # Adam's decay of the mean square of the gradient
    adam_eps: float = 1e-8
    weight_decay: float = 0.0  # per step, times the rate; of all matrices and tables, under muon only of its matrices
    clip: float | None = 1.0  # largest norm of the gradient
    ema: tuple[float, ...] = (0.995,)  # decay of the averaged weights, or several; the first is sampled from
    ema_warmup: bool = True  # the decay grows at first; published programs mostly have it constant
    # Widths of power-function averages, such as (0.05, 0.1), stored for `experiments.average` to choose any later.
    ema_power: tuple[float, ...] = ()
    snapshot_every: int = 100  # steps between those that are stored, each as large as the network; used with ema_power
    label_drop: float = 0.1  # share of labels replaced by the null label, for guidance
    init_from: str | None = _path()  # work directory of a run whose averaged weights are the initial weights
    log_every: int = 20
    sample_every: int = 500
    save_every: int = 500
    eval_every: int | None = None  # loss on held-out images
    eval_count: int = 800
    patience: int | None = None  # stop after this many validations without a better one, keep the best weights


def _option(default: Any, explanation: str, **only: Any) -> Any:
    """A field that is also a flag of `experiments.sample`, with this explanation; `only` as in `_only`."""
    return field(default=default, metadata={"help": explanation, "only": only})


@dataclass
class Sample:
    """Sampling: previews, the end of training, and the defaults of `experiments.sample`, where each field is a flag."""

    count: int = 1000  # samples at the end of training
    steps: int = _option(50, "Sampler steps.")
    sampler: str = _option(
        "ddim",
        "ddim, ancestral, heun, dpmpp_2m, euler, unipc, adams_bashforth, dpmpp_2m_sde, edm, mean_flow or consistency.",
    )
    eta: float = _option(0.0, "ddim: noise added at each step, 0 to 1.", sampler="ddim")
    overstep: float = _option(1.0, "ddim: step size relative to the grid's (the blog's 1.5).", sampler="ddim")
    order: int = _option(2, "unipc (1 to 3), adams_bashforth (1 to 4): order.", sampler=("unipc", "adams_bashforth"))
    churn: float = _option(0.0, "edm: S_churn, noise added over all steps; 40 to 80 are usual.", sampler="edm")
    churn_low: float = _option(0.0, "edm: S_min, smallest sigma / alpha at which noise is added.", sampler="edm")
    churn_high: float | None = _option(None, "edm: S_max, the largest one; without it, all.", sampler="edm")
    churn_noise: float = _option(1.0, "edm: S_noise, deviation of the added noise, 1.003 to 1.007.", sampler="edm")
    respacing: str | None = _option(None, "Instead of steps, some steps of the chain: 250, 10,15,20 or ddim25.")
    shift: float = _option(1.0, "Above 1: more steps at high noise.")
    last: float | None = _option(None, "Time from which the last step jumps to t = 0.")
    rho: float | None = _option(None, "EDM's grid: equal steps of (sigma / alpha)^(1 / rho); 7 is usual.")
    sigma_min: float = _option(0.002, "The smallest sigma / alpha of that grid, before 0.")
    sigma_max: float = _option(80.0, "The largest sigma / alpha of that grid, its first.")
    guidance: float = _option(1.0, "Guidance scale (1: none).")
    guidance_kind: str = _option("classifier_free", "classifier_free, rescale, cfg_zero, apg or cfg_plus_plus.")
    guidance_rescale: float = _option(0.7, "rescale: share, 0 to 1.", guidance_kind="rescale")
    guidance_zero_steps: int = _option(
        1, "cfg_zero: first steps that leave the noise as it is.", guidance_kind="cfg_zero"
    )
    guidance_parallel: float = _option(0.0, "apg: share of the parallel part that is kept.", guidance_kind="apg")
    guidance_radius: float | None = _option(
        None, "apg: largest norm of the difference, 2.5 to 15.", guidance_kind="apg"
    )
    guidance_momentum: float = _option(0.0, "apg: of the difference, -0.75 to -0.5 are usual.", guidance_kind="apg")
    guidance_low: float = _option(0.0, "Smallest time with guidance.")
    guidance_high: float = _option(1.0, "Largest time with guidance.")
    guidance_open: bool = _option(False, "Exclude guidance_low and a guidance_high below 1 themselves (JiT).")
    floor: float = _option(0.0, "Smallest divisor in the velocity of a network that predicts x0 or eps (JiT: 0.05).")
    clip: bool = _option(False, "Clip estimates of the image to its range of values.")
    threshold: float | None = _option(None, "Quantile of dynamic thresholding, such as 0.995.")
    batch_size: int = _option(250, "Samples at a time.")
    seed: int = _option(0, "Another seed gives other samples.")


@dataclass
class Config:
    """A whole run."""

    name: str = "mnist"
    seed: int = 0
    data: Data = field(default_factory=Data)
    model: AnyNetwork = field(default_factory=ViT)
    process: Process = field(default_factory=Process)
    objective: Objective = field(default_factory=Objective)
    condition: Condition = field(default_factory=Condition)
    mesh: Mesh = field(default_factory=Mesh)
    train: Train = field(default_factory=Train)
    sample: Sample = field(default_factory=Sample)


def network_name(network: AnyNetwork) -> str:
    """The name of a network in stored configs and messages: "vit", "unet", "blog"."""
    return type(network).__name__.lower()


def to_dict(config: Config) -> dict[str, Any]:
    """The config as JSON-ready values."""
    listed = lambda pairs: {k: list(v) if isinstance(v, tuple) else v for k, v in pairs}  # noqa: E731
    values = {"version": VERSION} | dataclasses.asdict(config, dict_factory=listed)
    return values | {"model": {"network": network_name(config.model)} | values["model"]}


def from_dict(values: dict[str, Any]) -> Config:
    """Inverse of `to_dict`, also for configs stored by earlier versions. A field that a stored config lacks takes its
    default: what a new field does by default is what was done before it existed.

    Raises:
      ValueError: fields or the network are unknown, as in a config stored by a later version; they are named.
    """
    from experiments import stored_versions

    values = stored_versions.upgrade(values)
    values = {name: value for name, value in values.items() if name != "version"}
    networks = {kind.__name__.lower(): kind for kind in get_args(AnyNetwork)}
    model = dict(values.pop("model", {"network": "vit"}))
    name = model.pop("network", None)
    if name not in networks:
        raise ValueError(f"the stored config has the network {name!r}, which is not one of {', '.join(networks)}")
    sections = {f.name: f.type for f in dataclasses.fields(Config)}
    unknown = sorted(set(values) - set(sections))
    if unknown:
        raise ValueError(f"the stored config has the fields {unknown}, unknown to this version")
    read = {name: _read(sections[name], value) for name, value in values.items()}
    return Config(model=_read(networks[name], model), **read)


def _read(kind: Any, value: Any) -> Any:
    if not dataclasses.is_dataclass(kind):
        return tuple(value) if isinstance(value, list) else value
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - known)
    if unknown:
        raise ValueError(f"the stored config has the fields {unknown} of {kind.__name__}, unknown to this version")
    return kind(**{name: _read(None, each) for name, each in value.items()})


def fields(config: Any) -> dict[str, Any]:
    """Dotted names of all fields of a config and of the dataclasses in it, "seed", "model.depth", and their types."""
    hints, names = get_type_hints(type(config)), {}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            names |= {f"{each.name}.{inner}": hint for inner, hint in fields(value).items()}
        else:
            names[each.name] = hints[each.name]
    return names
