"""The results of benchmarks as text: tables, targets, and where the numbers were measured."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(title: str, heads: list[str], rows: list[list[str]]) -> str:
    """Columns of text; all but the first are aligned to the right."""
    cells = [[title, *heads], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads) + 1)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def targets(rows: Iterable[tuple[str, float, str, float]]) -> str:
    """A table of targets: (what, measured, "at most" or "at least", target)."""
    held = {"at most": lambda got, goal: got <= goal, "at least": lambda got, goal: got >= goal}
    cells = [
        [what, f"{got:.2f}", f"{side} {goal:.2f}", "yes" if held[side](got, goal) else "NO"]
        for what, got, side, goal in rows
    ]
    return table("target", ["measured", "", "reached"], cells)


def over(row: dict[str, Any], other: str) -> str:
    """Speed of a row of `timing.summary` over another one."""
    return f"{row['speed_over'][other]:.2f} x" if other in row["speed_over"] else "1"


def where(machine: dict[str, Any], versions: Sequence[str] = ("jax",)) -> str:
    """Device, cores, and versions of what `machine` holds: "cpu, 2 cores, jax 0.10.2"."""
    found = [f"{name} {machine[name]}" for name in versions if name in machine]
    return ", ".join([machine["device"], f"{machine['cores']} cores", *found])
