"""Training step and sampling of a config's vision transformer, compared with the same network in PyTorch.

    python -m experiments.bench.vit                                     the digits' network, on the cores of this CPU
    python -m experiments.bench.vit --config=experiments/configs/jit.py:b16 --config.train.batch_size=256 \\
        --config.train.ema="(0.9999,)" --attention=xla,cudnn --peer=compile --peak_tflops=989
                                                                        JiT-B/16, on one H100 or H200

A training step is noising, forward, backward, clipping, AdamW and the average of the parameters. First both networks
are shown to be the same one: with our parameters copied, outputs and gradients must agree. Then all programs take turns
in one process on the same cores or GPU (`timing`). bfloat16 configs run under autocast in PyTorch. Beside
PyTorch a config with another optimiser is timed with AdamW, for it is the network that is compared. Also counted:

    FLOPs = 3 * 2 * (multiplications in matrix products of the forward pass),  MFU = FLOPs/s / --peak_tflops  (1)

PyTorch is an extra: pip install -e '.[torch]'; --peer=none does without.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import flags

from diffusion.models.vit import ViT
from diffusion.patch.geometry import geometry
from experiments import command, costs
from experiments.bench import commands, jax_run, peers, tables, timing
from experiments.command_line import define_config, given_config
from experiments.config import Config, network_name
from experiments.parts import DataSpec, resolve

PEERS = {"both": ("eager", "compile"), "eager": ("eager",), "compile": ("compile",), "none": ()}
flags.declare_key_flag("split")
_PEER = flags.DEFINE_enum("peer", "both", list(PEERS), "PyTorch as it is, under torch.compile, or not at all.")
_ATTENTION = flags.DEFINE_list("attention", [], "Our attention implementations, e.g. xla,cudnn; default: the config's.")
_NUM_CLASSES = flags.DEFINE_integer(
    "num_classes", 1000, "Classes of data that need not be there: configs that state both size and channels."
)
_PEAK = flags.DEFINE_float("peak_tflops", None, "Peak TFLOP/s of the device at the config's dtype, for the MFU.")

NOISE = 0.02  # on the initial parameters
# What the network and the program in PyTorch can do, beside the fields that `torch_vit.ViT` has.
KNOWN = {
    "model.dropout": 0,
    "model.attention_dropout": 0,
    "model.remat": "none",
    "model.times": 1,
    "model.velocity_depth": 0,
    "objective.kind": "denoise",
    "process.path": "linear",
    "process.noise_scale": 1.0,
    "process.prediction": "x0",
    "process.loss_in": "flow",
    "process.times": "logit_normal",
    "train.repeat": 1,
    "sample.clip": False,
}


def main(argv: Sequence[str]) -> None:
    command.start()
    measure = partial(
        run,
        given_config(),
        modes=PEERS[_PEER.value],
        attention=_ATTENTION.value,
        num_classes=_NUM_CLASSES.value,
        peak_tflops=_PEAK.value,
        **commands.amounts(),
    )
    commands.perform(argv, measure, report)


def define_flags(argv: list[str]) -> None:
    """Defines the flags of all benchmarks and the config's."""
    commands.define_flags(argv)
    define_config(argv)


