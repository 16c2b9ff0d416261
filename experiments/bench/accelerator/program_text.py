"""What the text of a compiled program says: its calls and fusions, and the bytes that they read and write."""

import math
import re
from collections import Counter
from typing import Any, NamedTuple

# Bytes of a number, by XLA's name of its type.
SIZES = {"pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def calls(text: str) -> dict[str, Any]:
    """Fusions, library calls and collectives in the text of a compiled program."""
    return {
        "fusions": len(re.findall(r" fusion\(", text)),
        "library_calls": dict(Counter(re.findall(r'custom_call_target="([^"]+)"', text)).most_common()),
        "collectives": {name: n for name in COLLECTIVES if (n := len(re.findall(rf" {name}(?:-start)?\(", text)))},
    }


class Row(NamedTuple):
    """An instruction: its name, the bytes of its result, the operation, the names of its operands, and its text."""

    name: str
    size: int
    operation: str
    operands: tuple[str, ...]
    rest: str


def traffic(text: str) -> dict[str, int]:
    """What the kernels of a compiled program read and write in all: bytes of fusions and of library calls.

    Of an operand that a fusion only slices, the slices are counted, and of a result into which it writes a slice in
    place, that slice: a loop over layers does so with arrays of all layers. Other operands are counted whole. Bodies of
    loops count as often as they run. A library call within a fusion is one of the library. Also the number of fusions
    that transpose.
    """
    found = computations(text)
    total = {"fusion_bytes": 0, "library_bytes": 0, "transposing_fusions": 0}

    def add(computation: str, times: int) -> None:
        rows = found.get(computation, {})
        for row in rows.values():
            called = re.search(r"(?:to_apply|calls|body)=%?([\w.\-]+)", row.rest)
            inside = found.get(called.group(1), {}) if called else {}
            if row.operation == "fusion":
                library = any(each.operation == "custom-call" for each in inside.values())
                total["library_bytes" if library else "fusion_bytes"] += times * _moved(row, rows, inside)
                total["transposing_fusions"] += "transpose" in row.name
            elif row.operation == "custom-call":
                total["library_bytes"] += times * _moved(row, rows, {})
            elif row.operation == "while":
                count = re.search(r'"known_trip_count":\{"n":"(\d+)"', row.rest)
                add(called.group(1), times * int(count.group(1) if count else 1))
            elif row.operation == "call" and called:
                add(called.group(1), times)

    add("ENTRY", 1)
    return total


def computations(text: str) -> dict[str, dict[str, Row]]:
    """The instructions of each computation, by name; that of the whole program is ENTRY."""
    found: dict[str, dict[str, Row]] = {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            rows = found.setdefault("ENTRY" if head.group(1) else head.group(2), {})
        elif line.startswith(" ") and found:
            parsed = re.match(r"\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
            if parsed:
                root, name, shape, operation, rest = parsed.groups()
                operands = tuple(re.findall(r"%([\w.\-]+)", rest.partition("), ")[0]))
                rows["ROOT" if root else name] = Row(name, size(shape), operation, operands, rest)
    return found


def _moved(call: Row, rows: dict[str, Row], inside: dict[str, Row]) -> int:
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


def size(shape: str) -> int:
    """Bytes of an array, or of a tuple of arrays, in XLA's notation: bf16[2,3]{1,0}."""
    arrays = re.findall(r"\b(" + "|".join(SIZES) + r")\[([\d,]*)\]", shape)
    return sum(SIZES[kind] * math.prod(int(n) for n in axes.split(",") if n) for kind, axes in arrays)
