"""Compiles the programs of a run, several at a time, before any of them is measured.

A program takes one core half a minute to compile and some seconds to measure, and it is measured with nothing else on
the machine. So those that are long to compile are compiled first, each in a process of its own that ends with its
program in the cache of JAX on disk; PyTorch's networks are compiled by a call that is not measured. The section's
process then finds them there. The cache is in the folder of the results, for this command alone: XLA and PyTorch choose
between kernels by timing them, and beside other processes those timings are less exact than alone.
"""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench.accelerator.record import OURS, PEER, Record, path, prepared_path, write_json

AT_ONCE = 12  # processes, where there are as many cores and two more
PEERS_AT_ONCE = 2  # those of PyTorch compute, in up to 30 GiB of the device each
FEWEST = 4  # cores for processes: with fewer, compiling all programs would take the budget
SHARE = 0.4  # of the budget, at most
# The longest programs first; sections that are not named are compiled in a second.
ORDER = (("unet", PEER), ("jit_train", PEER), ("unet", OURS), ("numbers", OURS), ("jit_train", OURS))
ORDER += (("digits", OURS), ("jit_sample", PEER), ("jit_sample", OURS), ("training", OURS))


class Piece(NamedTuple):
    """A program of a section, or an attempt of its peer."""

    section: str
    part: str
    name: str


def pieces(sections: Sequence[str]) -> list[Piece]:
    """What these sections compile at their full size, the longest first; nothing of PyTorch where it is missing."""
    from experiments.bench.accelerator.peers import FIRST
    from experiments.bench.accelerator.sections import PROGRAMS

    torch = importlib.util.find_spec("torch") is not None
    names = {OURS: lambda section: PROGRAMS[section](False), PEER: lambda section: FIRST[section] if torch else ()}
    return [Piece(s, part, n) for s, part in ORDER if s in sections for n in names[part](s)]


def room() -> int:
    """How many programs to compile at a time on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(cores - 2, AT_ONCE))


def prepare(
    folder: Path, wanted: Sequence[Piece], until: float, start: Callable[[Piece], subprocess.Popen], *, at_once: int
) -> dict[str, Any]:
    """Compiles pieces, prints a line for each, and writes sections/prepared.json, which `Record.needed` reads.

    Args:
      until: when those that are not done are ended, in seconds since the epoch.
      start: begins a process that compiles a piece.
      at_once: processes at a time, of which `PEERS_AT_ONCE` may be PyTorch's.

    Returns:
      What was written: "seconds" that each took, by section:part:name, those that "failed" and those "not_reached".
    """
    waiting, running, seconds, failed = list(wanted), {}, {}, []
    begun = time.time()
    try:
        while (waiting or running) and time.time() < until:
            for piece in list(waiting):
                peers = sum(p.part == PEER for p in running)
                if len(running) < at_once and (piece.part == OURS or peers < PEERS_AT_ONCE):
                    waiting.remove(piece)
                    running[piece] = (start(piece), time.time())
            time.sleep(0.1)
            for piece, (process, begin) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[piece]
                end_group(process)  # also what it has started
                took = time.time() - begin
                if process.returncode == 0:
                    seconds[":".join(piece)] = round(took, 1)
                    print(f"{', '.join(piece)}: compiled in {took:.0f} s", flush=True)
                else:
                    failed.append(":".join(piece))
                    print(f"{', '.join(piece)}: failed after {took:.0f} s, see {log(folder, piece)}", flush=True)
    finally:
        for process, _ in running.values():
            end_group(process)
    late = [":".join(piece) for piece in (*running, *waiting)]
    if late:
        print(f"not compiled before, for lack of time: {', '.join(late)}", flush=True)
    total = {"took": round(time.time() - begun, 1), "at_once": at_once}
    result = total | {"seconds": seconds, "failed": failed, "not_reached": late}
    write_json(prepared_path(folder), result)
    return result


def log(folder: Path, piece: Piece) -> Path:
    """Where the output of a piece's process goes."""
    name = "".join(c if c.isalnum() else "_" for c in "_".join(piece))
    return Path(folder) / "sections" / f"prepare_{name}.log"


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

    with tempfile.TemporaryDirectory() as scratch:  # what is written down here is no measurement
        if path(folder, "machine").exists():
            copy = path(Path(scratch), "machine")
            copy.parent.mkdir()
            copy.write_bytes(path(folder, "machine").read_bytes())
        record = Record(Path(scratch), piece.section, time.time() + 1e6, part=PEER, rehearsed=piece.name)
        PEERS[piece.section](record)
        if piece.name not in record.values["rows"]:
            sys.exit(f"{record.values['errors'] or record.values['left_out'] or record.values['planned']}")