def run(
    config: Config,
    *,
    modes: Sequence[str] = (),
    attention: Sequence[str] = (),
    rounds: int = 3,
    steps: int = 1,
    sample_steps: int = 1,
    num_classes: int = 1000,
    peak_tflops: float | None = None,
) -> dict[str, Any]:
    """All measurements, ready for JSON; `modes` of PyTorch are "eager" and "compile".

    Raises:
      ValueError: the network is no vision transformer, or PyTorch is asked for and missing, or does not know what the
        config asks for.
      AssertionError: the two networks are not the same.
    """
    if not isinstance(config.model, ViT):
        name = network_name(config.model)
        raise ValueError(f"this benchmark times the network vit, not {name}: pass a --config with model=ViT(...)")
    vit_peer = peer_module(config) if modes else None
    if modes:
        options = dataclasses.replace(config.train, optimizer="adamw", matrix_rate=Config().train.matrix_rate)
        config = dataclasses.replace(config, train=options)
    spec = jax_run.data_spec(config, num_classes)
    rng = np.random.default_rng(0)
    b, count = config.train.batch_size, config.sample.batch_size
    batch = {"x": rng.integers(0, 256, (b, *spec.shape), np.uint8)}
    batch["y"] = rng.integers(0, max(spec.num_classes, 1), b).astype(np.int32)
    labels = rng.integers(0, max(spec.num_classes, 1), count).astype(np.int32)
    timed = jax_run.with_sample_steps(config, sample_steps)
    params = jax_run.params(resolve(timed, spec), NOISE)

    agreement = vit_peer.parity(config, spec, params) if modes else None
    train, sample = {}, {}
    for implementation in attention or [config.model.attention]:
        name = f"ours, {implementation}" if implementation else "ours"
        own = resolve(jax_run.with_model(timed, attention=implementation), spec)
        train[name] = jax_run.train(own, params, batch, steps)
        sample[name] = jax_run.sample(own, params, labels)
    for mode in modes:
        train[f"PyTorch {mode}"] = vit_peer.train(config, spec, params, batch, steps, mode)
        sample[f"PyTorch {mode}"] = vit_peer.sample(timed, spec, params, labels, mode)

    per_image = forward_flops(config, spec)
    cost = {"train": 3 * per_image, "sample": (1 + jax_run.guided(config, spec)) * config.sample.steps * per_image}
    result = {
        "machine": timing.machine() | (vit_peer.versions() if modes else {}),
        "config": config.name,
        "batch_size": b,
        "dtype": config.model.dtype,
        "optimizer": config.train.optimizer,
        "tokens": math.prod(geometry(spec.shape[:-1], config.model.patch_size, config.model.stride).grid),
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "parity": agreement,
        "sample_batch": count,
        "sample_steps": config.sample.steps,
        "sample_steps_timed": sample_steps,
        "peak_tflops": peak_tflops,
        "train": timing.compare(train, steps * b, rounds),
        "sample": timing.compare(sample, count * sample_steps / config.sample.steps, rounds),
    }
    for kind, flops in cost.items():
        for row in result[kind].values():
            row["tflops"] = flops * row["per_second"] / 1e12
            row["mfu"] = row["tflops"] / peak_tflops if peak_tflops else None
    return result


def peer_module(config: Config) -> Any:
    """The module `vit_peer`.

    Raises:
      ValueError: PyTorch is missing, cannot use our device, or does not know what the config asks for.
    """
    for field, value in KNOWN.items():
        section, name = field.split(".")
        asked = getattr(getattr(config, section), name)
        if asked != value:
            raise ValueError(f"the PyTorch network knows --config.{field}={value} only, not {asked}; pass --peer=none")
    if len(config.train.ema) != 1:
        raise ValueError(
            f"the PyTorch program keeps one average, not --config.train.ema={config.train.ema}; pass --peer=none"
        )
    return peers.torch_module("vit_peer", without="pass --peer=none to time ours alone")


def forward_flops(config: Config, spec: DataSpec) -> int:
    """FLOPs of the matrix products of one image's forward pass, eq. (1)."""
    return costs.forward_flops(resolve(config, spec))


def report(result: dict[str, Any]) -> str:
    """The result in words and two tables."""
    machine, errors = result["machine"], result["parity"]
    lines = [
        f"{result['config']}: {result['parameters']:,} parameters, {result['tokens']} tokens, {result['dtype']}; "
        + tables.where(machine, ["jax", "torch"])
        + (f" on {machine['torch_threads']} threads" if errors else "")
    ]
    if errors:
        lines.append(f"The network in PyTorch is {peers.agreement(errors)}.")
    titles = {
        "train": f"training step with {result['optimizer']}, {result['batch_size']} images",
        "sample": f"{result['sample_batch']} samples, {result['sample_steps']} DDIM steps "
        f"(timed over {result['sample_steps_timed']})",
    }
    for kind, title in titles.items():
        rows = result[kind]
        others = [name for name in rows if name.startswith("PyTorch")]
        heads = ["ms per image", "images/s", *(f"speed over {name}" for name in others), "TFLOP/s"]
        mfu = result["peak_tflops"] is not None
        cells = [
            [
                name,
                f"{1000 * row['seconds']:.3f}",
                f"{row['per_second']:.1f}",
                *(tables.over(row, other) for other in others),
                f"{row['tflops']:.3f}",
                *([f"{row['mfu']:.1%}"] if mfu else []),
            ]
            for name, row in rows.items()
        ]
        lines += ["", tables.table(title, heads + ["MFU"] * mfu, cells)]
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main, define_flags)
