"""Features per second of the networks that images are compared with, beside the same networks in PyTorch.

    python -m experiments.bench.features
    python -m experiments.bench.features --networks=inception --images=8 --rounds=5

Both are given the same random weights and images of the network's own size as floats, and must give the same values
before they are timed. PyTorch runs eagerly, with channels first and last.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import flags

from diffusion.models import efficientnet, inception
from experiments import command
from experiments.bench import commands, peers, tables, timing

NETWORKS = {"efficientnet": efficientnet, "inception": inception}


def define_flags(argv: list[str]) -> None:
    """Defines these flags and those of all benchmarks; not on import, since another command has one of this name."""
    commands.define_flags(argv)
    flags.DEFINE_multi_enum("networks", list(NETWORKS), list(NETWORKS), "Which networks.")
    flags.DEFINE_integer("images", 16, "Images in a batch.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    measure = partial(run, flags.FLAGS.networks, images=flags.FLAGS.images, rounds=flags.FLAGS.rounds)
    commands.perform(argv, measure, report)


def run(networks: Sequence[str] = tuple(NETWORKS), *, images: int = 16, rounds: int = 3) -> dict[str, Any]:
    """All measurements, ready for JSON.

    Raises:
      ValueError: PyTorch is missing.
      AssertionError: the programs do not compute the same.
    """
    peer = peers.torch_module("torch_features", "leave this benchmark out")
    return {"machine": timing.machine(), "images": images} | {
        name: _measure(peer, name, images, rounds) for name in networks
    }


def random_weights(shapes: Any) -> Any:
    """Weights with which values keep their size from layer to layer."""
    rng = np.random.default_rng(0)

    def value(shape: Any) -> np.ndarray:
        scale = np.sqrt(2 / np.prod(shape.shape[:-1])) if len(shape.shape) > 1 else 0.1
        return (rng.standard_normal(shape.shape) * scale).astype(np.float32)

    return jax.tree.map(value, shapes)


def _measure(peer: Any, name: str, images: int, rounds: int) -> dict[str, Any]:
    network = NETWORKS[name]
    params = random_weights(network.shapes())
    x = np.random.default_rng(0).uniform(-1, 1, (images, network.SIZE, network.SIZE, 3)).astype(np.float32)
    on_device = jax.device_put(params)
    apply = jax.jit(network.apply)
    programs = {"Flax": lambda: jax.block_until_ready(apply(on_device, x))}
    for last, kind in ((False, "channels first"), (True, "channels last")):
        programs[f"PyTorch, {kind}"] = peer.program(name, params, x, last)
    ours = programs["Flax"]()
    ours = (ours.pool, ours.logits, ours.spatial) if name == "inception" else ours
    errors = {}
    for kind in list(programs)[1:]:
        differences = [
            np.abs(a - b).max() / np.abs(a).max() for a, b in zip(map(np.asarray, ours), programs[kind](), strict=True)
        ]
        errors[kind] = float(max(differences))
    return {"errors": peers.check_same(name, errors), "programs": timing.compare(programs, images, rounds)}


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [tables.where(result["machine"]), ""]
    for name in (name for name in NETWORKS if name in result):
        rows = [
            [
                kind,
                f"{row['per_second']:.1f}",
                tables.over(row, "PyTorch, channels first"),
                tables.over(row, "PyTorch, channels last"),
            ]
            for kind, row in result[name]["programs"].items()
        ]
        heads = ["images/s", "over channels first", "over channels last"]
        lines += [tables.table(f"{name}, batches of {result['images']}", heads, rows), ""]
        lines += [peers.agreement(result[name]["errors"]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main, define_flags)
