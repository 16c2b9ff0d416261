"""Makes a run of published PyTorch weights: `experiments.sample` samples from it, `experiments.train` continues it.

    python -m experiments.convert --source=model.pt --layout=dit --config=CONFIG.py --classes=1000 --workdir=runs/dit

The config describes the network, its prediction and its images, of which --config.data.size and --config.data.channels
must be set; no data set is opened. To continue training, the classes must have the data's names: pass a file of them.
The weights become step 0 of the run, parameters and average alike. Of several averages in the config the run has one:
for --entry=model_ema2 the second, else the first; a training that continues it takes the same --config.train.ema.
A file that does not fit the network is refused, with every missing key, unexpected key and shape mismatch.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from diffusion import data
from diffusion.io import files
from diffusion.pretrained import layouts
from experiments import command, objective, parts, sampling
from experiments.command_line import define_config, given_config
from experiments.config import Config
from experiments.paths import define_path
from experiments.run_dir import RunDir, default_workdir

flags.declare_key_flag("workdir")
flags.declare_key_flag("split")
_SOURCE = define_path("source", None, "The published weights: a .safetensors, .npz, .pt or .pth file.")
_LAYOUT = flags.DEFINE_enum(
    "layout", None, ["patch_unet", "adm_unet", "dit", "jit"], "Whose names and shapes they have."
)
_ENTRY = flags.DEFINE_string(
    "entry", None, "Which of the entries of a training checkpoint to take, such as ema; of JiT's, model_ema1."
)
_CLASSES = define_path("classes", "0", "How many classes the weights know, or a file with a name per line.")
_NULL_CLASS = flags.DEFINE_bool(
    "null_class", None, "Whether the weights know a label for no class; default: as published, not for adm_unet."
)
_NEW_ATTENTION_ORDER = flags.DEFINE_bool(
    "new_attention_order", False, "The published use_new_attention_order; the weights do not tell."
)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; fields are set as in --config.model.depth=12")
    config = given_config()
    command.start()
    workdir = command.workdir(default_workdir(config))
    config = replace(config, train=replace(config.train, init_from=None))  # these weights take its place
    names = class_names(_CLASSES.value)
    count = convert(config, workdir, _SOURCE.value, layout(config), class_names=names, entry=_ENTRY.value)
    print(f"{_SOURCE.value}: {count:,} parameters, now step 0 of {workdir}")
    if len(config.train.ema) > 1:
        ema = one_average(config, _ENTRY.value).train.ema
        print(f'its one average has the decay {ema[0]}; to continue its training pass --config.train.ema="{ema}"')
    if config.process.split is None:
        print(f"sample from it with: python -m experiments.sample --workdir={workdir}")
    else:
        experts = ",".join(f"EXPERT{i}" for i in range(len(config.process.snr_splits) + 1))
        print(f"sample, with all experts converted, with: python -m experiments.sample --workdir={experts}")


def layout(config: Config) -> layouts.Layout:
    """The layout of --layout.

    Raises:
      ValueError: it is missing.
    """
    null = {} if _NULL_CLASS.value is None else {"null_class": _NULL_CLASS.value}
    order = {"new_attention_order": _NEW_ATTENTION_ORDER.value}
    known: dict[str, Callable[[], layouts.Layout]] = {
        "patch_unet": lambda: layouts.patch_unet(**order, **null),
        "adm_unet": lambda: layouts.adm_unet(**order, **null),
        "dit": lambda: layouts.dit(config.model.patch_size, **null),
        "jit": lambda: layouts.jit(config.model.patch_size, **null),
    }
    if _LAYOUT.value is None:
        raise ValueError(f"--layout is missing: pass one of {', '.join(known)}")
    return known[_LAYOUT.value]()


def class_names(given: str) -> tuple[str, ...]:
    """Names of the classes: the lines of a file, or as many numbers as are asked for."""
    if given.isdecimal():
        return tuple(map(str, range(int(given))))
    if not Path(given).is_file():
        raise FileNotFoundError(f"--classes={given} is neither a number nor a file with the name of a class per line")
    lines = Path(given).read_text(encoding="utf-8-sig").rstrip().splitlines()  # a byte order mark is no name
    names = tuple(data.nfc(line.strip()) for line in lines)
    if not all(names):
        raise ValueError(f"--classes={given}: line {names.index('') + 1} is blank; write the name of a class per line")
    data.check_class_names(f"--classes={given}", names)
    return names


def convert(
    config: Config,
    workdir: Path,
    source: str | None,
    layout: layouts.Layout,
    *,
    class_names: tuple[str, ...] = (),
    entry: str | None = None,
) -> int:
    """Makes the run in `workdir`; returns its number of parameters.

    Raises:
      ValueError: `source` does not fit the network or holds NaN, a field is missing, or `workdir` holds a run.
      OSError: `source` cannot be read, or `workdir` not written.
    """
    if not source:
        raise ValueError("--source is missing: pass the file of published weights, --source=model.pt")
    if not Path(source).is_file():
        raise FileNotFoundError(f"--source={source}: there is no such file")
    folder = RunDir(workdir)
    if folder.is_run:
        raise ValueError(f"{workdir} holds a run already; pass another --workdir")
    c = config.data
    if c.size is None or c.channels is None:
        raise ValueError(
            f"--config.data.size={c.size} and --config.data.channels={c.channels} must give the format of the "
            "network's images, as in --config.data.size='(256, 256)' --config.data.channels=3"
        )
    if c.range is not None:
        raise ValueError(
            f"--config.data.range={c.range}: published weights are those of uint8 images; leave it out, and begin a "
            "training on other arrays with --config.train.init_from"
        )
    if class_names and not c.labels:
        raise ValueError(f"--classes: {len(class_names)} classes need --config.data.labels")
    config = one_average(config, entry)
    run = parts.resolve(config, parts.DataSpec((*c.size, c.channels), class_names))
    like = jax.eval_shape(partial(parts.init_params, run))
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    low = [jax.ShapeDtypeStruct((1, *run.superres.size, c.channels), jnp.uint8)] if run.superres else []
    jax.eval_shape(sampling.sample_fn(run), like, one, one, *low)
    files.check_writable(workdir)
    params = jax.tree.map(jnp.asarray, layouts.from_torch(layouts.read(source, entry), like, layout))
    check_finite(params, source)
    folder.write_new(config, run.spec, objective.init_state(run, params))
    return sum(p.size for p in jax.tree.leaves(params))


def one_average(config: Config, entry: str | None) -> Config:
    """The config with one average: a file of weights holds one. `model_ema2` is the second of the config's, and what
    says nothing of its number the first.
    """
    decays = config.train.ema
    numbered = re.fullmatch(r"model_ema([1-9])", entry or "")
    number = int(numbered[1]) - 1 if numbered and int(numbered[1]) <= len(decays) else 0
    return replace(config, train=replace(config.train, ema=(decays[number],)))


def check_finite(params: Any, source: str) -> None:
    """Raises ValueError, with their names, if parameters are NaN or infinite: every sample would be."""
    counts = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda p: int((~jnp.isfinite(p)).sum()), params))
    bad = {jax.tree_util.keystr(path, simple=True, separator="/"): count for path, count in counts if count}
    if bad:
        raise ValueError(
            f"--source={source}: {sum(bad.values())} values are NaN or infinite, in {', '.join(list(bad)[:5])}"
            f"{', ...' if len(bad) > 5 else ''}: download the file again, or take another --entry of it"
        )


if __name__ == "__main__":
    command.run(main, define_config)
