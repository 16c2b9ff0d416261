"""Fair timing: contenders take turns, so that a slow minute of the machine hits all of them alike.

    time_i = median_r time_ir,        speed_i over j = median_r time_jr / time_ir                   (1)

over the rounds r, of the time for one unit of work. Every result can also be written as JSON.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags


def define_flags(argv: list[str]) -> None:
    """Defines --json, --rounds, --steps and --sample_steps, for `session.run`.

    Not on import, since other commands have flags of these names, and a test imports them all.
    """
    del argv
    flags.DEFINE_string("json", None, "Also write the result, every single timing included, to this file.")
    flags.DEFINE_integer("rounds", 7, "Each contender is timed this many times, in turns.", lower_bound=1)
    flags.DEFINE_integer("steps", 5, "Training steps per timing.", lower_bound=1)
    flags.DEFINE_integer("sample_steps", 10, "Sampler steps per timing; all of them cost alike.", lower_bound=1)


def interleave(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call [rounds] of each contender, after one that does not count because it may compile.

    A contender returns only when its work is done. Every other round runs backwards, so that nobody always follows
    the same neighbour.
    """
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        for name in list(contenders)[:: -1 if i % 2 else 1]:
            begin = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def summary(seconds: dict[str, list[float]], work: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Per contender, that did `work` units a call: median time and units per second, and its speed over the others."""
    times = {name: [s / work[name] for s in each] for name, each in seconds.items()}
    return {
        name: {
            "seconds": statistics.median(own),
            "per_second": 1 / statistics.median(own),
            "speed_over": {
                other: statistics.median(b / a for a, b in zip(own, theirs, strict=True))
                for other, theirs in times.items()
                if other != name
            },
            "work": work[name],
            "timings": seconds[name],
        }
        for name, own in times.items()
    }


def over(row: dict[str, Any], other: str) -> str:
    """Speed of a row of `summary` over another one, in print."""
    return f"{row['speed_over'][other]:.2f} x" if other in row["speed_over"] else "1"


def table(title: str, heads: list[str], rows: list[list[str]]) -> str:
    """Columns of text; all but the first are aligned to the right."""
    cells = [[title, *heads], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads) + 1)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def machine() -> dict[str, Any]:
    """Where a number was measured."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": cores(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def cores() -> int:
    """CPU cores that this process may use: what XLA takes, and what a peer is told to take."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_json(path: str | None) -> None:
    """Raises OSError unless the result can be written, before anything is measured."""
    if path is not None:
        with Path(path).open("a"):
            pass


def write_json(path: str | None, result: dict[str, Any]) -> None:
    """Writes the result if a file was asked for."""
    if path is not None:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
