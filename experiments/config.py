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
    size: tuple[int, ...] | None = None  # (height, width); None keeps the pictures' own
    crop: str = "center"
    channels: int | None = None
    flip: bool = False  # random horizontal flips
    shift: int = 0  # random shifts by up to this many pixels
    low: float = -1.0  # value of black
    high: float = 1.0  # value of white


@dataclass
class Model:
    """The network: "vit" (DiT / JiT fields, `diffusion.models.vit`) or "blog" (`diffusion.models.blog`)."""

    name: str = "vit"
    patch_size: int = 4
    stride: int | None = None
    width: int = 128
    depth: int = 6
    heads: int = 4
    head_dim: int = 100  # blog only
    conditional: bool = True  # on labels, where the data has them
    mlp_ratio: float = 4.0
    bottleneck: int | None = None
    norm: str = "layer"
    mlp: str = "gelu"
    qk_norm: bool = False
    positions: tuple[str, ...] = ("sincos",)
    class_tokens: int = 0
    class_tokens_from: int = 0
    dropout: float = 0.0
    clock: str = "1000 t"  # what the network sees of the time: "1000 t" (DiT) or "1 - t" (JiT)
    dtype: str = "float32"
    remat: bool = False
    attention: str | None = None  # "cudnn" on a GPU in bfloat16


@dataclass
class Process:
    """The noising process and the loss."""

    path: str = "linear"  # linear, cosine, vp (linear betas), geometric (the blog's)
    rate: float = 0.99  # geometric: data kept per step
    steps: int = 1000  # of the discrete paths, vp and geometric
    prediction: str = "x0"
    loss_in: str | None = "flow"  # prediction in whose coordinates the error is measured; None: its own
    loss_floor: float = 0.05
    patches: bool = False  # measure the error on overlapping patches rather than pixels (blog)
    times: str = "logit_normal"  # uniform, antithetic, logit_normal, grid (the discrete steps)
    times_mean: float = 0.0
    times_std: float = 1.0


@dataclass
class Train:
    """Optimisation, and how often to look at it (in steps)."""

    steps: int = 2000
    batch_size: int = 64
    repeat: int = 1  # noisings of each picture in a batch
    learning_rate: float = 1e-3
    warmup: int = 100
    schedule: str = "cosine"  # or constant
    b2: float = 0.99
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0
    ema: float = 0.995
    label_drop: float = 0.1
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
    overstep: float = 1.0  # the blog's step size
    shift: float = 1.0  # of the time grid
    last: float | None = None  # time from which the last step leaps to the data
    guidance: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    clip: bool = False  # keep x0 estimates inside the data's range
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
    train: Train = field(default_factory=Train)
    sample: Sample = field(default_factory=Sample)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-ready values."""
    listed = lambda pairs: {k: list(v) if isinstance(v, tuple) else v for k, v in pairs}  # noqa: E731
    return dataclasses.asdict(config, dict_factory=listed)


def from_dict(values: dict[str, Any], cls: type = Config) -> Any:
    """Inverse of `to_dict`.

    Raises:
      ValueError: fields are missing or unknown, as in a config stored by another version; they are listed.
    """
    hints = get_type_hints(cls)
    wrong = sorted(set(hints) ^ set(values))
    if wrong:
        raise ValueError(f"the stored config and this version differ in the fields {wrong} of {cls.__name__}")

    def read(hint: Any, value: Any) -> Any:
        if dataclasses.is_dataclass(hint):
            return from_dict(value, hint)
        return tuple(value) if isinstance(value, list) else value

    return cls(**{name: read(hint, values[name]) for name, hint in hints.items()})
