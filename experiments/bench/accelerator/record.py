"""What a section has measured so far: a JSON file that is whole at any time, and a share of the time budget.

    {"rows": {name: {...}}, "errors": {name: traceback}, "left_out": [...], "planned": [...], ...}

A section is an ordered list of attempts. Each is written down as soon as it ends, so that a time limit loses only what
had not ended; one that fails is an error of its own, and the next begins; one for which too little time is left is
left out, and the file says so.
"""

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.io.files import atomic_write

OURS, PEER = "ours", "peer"  # the parts of a section
TAIL = 3000  # characters of a traceback that are kept


class Attempt(NamedTuple):
    """Something to measure, and about how long it takes on a device.

    Attributes:
      seconds: without compilation (seen on an H200).
      compiling: seconds of compilation, none of which is left once `programs` are compiled (`prepare`).
      programs: names of what it compiles; by default one of its own name.
    """

    seconds: float
    compiling: float
    measure: Callable[[], dict[str, Any]]
    programs: tuple[str, ...] = ()


class Record:
    """The file `folder`/sections/`section`.json and the time until which its section may run.

    Attributes:
      values: what the file holds.
      until: seconds since the epoch.
      tiny: sizes for a CPU; attempts then need no time at all.
      images: `--images`, or None for made ones.
      part: OURS or PEER.
      rehearsed: the only attempt to be made, its work done once and not measured (`prepare`); None for all attempts.
    """

    def __init__(
        self, folder: Path, section: str, until: float, *, tiny: bool = False, images: str | None = None,
        part: str = OURS, rehearsed: str | None = None,
    ):  # fmt: skip
        self.folder, self.section, self.until, self.tiny, self.images = Path(folder), section, until, tiny, images
        self.part, self.rehearsed = part, rehearsed
        self.values: dict[str, Any] = {"section": section, "tiny": tiny, "rows": {}, "errors": {}, "left_out": []}
        self.values |= read(folder, section)

    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.time()

    def run(self, attempts: dict[str, Attempt]) -> None:
        """Makes the attempts in their order, as far as the time goes."""
        self.values["planned"] = self.values.get("planned", []) + list(attempts)
        self.save()
        for name, attempt in attempts.items():
            if self.rehearsed not in (None, name):
                continue
            needed = self.needed(name, attempt)
            if self.left() <= needed:
                self.leave_out(name, f"about {needed:.0f} s needed, {max(self.left(), 0):.0f} s were left")
                continue
            begin = time.perf_counter()
            try:
                row = attempt.measure()
            except Exception:
                self.values["errors"][name] = traceback.format_exc()[-TAIL:]
            else:
                took = {"attempt_seconds": round(time.perf_counter() - begin, 2)}
                self.values["rows"][name] = row | took | {"compiled_before": self.compiled_before(name, attempt)}
            self.save()

    def compiled_before(self, name: str, attempt: Attempt) -> bool:
        """Whether all that an attempt compiles was compiled before (`prepare`)."""
        file = prepared_path(self.folder)
        done = json.loads(file.read_text())["seconds"] if file.exists() else {}
        return all(":".join([self.section, self.part, program]) in done for program in attempt.programs or (name,))

    def needed(self, name: str, attempt: Attempt) -> float:
        """About how many seconds an attempt takes here; none if tiny."""
        if self.tiny:
            return 0.0
        return attempt.seconds + (0.0 if self.compiled_before(name, attempt) else attempt.compiling)

    def leave_out(self, name: str, why: str) -> None:
        """Says that something was not measured."""
        self.values["left_out"].append(f"{name}: {why}")
        self.save()

    def save(self) -> None:
        """Writes the file."""
        write_json(path(self.folder, self.section), self.values)


def path(folder: Path, section: str) -> Path:
    """Where a section's results are."""
    return Path(folder) / "sections" / f"{section}.json"


def prepared_path(folder: Path) -> Path:
    """Where it is written which programs were compiled before; see `prepare`."""
    return Path(folder) / "sections" / "prepared.json"


def read(folder: Path, section: str) -> dict[str, Any]:
    """What a section has written, {} before it has."""
    file = path(folder, section)
    return json.loads(file.read_text()) if file.exists() else {}


def write_json(file: Path, values: Any) -> None:
    """Writes a JSON file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, lambda f: f.write((json.dumps(values, indent=1) + "\n").encode()))
