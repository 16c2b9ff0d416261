"""What a run is made of, as typed dataclasses: every field is a flag, `--config.model.depth=8`.

The resolved config is stored as JSON beside the checkpoints; sampling, evaluation and resuming read that.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, get_type_hints


@dataclass
class Data:
    """Pictures; `diffusion.data.load` explains name, size, crop and channels."""

    name: str = "mnist5k"  # a TFDS data set, or folder:PATH
    data_dir: str | None = None  # where TFDS keeps its data sets
    held_out: str = "test"  # the split that training leaves out; of ImageNet and LSUN it is "validation"
    size: tuple[int, ...] | None = None  # (height, width); None keeps the pictures' own
    crop: str = "center"
    channels: int | None = None
    flip: bool = False  # random horizontal flips
    shift: int = 0  # random shifts by up to this many pixels
    low: float = -1.0  # value of black
    high: float = 1.0  # value of white


@dataclass
class Model:
    """The network: "vit" (DiT / JiT, `diffusion.models.vit`), "unet" (Patch Diffusion / ADM, `diffusion.models.unet`)
    or "blog" (`diffusion.models.blog`). A field that the network does not read must keep its default."""

    name: str = "vit"
    patch_size: int = 4
    conditional: bool = True  # on labels, where the data has them
    dropout: float = 0.0
    clock: str = "1000 t"  # what the network sees of the time: "1000 t" (DiT), "1 - t" (JiT), "index" (DDPM's T t - 1)
    dtype: str = "float32"  # of the computation; or bfloat16, float16 (a U-Net's, with loss scaling)
    remat: bool = False
    attention: str | None = None  # "cudnn" on a GPU in bfloat16
    heads: int = 4
    # vit; stride, depth and head_dim are the blog's too
    stride: int | None = None
    width: int = 128
    depth: int = 6
    head_dim: int = 100
    mlp_ratio: float = 4.0
    bottleneck: int | None = None
    norm: str = "layer"
    mlp: str = "gelu"
    qk_norm: bool = False
    positions: tuple[str, ...] = ("sincos",)
    class_tokens: int = 0
    class_tokens_from: int = 0
    # unet
    num_channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16, 8)  # of the patch grid
    num_head_channels: int | None = None  # width of a head, instead of `heads`
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    adm: bool = False  # blocks as in guided-diffusion


@dataclass
class Process:
    """The noising process and the loss."""

    path: str = "linear"  # linear, cosine, vp (a chain of betas), geometric (the blog's)
    betas: str = "linear"  # vp: linear, linear<beta_max> (linear0.025), cosine
    rate: float = 0.99  # geometric: data kept per step
    steps: int = 1000  # T of the discrete paths, vp and geometric
    prediction: str = "x0"
    loss_in: str | None = "flow"  # prediction in whose coordinates the error is measured; None: its own
    loss_floor: float = 0.05
    weighting: str | None = None  # instead of loss_in: sqrt_snr, snr, snr+1, truncated_snr, p2, min_snr, sigmoid
    weighting_gamma: float = 5.0  # min_snr
    weighting_bias: float = 2.0  # sigmoid
    # Of an ancestral step: fixed_small, fixed_large, or what the network learns: learned_range (a second half of its
    # last layer: ADM, DiT) or learned_sigmoid (layers of their own: Patch Diffusion). What is learned needs a bound.
    variance: str = "fixed_small"
    bound: float = 0.0  # weight of the variational term, in bits per dimension
    bound_alone: bool = False  # nothing but the variational term (guided-diffusion's use_kl)
    patches: bool = False  # measure the error on overlapping patches rather than pixels (blog)
    times: str = "logit_normal"  # uniform, antithetic, logit_normal, grid (the discrete steps), loss_second_moment
    times_mean: float = 0.0
    times_std: float = 1.0
    snr_splits: tuple[float, ...] = ()  # falling thresholds: one network (expert) more than there are of these
    split: int | None = None  # which expert this run trains, 0 the one with the cleanest pictures; --split for short


@dataclass
class Condition:
    """A smaller picture that the network also sees: super-resolution."""

    size: tuple[int, ...] | None = None  # (height, width) of it; None for no condition
    noise: float = 0.0  # noise on it in training has a deviation drawn from 0 to this, which the network is told
    sample_noise: float = 0.0  # the deviation when pictures are drawn


@dataclass
class Train:
    """Optimisation, and how often to look at it (in steps)."""

    steps: int = 2000
    batch_size: int = 64
    microbatch: int | None = None  # pictures to differentiate at a time, to save memory; the same step
    repeat: int = 1  # noisings of each picture in a batch
    optimizer: str = "adamw"  # or muon, for a ViT's matrices, beside NAdam for all else (`diffusion.optimize`)
    learning_rate: float = 1e-3
    matrix_rate: float = 0.03  # muon: the learning rate of those matrices
    warmup: int = 100
    schedule: str = "cosine"  # or linear, constant
    b2: float = 0.99
    adam_eps: float = 1e-8
    weight_decay: float = 0.0  # per step, times the rate; of all matrices and tables, under muon only of its matrices
    clip: float | None = 1.0  # of the gradient's norm
    ema: tuple[float, ...] = (0.995,)  # decay of the averaged weights, or several; the first draws
    label_drop: float = 0.1
    init_from: str | None = None  # work directory of a run whose averaged weights this one begins with
    log_every: int = 20
    sample_every: int = 500
    save_every: int = 500
    eval_every: int | None = None  # loss on held-out pictures
    eval_count: int = 800
    patience: int | None = None  # stop after this many evaluations without a better one, keep the best weights


@dataclass
class Sample:
    """How pictures are drawn, during training, at its end and by `experiments.sample`."""

    count: int = 1000  # drawn and measured at the end of training
    steps: int = 50
    sampler: str = "ddim"  # ddim, ancestral, heun
    eta: float = 0.0  # ddim: noise put back, up to 1
    overstep: float = 1.0  # ddim: the blog's step size
    respacing: str | None = None  # instead of steps: some of the T of the chain, "250", "10,15,20" or "ddim25"
    shift: float = 1.0  # of the time grid
    last: float | None = None  # time from which the last step leaps to the data
    guidance: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    clip: bool = False  # keep x0 estimates inside the data's range
    threshold: float | None = None  # dynamic thresholding of x0 estimates, at this quantile: 0.995
    batch_size: int = 250
    seed: int = 0


@dataclass
class Config:
    """A whole run."""

    name: str = "mnist"
    seed: int = 0
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    process: Process = field(default_factory=Process)
    condition: Condition = field(default_factory=Condition)
    train: Train = field(default_factory=Train)
    sample: Sample = field(default_factory=Sample)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-ready values."""
    listed = lambda pairs: {k: list(v) if isinstance(v, tuple) else v for k, v in pairs}  # noqa: E731
    return dataclasses.asdict(config, dict_factory=listed)


def from_dict(values: dict[str, Any], cls: type = Config) -> Any:
    """Inverse of `to_dict`. A field that a stored config lacks is newer than the run, and takes its default: what a
    new field does by default is what was done before there was one.

    Raises:
      ValueError: fields are unknown, as in a config stored by another version; they are listed.
    """
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"the stored config has the fields {unknown} of {cls.__name__}, which this version has not")

    def read(hint: Any, value: Any) -> Any:
        if dataclasses.is_dataclass(hint):
            return from_dict(value, hint)
        return tuple(value) if isinstance(value, list) else value

    return cls(**{name: read(hint, values[name]) for name, hint in hints.items() if name in values})
