"""What the text of a compiled program says: its calls and fusions, and the bytes that they read and write."""

import math
import re
from collections import Counter
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

# Bytes of a number, by XLA's name of its type.
SIZES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def calls(text: str) -> dict[str, Any]:
    """Fusions, library calls and collectives in the text of a compiled program."""
    return {
        "fusions": len(re.findall(r" fusion\(", text)),
        "library_calls": dict(Counter(re.findall(r'custom_call_target="([^"]+)"', text)).most_common()),
        "collectives": {name: n for name in COLLECTIVES if (n := len(re.findall(rf" {name}(?:-start)?\(", text)))},
    }


class Operation(NamedTuple):
    """An operation in the text of a compiled program: how often it runs, and the bytes of its operands."""

    times: int
    name: str
    shape: str
    kind: str
    operands: list[int]
    rest: str  # of its line, after the kind
    computation: str  # that it is in


def operations(text: str, enter: Container[str] = ("while", "call")) -> Iterator[Operation]:
    """All operations from the entry on, and those of the computations that the kinds in `enter` call.

    Bodies of loops count as often as they run, every branch of a condition once.
    """
    found: dict[str, list[str]] = {}
    for row in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", row):
            rows = found.setdefault("ENTRY" if head.group(1) else head.group(2), [])
        elif row.startswith(" ") and found:
            rows.append(row)
    pattern = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")

    def inside(computation: str, times: int) -> Iterator[Operation]:
        parsed = [m.groups() for m in map(pattern.match, found.get(computation, [])) if m]
        shapes = {name: size(shape) for name, shape, *_ in parsed}
        for name, shape, kind, rest in parsed:
            operands = [shapes.get(n, 0) for n in re.findall(r"%([\w.\-]+)", rest.partition("), ")[0])]
            yield Operation(times, name, shape, kind, operands, rest, computation)
            if kind in enter:
                count = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
                names = re.findall(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", rest)
                for branches in re.findall(r"branch_computations=\{(.*?)\}", rest):
                    names += re.findall(r"[\w.\-]+", branches)
                for called in names:
                    yield from inside(called, times * int(count.group(1) if count else 1))

    yield from inside("ENTRY", 1)


def traffic(text: str) -> dict[str, int]:
    """What the kernels of a compiled program read and write in all: bytes of fusions and of library calls.

    Whole operands are counted, also where a fusion reads a part. Bodies of loops count as often as they run. Also the
    number of fusions that transpose.
    """
    total = {"fusion_bytes": 0, "library_bytes": 0, "transposing_fusions": 0}
    for op in operations(text):
        if op.kind in ("fusion", "custom-call"):
            moved = size(op.shape) + sum(op.operands)
            total["fusion_bytes" if op.kind == "fusion" else "library_bytes"] += op.times * moved
            total["transposing_fusions"] += op.kind == "fusion" and "transpose" in op.name
    return total


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Communication of a compiled program by kind: {"count", "bytes" of the whole arrays, "sent" by each device}.

    An array of S bytes in a group of n devices sends, in rings (Patarasuk & Yuan 2009, the least that there is)

        all-gather, reduce-scatter, all-to-all  S (n - 1) / n,    all-reduce  twice that,    permute  S          (1)

    TPUs begin, continue and end one in several fusions, with one channel, and have a reduce-scatter as a fusion of an
    all-reduce of the name all-reduce-scatter.
    """
    whole = re.search(r"num_partitions=(\d+)", text)
    found: dict[str, dict[str, int]] = {}
    channels: set[str] = set()
    for op in operations(text, ("while", "call", "conditional", "fusion", "async-start")):
        kind = op.kind.removesuffix("-start")
        channel = re.search(r"channel_id=(\d+)", op.rest)
        if kind not in COLLECTIVES or (channel and channel.group(1) in channels):
            continue
        channels.update(channel.groups() if channel else ())
        kind = "reduce-scatter" if op.computation.startswith("all-reduce-scatter") else kind
        n = _group_size(op.rest) or int(whole.group(1) if whole else 1)
        array = sum(op.operands) * (n if kind == "all-gather" else 1)
        sent = array if kind == "collective-permute" else array * (n - 1) // n
        row = found.setdefault(kind, {"count": 0, "bytes": 0, "sent": 0})
        row["count"] += op.times
        row["bytes"] += op.times * array
        row["sent"] += op.times * sent * (2 if kind == "all-reduce" else 1)
    return found


def _group_size(rest: str) -> int | None:
    """Devices in a group of a collective; None for all of them.

    It is written as replica_groups={{0,1},{2,3}}, as [2,2]<=[4], or by axes, mesh['a'=4,'b'=2] {'a','b':(1)2}, of
    which the last is a part of 'b' with two devices.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed.group(1).split(","))
    if by_axes := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", rest):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", by_axes.group(1)))
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", by_axes.group(2))
        return math.prod(int(part or axes[name]) for name, part in used)
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    return int(counted.group(1)) if counted else None


def size(shape: str) -> int:
    """Bytes of an array, or of a tuple of arrays, in XLA's notation: bf16[2,3]{1,0}."""
    arrays = re.findall(r"\b(" + "|".join(SIZES) + r")\[([\d,]*)\]", shape)
    return sum(SIZES[kind] * math.prod(int(n) for n in axes.split(",") if n) for kind, axes in arrays)
