"""Interleaved timing: programs take turns, so that a slow minute of the machine affects all of them alike.

    time_i = median_r time_ir,        speed_i over j = median_r time_jr / time_ir                   (1)

over the rounds r, of the time for one unit of work.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

Program = Callable[[], Any]  # returns only when its work is done


def compare(
    programs: dict[str, Program], work: float | dict[str, float], rounds: int, calls: int = 1
) -> dict[str, Any]:
    """`summary` of programs timed in turns; a timing is of `calls` calls, each of which does `work` units."""
    if not isinstance(work, dict):
        work = dict.fromkeys(programs, work)
    timed = programs if calls == 1 else {name: _repeated(program, calls) for name, program in programs.items()}
    return summary(interleave(timed, rounds), {name: calls * work[name] for name in programs})


def interleave(programs: dict[str, Program], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call [rounds] of each program, after one that does not count because it may compile.

    Every other round runs backwards, so that no program always follows the same other one.
    """
    for program in programs.values():
        program()
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(rounds):
        for name in list(programs)[:: -1 if i % 2 else 1]:
            begin = time.perf_counter()
            programs[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def summary(seconds: dict[str, list[float]], work: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Per program, that did `work` units a call: median time and units per second, and its speed over the others."""
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
    """CPU cores that this process may use: what XLA takes, and what another framework is told to take."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _repeated(program: Program, calls: int) -> Program:
    def run() -> None:
        for _ in range(calls):
            program()

    return run
