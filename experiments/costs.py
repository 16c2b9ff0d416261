"""What the network of a run costs, by module: the ledger of its parts, and that as a table."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax

from diffusion import ledger
from experiments import parts
from experiments.parts import Parts


def of_network(run: Parts) -> dict[ledger.Path, ledger.Cost]:
    """Parameters, operations and bytes kept by the modules of a run's network, per image; with dropout, if it has any.

    Nothing is computed.
    """
    apply = partial(run.model.apply, key=jax.random.key(0)) if run.dropout else run.model.apply
    return ledger.ledger(apply, *_shapes(run))


def forward_flops(run: Parts) -> int:
    """Operations of one image's forward pass; a training step takes three times as many."""
    return ledger.flops(run.model.apply, *_shapes(run))


def rows(costs: Mapping[ledger.Path, ledger.Cost]) -> list[ledger.Line]:
    """The ledger in at most 24 lines, of which the last is the sum."""
    return [*ledger.lines(costs, 23), ledger.Line("network", 1, 0, ledger.total(costs))]


def printed(lines: Sequence[ledger.Line]) -> str:
    """A table of such lines, with a head."""
    counts = [f" (x{line.count})" if line.count > 1 and not line.depth else "" for line in lines]
    names = [f"{'  ' * line.depth}{line.name}{count}" for line, count in zip(lines, counts, strict=True)]
    width = max(map(len, ["module", *names]))
    table = [f"{'module':{width}} {'parameters':>14} {'GFLOPs/image':>13} {'kept MB/image':>14}"]
    for name, (*_, cost) in zip(names, lines, strict=True):
        table.append(f"{name:{width}} {cost.parameters:14,} {cost.flops / 1e9:13,.4f} {cost.kept / 1e6:14,.3f}")
    return "\n".join(table)


def _shapes(run: Parts) -> tuple:
    """Parameters and inputs of the network, as shapes."""
    return jax.eval_shape(partial(parts.init_params, run)), *jax.eval_shape(partial(parts.example, run))
