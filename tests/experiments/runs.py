"""Small runs for tests: their configs, how to train and sample them, and how to read what they wrote."""

import contextlib
import io
import json
import signal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from absl.testing import flagsaver
from array_record.python import array_record_data_source  # noqa: F401  It defines flags: before flagsaver forgets them.

from diffusion import train as training
from diffusion.io import checkpoint
from diffusion.models.unet import UNet
from diffusion.models.vit import ViT
from experiments import config as configs
from experiments import log, objective, parts, sample, train
from experiments.configs import blog, patch_unet_mnist, smoke
from experiments.run_dir import RunDir

ROOT = Path(__file__).parents[2]
STEPS = 6


class Run(NamedTuple):
    workdir: Path
    config: configs.Config
    report: dict[str, Any]
    printed: str


def tiny() -> configs.Config:
    """The smoke config, as small as it gets; previews, checkpoints and log rows are due at different steps."""
    config = smoke.get_config()
    config.model.width, config.model.depth = 16, 1
    config.train = configs.Train(
        steps=STEPS, batch_size=4, warmup=1, learning_rate=1e-2, log_every=2, sample_every=2, save_every=3
    )
    config.sample = configs.Sample(count=15, steps=2, guidance=2.0, batch_size=6)
    return config


def tiny_blog() -> configs.Config:
    """The blog's recipe with a small network, and a learning rate that grows until the loss gets worse."""
    config = blog.get_config()
    config.model.depth, config.model.heads, config.model.head_dim = 1, 2, 4
    config.process.steps = 10
    config.train.steps, config.train.batch_size, config.train.repeat = 40, 2, 3
    config.train.learning_rate, config.train.warmup = 0.2, 20
    config.train.log_every, config.train.save_every = 1, 100
    config.train.eval_every, config.train.eval_count, config.train.patience = 1, 12, 3
    config.sample = configs.Sample(count=4, steps=5, overstep=1.5, batch_size=4)
    return config


def tiny_chain(name: str = "whole") -> configs.Config:
    """Two steps of a vision transformer with a learned variance and two averages, on a chain of 8 and 8x8 digits."""
    config = patch_unet_mnist.get_config()
    config.name, config.data.size = name, (8, 8)
    config.model = ViT(patch_size=4, width=8, depth=1, heads=2, clock="index")
    config.process.variance, config.process.steps = "learned_range", 8
    config.train = configs.Train(
        steps=2, batch_size=4, warmup=0, log_every=1, sample_every=1, save_every=1, learning_rate=1e-2, ema=(0.0, 0.9)
    )
    config.sample = configs.Sample(count=4, respacing="4", sampler="ancestral", guidance=2.0, batch_size=4, clip=True)
    return config


def with_unet(config: configs.Config) -> configs.Config:
    """The same with a U-Net that has a variance head."""
    config.model = UNet(patch_size=4, num_channels=8, channel_mult=(1.0,), num_res_blocks=1, num_heads=2)
    config.process.variance = "learned_sigmoid"
    return config


def trained(config: configs.Config, workdir: Path) -> Run:
    """Trains in `workdir`, or goes on there."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        report = train.train(config, workdir)
    return Run(workdir, config, report, printed.getvalue())


def call(workdir: Path | None, *arguments: str, command: Any = sample) -> str:
    """Runs the command with these flags as a shell would; returns what it printed."""
    given = [] if workdir is None else [f"--workdir={workdir}"]
    with flagsaver.flagsaver(), contextlib.redirect_stdout(io.StringIO()) as printed:
        flags.FLAGS.unparse_flags()
        command.main(flags.FLAGS([command.__name__, *given, *arguments]))
    return printed.getvalue()


def own_flags(monkeypatch: Any, workdir: Path, command: Any, *others: Any) -> flags.FlagValues:
    """The flags that a command defines when it runs, beside --workdir, apart from those of other commands."""
    own = flags.FlagValues()
    for name in ("string", "list", "enum", "integer", "float", "bool"):
        monkeypatch.setattr(flags, f"DEFINE_{name}", partial(getattr(flags, f"DEFINE_{name}"), flag_values=own))
    for name in ("declare_key_flag", "adopt_module_key_flags"):
        monkeypatch.setattr(flags, name, lambda _: None)
    for module in (command, *others):
        monkeypatch.setattr(module, "define_path", lambda name, default, text: flags.DEFINE_string(name, default, text))
    monkeypatch.setattr(flags, "FLAGS", own)
    monkeypatch.setattr(command.command, "has_workdir", lambda: True)
    monkeypatch.setattr(command.command, "workdirs", lambda: [workdir])
    command.define_flags([])
    return own


def noisy(params: Any, scale: float) -> Any:
    """Parameters with normal noise added, so that none is at its initial zero; NumPy's, which nothing compiles."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: np.asarray(p) + scale * rng.standard_normal(p.shape, np.float32), params)


def state(config: configs.Config, workdir: Path, step: int | None = None) -> training.State:
    """The state in a checkpoint."""
    run = parts.resolve(config, RunDir(workdir).stored()[1])
    like = jax.eval_shape(lambda: objective.init_state(run, parts.init_params(run)))
    return checkpoint.restore(workdir / "checkpoints", like, step)[0]


def assert_same_state(a: training.State, b: training.State) -> None:
    """Every leaf, bit for bit."""
    named = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (a, b)]
    assert [path for path, _ in named[0]] == [path for path, _ in named[1]]
    for (path, x), (_, y) in zip(*named, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def rows(workdir: Path, timings: bool = False) -> list[dict[str, float]]:
    """What was logged, without what depends on the clock."""
    clock = () if timings else ("seconds", "images_per_second")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def samples(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of samples.npz."""
    with np.load(folder / "samples.npz") as file:
        assert file.files == ["arr_0", "arr_1"][: len(file.files)]
        return file["arr_0"], file.get("arr_1")


def files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` and its contents."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed_at(monkeypatch: Any, step: int) -> None:
    """SIGTERM reaches this process, once, when the training loss of `step` is logged."""
    scalars = log.Log.scalars

    def stopping(self: log.Log, done: int, values: dict[str, float]) -> None:
        scalars(self, done, values)
        if done == step and "loss" in values:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(log.Log, "scalars", stopping)
