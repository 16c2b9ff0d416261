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


class Row(NamedTuple):
    """An instruction: its name, its result in XLA's notation, the operation, its operands, the line after them."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    rest: str

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return size(self.shape)


Rows = dict[str, Row]  # the instructions of a computation, by name; that of its result is ROOT


class Operation(NamedTuple):
    """An instruction, how often it runs, and the name of the computation that it is in."""

    times: int
    row: Row
    computation: str


def computations(text: str) -> dict[str, Rows]:
    """The instructions of each computation; that of the whole program is ENTRY."""
    found: dict[str, Rows] = {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            rows = found.setdefault("ENTRY" if head.group(1) else head.group(2), {})
        elif line.startswith(" ") and found:
            parsed = re.match(r"\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
            if parsed:
                root, name, shape, operation, rest = parsed.groups()
                operands = tuple(re.findall(r"%([\w.\-]+)", rest.partition("), ")[0]))
                rows["ROOT" if root else name] = Row(name, shape, operation, operands, rest)
    return found


def operations(found: dict[str, Rows], enter: Container[str] = ("while", "call")) -> Iterator[Operation]:
    """All instructions from the entry on, and those of the computations that the operations in `enter` call.

    Bodies of loops count as often as they run, every branch of a condition once.
    """

    def inside(computation: str, times: int) -> Iterator[Operation]:
        for row in found.get(computation, {}).values():
            yield Operation(times, row, computation)
            if row.operation in enter:
                count = re.search(r'"known_trip_count":\{"n":"(\d+)"', row.rest)
                names = re.findall(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", row.rest)
                for branches in re.findall(r"branch_computations=\{(.*?)\}", row.rest):
                    names += re.findall(r"[\w.\-]+", branches)
                for called in names:
                    yield from inside(called, times * int(count.group(1) if count else 1))

    yield from inside("ENTRY", 1)


def traffic(text: str) -> dict[str, int]:
    """What the kernels of a compiled program read and write in all: bytes of fusions and of library calls.

    Of an operand that a fusion only slices, the slices are counted, and of a result into which it writes a slice in
    place, that slice: a loop over layers does so with arrays of all layers. Other operands are counted whole. Bodies of
    loops count as often as they run. A library call within a fusion is one of the library. Also the number of fusions
    that transpose.
    """
    found = computations(text)
    total = {"fusion_bytes": 0, "library_bytes": 0, "transposing_fusions": 0}
    for times, row, computation in operations(found):
        if row.operation == "fusion":
            called = re.search(r"calls=%?([\w.\-]+)", row.rest)
            inside = found.get(called.group(1), {}) if called else {}
            library = any(each.operation == "custom-call" for each in inside.values())
            moved = times * _moved(row, found[computation], inside)
            total["library_bytes" if library else "fusion_bytes"] += moved
            total["transposing_fusions"] += "transpose" in row.name
        elif row.operation == "custom-call":
            total["library_bytes"] += times * _moved(row, found[computation], {})
    return total


def _moved(call: Row, rows: Rows, inside: Rows) -> int:
    """Bytes that a fusion or library call reads and writes; `inside` are the instructions of the fusion."""
    sizes = {row.name: row.size for row in rows.values()}
    by_name = {row.name: row for row in inside.values()}
    users: dict[str, list[Row]] = {}
    for row in inside.values():
        for operand in row.operands:
            users.setdefault(operand, []).append(row)

    def read(row: Row) -> float:
        """Bytes of the slices that are taken of a row; infinite if it is used in another way."""
        parts = 0.0
        for user in users.get(row.name, []):
            if user.operation == "dynamic-slice" and user.operands[0] == row.name:
                parts += user.size
            elif user.operation == "bitcast":
                parts += read(user)
            elif user.operation != "dynamic-update-slice" or user.operands[0] != row.name:
                return math.inf
        return parts

    def written(row: Row) -> int:
        if row.operation == "dynamic-update-slice":
            return by_name[row.operands[1]].size
        if row.operation in ("bitcast", "tuple"):
            return sum(written(by_name[operand]) for operand in row.operands)
        return row.size

    numbers = {int(row.rest.split(")")[0]): row for row in inside.values() if row.operation == "parameter"}
    root = inside.get("ROOT")
    parts = root is not None and root.operation in ("dynamic-update-slice", "bitcast", "tuple")
    total = written(root) if parts else call.size
    for i, operand in enumerate(call.operands):
        whole = sizes.get(operand, 0)
        total += int(min(read(numbers[i]), whole)) if i in numbers else whole
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
    inner = ("while", "call", "conditional", "fusion", "async-start")
    computed = computations(text)
    for times, op, computation in operations(computed, inner):
        kind = op.operation.removesuffix("-start")
        channel = re.search(r"channel_id=(\d+)", op.rest)
        if kind not in COLLECTIVES or (channel and channel.group(1) in channels):
            continue
        channels.update(channel.groups() if channel else ())
        kind = "reduce-scatter" if computation.startswith("all-reduce-scatter") else kind
        sizes = {row.name: row.size for row in computed[computation].values()}
        n = _group_size(op.rest) or int(whole.group(1) if whole else 1)
        array = sum(sizes.get(name, 0) for name in op.operands) * (n if kind == "all-gather" else 1)
        sent = array if kind == "collective-permute" else array * (n - 1) // n
        row = found.setdefault(kind, {"count": 0, "bytes": 0, "sent": 0})
        row["count"] += times
        row["bytes"] += times * array
        row["sent"] += times * sent * (2 if kind == "all-reduce" else 1)
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
