"""Compiles the programs of a run, several at a time, before any of them is measured.

A program takes one core half a minute to compile and some seconds to measure, and it is measured with nothing else on
the machine. So all are compiled first, each in a process of its own that ends with its program in the cache of JAX on
disk; PyTorch's networks are compiled by a call that is not measured. The section's process then finds them there.

XLA chooses between kernels by timing them. Beside other processes those timings are less exact than alone, so that a
program may come out slower, by some per cent, than one that is compiled alone.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.bench.accelerator.record import ALL, Record, path, prepared_path, write_json

OURS, PEER = "ours", "peer"
AT_ONCE = 12  # processes, where there are cores for them: each of them takes a GiB of the device
SHARE = 0.4  # of the budget, at most
# Sections by how long one of their programs takes; those not named here are compiled in a second.
LONGEST_FIRST = (("unet", PEER), ("jit_train", PEER), ("unet", OURS), ("jit_sample", PEER), ("numbers", OURS))
LONGEST_FIRST += (("jit_train", OURS), ("digits", OURS), ("jit_sample", OURS), ("training", OURS))


class Piece(NamedTuple):
    """A program of a section, or an attempt of its peer."""

    section: str
    part: str
    name: str


def pieces(sections: Sequence[str]) -> list[Piece]:
    """What the sections at their full size compile, the longest first."""
    from experiments.bench.accelerator.peers import FIRST
    from experiments.bench.accelerator.sections import PROGRAMS

    names = {OURS: lambda section: PROGRAMS[section](False), PEER: lambda section: FIRST[section](False)}
    return [Piece(s, part, n) for s, part in LONGEST_FIRST if s in sections for n in names[part](s)]


def prepare(
    folder: Path, wanted: Sequence[Piece], until: float, start: Callable[[Piece], subprocess.Popen], *,
    at_once: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Compiles pieces, and writes down which were done, for `Record.needed`; prints a line for each.

    Args:
      until: when those that are not done are ended, in seconds since the epoch.
      start: begins a process that compiles a piece.

    Returns:
      The seconds that each took, by its section, part and name.
    """
    at_once = max(1, min((os.cpu_count() or 1) - 2, AT_ONCE)) if at_once is None else at_once
    waiting, running, seconds, failed = list(wanted), {}, {}, []
    try:
        while waiting or running:
            if time.time() >= until:
                break
            while waiting and len(running) < at_once:
                piece = waiting.pop(0)
                running[piece] = (start(piece), time.time())
            time.sleep(0.1)
            for piece, (process, begin) in list(running.items()):
                if process.poll() is not None:
                    del running[piece]
                    if process.returncode == 0:
                        seconds[":".join(piece)] = round(time.time() - begin, 1)
                    else:
                        failed.append(piece)
                    said = "compiled in" if process.returncode == 0 else "not compiled, failed after"
                    print(f"{', '.join(piece)}: {said} {time.time() - begin:.0f} s", flush=True)
    finally:
        for process, _ in running.values():
            end_group(process)
    if late := [*running, *waiting]:
        print(f"not compiled before, for lack of time: {', '.join(f'{p.section}, {p.name}' for p in late)}", flush=True)
    missed = {(p.section, p.part) for p in (*late, *failed)}
    done: dict[str, list[str]] = {}
    for piece in wanted:
        if ":".join(piece) in seconds:
            done.setdefault(f"{piece.section}:{piece.part}", []).append(piece.name)
    for section, part in {(p.section, p.part) for p in wanted} - missed:
        if part == OURS:
            done[f"{section}:{part}"].append(ALL)
    write_json(prepared_path(folder), {"at_once": at_once, "seconds": seconds, "done": done})
    return seconds


def end_group(process: subprocess.Popen) -> None:
    """Ends a process and those it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def here(piece: Piece, folder: Path, images: str | None) -> None:
    """What the process of a piece does.

    Raises:
      SystemExit: it could not be compiled.
    """
    if piece.part == OURS:
        from experiments.bench.accelerator.sections import programs_of

        record = Record(folder, piece.section, time.time() + 1e6, images=images)
        programs_of(record)[piece.name]().compile()
        return
    from experiments.bench.accelerator.peers import PEERS

    # A folder of its own: what this run writes down is no measurement.
    scratch = folder / "rehearsals" / f"{piece.section}_{piece.name.replace(' ', '_').replace(',', '')}"
    machine = path(folder, "machine")
    if machine.exists():
        copy = path(scratch, "machine")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(machine.read_bytes())
    record = Record(scratch, piece.section, time.time() + 1e6, rehearsed=piece.name)
    PEERS[piece.section](record)
    if piece.name not in record.values["rows"]:
        sys.exit(f"{record.values['errors'] or record.values['left_out']}")
