"""What the network of a run costs, by module: the ledger of its parts, and that as a table."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from diffusion import ledger
from diffusion.ledger import Cost, Path, added, total
from experiments import parts
from experiments.parts import Parts


class Line(NamedTuple):
    """A line of a table: modules of one kind and cost together, or a part of those of the line above."""

    name: str
    count: int  # of modules
    depth: int  # 0, or 1 for a part
    cost: Cost  # of all of them


def of_network(run: Parts) -> dict[Path, Cost]:
    """Parameters, operations and bytes kept by the modules of a run's network, per image; with dropout, if it has any.

    Nothing is computed.
    """
    apply = partial(run.model.apply, key=jax.random.key(0)) if run.dropout else run.model.apply
    return ledger.ledger(apply, *_shapes(run))


def forward_flops(run: Parts) -> int:
    """Operations of one image's forward pass; a training step takes three times as many."""
    return ledger.flops(run.model.apply, *_shapes(run))


def rows(costs: Mapping[Path, Cost]) -> list[Line]:
    """The ledger in at most 24 lines, of which the last is the sum."""
    return [*lines(costs, 23), Line("network", 1, 0, total(costs))]


def lines(costs: Mapping[Path, Cost], most: int = 24) -> list[Line]:
    """A table of at most `most` lines: the outermost modules, and the parts of the costliest ones as space permits.

    Modules whose names differ by numbers alone and which cost the same share a line, "block_0-3". Where that is not
    enough, those which cost differently do too, and then all others are the line "rest".
    """
    inside = _without_root(costs)
    modules: dict[str, dict[Path, Cost]] = defaultdict(dict)
    for path, cost in inside.items():
        modules[path[0] if path else ""][path[1:]] = cost
    groups = _groups(modules, lambda name: (_stem(name), total(modules[name])[:2]))
    if len(groups) > most:
        groups = _groups(modules, _stem)
    if len(groups) > most:
        by_flops = sorted(groups, key=lambda group: total(_merged(modules, group)).flops, reverse=True)
        shown = by_flops[: most - 1]
        groups = [g for g in groups if g in shown] + [[n for g in groups if g not in shown for n in g]]
    found = [(group, _parts(_merged(modules, group))) for group in groups]
    # The costliest modules show their parts first.
    left, expanded = most - len(groups), set()
    for i in sorted(range(len(found)), key=lambda i: -total(found[i][1]).flops):
        if 1 < len(found[i][1]) <= left:
            left, expanded = left - len(found[i][1]), expanded | {i}
    rows = []
    for i, (group, inner) in enumerate(found):
        rows.append(Line(_joined(group), len(group), 0, total(inner)))
        if i in expanded:
            rows += [Line("".join(name) or "itself", len(group), 1, cost) for name, cost in inner.items()]
    return rows


def printed(rows: Sequence[Line]) -> str:
    """A table of such lines, with a head."""
    counts = [f" (x{line.count})" if line.count > 1 and not line.depth else "" for line in rows]
    names = [f"{'  ' * line.depth}{line.name}{count}" for line, count in zip(rows, counts, strict=True)]
    width = max(map(len, ["module", *names]))
    table = [f"{'module':{width}} {'parameters':>14} {'GFLOPs/image':>13} {'kept MB/image':>14}"]
    for name, (*_, cost) in zip(names, rows, strict=True):
        table.append(f"{name:{width}} {cost.parameters:14,} {cost.flops / 1e9:13,.4f} {cost.kept / 1e6:14,.3f}")
    return "\n".join(table)


def _shapes(run: Parts) -> tuple:
    """Parameters and inputs of the network, as shapes."""
    return jax.eval_shape(partial(parts.init_params, run)), *jax.eval_shape(partial(parts.example, run))


def _without_root(costs: Mapping[Path, Cost]) -> dict[Path, Cost]:
    """The same costs, in modules named without what all of them have in common: the network's own name."""
    paths = list(costs)
    same = 0
    while paths and all(len(path) > same for path in paths) and len({path[same] for path in paths}) == 1:
        same += 1
    return {path[same:]: cost for path, cost in costs.items()}


def _groups(modules: Mapping[str, Any], kind: Callable[[str], Any]) -> list[list[str]]:
    """Names of modules of one kind together, in the order of their first ones."""
    found: dict[Any, list[str]] = defaultdict(list)
    for name in modules:
        found[kind(name)].append(name)
    return list(found.values())


def _named(module: Mapping[Path, Cost]) -> dict[Path, Cost]:
    """The costs in a module, whose methods are called "block_3._attend": without the module's own name."""
    found: dict[Path, Cost] = {}
    for path, cost in module.items():
        names = tuple(name.rpartition(".")[2].lstrip("_") for name in path)
        found[names] = added(found.get(names, Cost()), cost)
    return found


def _merged(modules: Mapping[str, Mapping[Path, Cost]], names: list[str]) -> dict[Path, Cost]:
    """The costs in several modules together."""
    found: dict[Path, Cost] = {}
    for name in names:
        for path, cost in _named(modules[name]).items():
            found[path] = added(found.get(path, Cost()), cost)
    return found


def _parts(module: Mapping[Path, Cost]) -> dict[Path, Cost]:
    """The costs of a module's own modules, and under () what it does itself."""
    found: dict[Path, Cost] = {}
    for path, cost in module.items():
        found[path[:1]] = added(found.get(path[:1], Cost()), cost)
    return found


def _stem(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _joined(names: list[str]) -> str:
    """One name for modules whose names differ by numbers: "block_0-3", "input_1,4_down"."""
    if len(names) == 1:
        return names[0] or "itself"
    if len({_stem(name) for name in names}) > 1:
        return "rest"
    numbers = [tuple(map(int, re.findall(r"\d+", name))) for name in names]
    different = [i for i, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
    pieces = re.split(r"\d+", names[0])
    shown = [_ranges([n[i] for n in numbers]) if i in different else str(numbers[0][i]) for i in range(len(pieces) - 1)]
    return "".join(piece + number for piece, number in zip(pieces, [*shown, ""], strict=True))


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and runs[-1][-1] == n - 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return ",".join("-".join(map(str, run)) for run in runs)
