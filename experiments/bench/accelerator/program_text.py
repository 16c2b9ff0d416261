"""What the text of a compiled program says: its calls and fusions, and the bytes that they read and write."""

import math
import re
from collections import Counter
from typing import Any

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


def traffic(text: str) -> dict[str, int]:
    """What the kernels of a compiled program read and write in all: bytes of fusions and of library calls.

    Whole operands are counted, also where a fusion reads a part. Bodies of loops count as often as they run. Also the
    number of fusions that transpose.
    """
    found: dict[str, list[str]] = {}
    for row in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", row):
            rows = found.setdefault("ENTRY" if head.group(1) else head.group(2), [])
        elif row.startswith(" ") and found:
            rows.append(row)
    total = {"fusion_bytes": 0, "library_bytes": 0, "transposing_fusions": 0}

    def add(computation: str, times: int) -> None:
        pattern = r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)"
        parsed = [m.groups() for m in map(re.compile(pattern).match, found.get(computation, [])) if m]
        shapes = {name: size(shape) for name, shape, *_ in parsed}
        for name, _, operation, rest in parsed:
            if operation in ("fusion", "custom-call"):
                operands = re.findall(r"%([\w.\-]+)", rest.partition("), ")[0])
                moved = shapes[name] + sum(shapes.get(operand, 0) for operand in operands)
                total["fusion_bytes" if operation == "fusion" else "library_bytes"] += times * moved
                total["transposing_fusions"] += operation == "fusion" and "transpose" in name
            elif operation == "while":
                count = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
                add(re.search(r"body=%?([\w.\-]+)", rest).group(1), times * int(count.group(1) if count else 1))
            elif called := re.search(r"(?:to_apply|calls)=%?([\w.\-]+)", rest) if operation == "call" else None:
                add(called.group(1), times)

    add("ENTRY", 1)
    return total


def size(shape: str) -> int:
    """Bytes of an array, or of a tuple of arrays, in XLA's notation: bf16[2,3]{1,0}."""
    arrays = re.findall(r"\b(" + "|".join(SIZES) + r")\[([\d,]*)\]", shape)
    return sum(SIZES[kind] * math.prod(int(n) for n in axes.split(",") if n) for kind, axes in arrays)
