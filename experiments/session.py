"""What surrounds a long job: flags, compilation cache, memory, stop signals, a log, a progress bar."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

from diffusion.io import files
from diffusion.cpu.memory import keep_memory

# Defined once for all commands, so that a notebook or a test can import several of them.
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Work directory of a training run; experiments.train's default: runs/ and the config's name. To draw with experts, "
    "those of all, separated by commas.",
)


class Stopped(Exception):
    """A signal ended the job after everything was saved."""


class Stop:
    """Whether a signal asked for the end."""

    asked = False


def start() -> None:
    """Keeps compiled programs between processes, and memory between steps (`keep_memory`).

    Programs are kept in $JAX_COMPILATION_CACHE_DIR, or in the user's cache folder.
    """
    keep_memory()
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "patch-diffusion" / "xla"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def workdir(default: str | Path | None = None) -> Path:
    """--workdir, or `default`.

    Raises:
      ValueError: neither is given.
    """
    if not (_WORKDIR.value or default):
        raise ValueError("--workdir is missing: pass the directory that experiments.train wrote, --workdir=runs/mnist")
    return Path(_WORKDIR.value or default)


def workdirs() -> list[Path]:
    """--workdir, which may list several, the runs of SNR experts, separated by commas.

    Raises:
      ValueError: it is not given, or empty somewhere.
    """
    folders = [str(workdir())] if workdir().exists() else str(workdir()).split(",")
    if not all(folders):
        raise ValueError(f"--workdir={_WORKDIR.value} names an empty directory between its commas")
    return [Path(folder) for folder in folders]


def claim(parent: Path, result: str, outdir: str | None, overwrite: bool) -> Path:
    """The folder to write results to, `outdir` or a new numbered one in `parent`, proven writable before any work.

    Raises:
      ValueError: it holds a file `result` already, and `overwrite` is off.
    """
    if outdir is None:
        taken = [int(p.name) for p in parent.glob("*") if p.name.isdigit()]
        folder = parent / f"{max(taken, default=0) + 1:03d}"
    else:
        folder = Path(outdir)
        if (folder / result).exists() and not overwrite:
            raise ValueError(f"{folder} holds {result} already; pass --overwrite or another --outdir")
    files.check_writable(folder)
    return folder


def run(main: Callable[[list[str]], Any], define: Callable[[list[str]], Any] | None = None) -> None:
    """absl's app.run, with errors meant for the user as one message on stderr instead of a traceback.

    `define` adds flags that depend on the command line. Exit status: 1 for such an error, 130 when a signal stopped
    the job and it can be continued.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            if define:
                define(argv)
            return flags.FLAGS(argv)
        except (flags.Error, ValueError, OSError) as e:
            sys.exit(_complain(e, 1))

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # JAX tells at INFO which accelerators it did not find
        try:
            main(argv)
        except Stopped as e:
            sys.exit(_complain(e, 130))
        except KeyboardInterrupt:
            sys.exit(_complain("Interrupted; what was saved before is whole.", 130))
        except (ValueError, TypeError, OSError, FloatingPointError) as e:
            if os.environ.get("PATCH_DIFFUSION_TRACEBACK"):
                raise
            sys.exit(_complain(e, 1))

    app.run(guarded, flags_parser=parse)


def _complain(error: Exception | str, status: int) -> int:
    print(f"\n{'' if status == 130 else 'error: '}{error}", file=sys.stderr)
    return status


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turns the first SIGINT or SIGTERM into `asked`, so that the job can save; the second one acts as usual."""
    stop = Stop()
    previous = {}

    def ask(number: int, frame: Any) -> None:
        del frame
        stop.asked = True
        print(
            f"\n{signal.Signals(number).name}: finishing this step and saving (again to quit at once)", file=sys.stderr
        )
        for each, handler in previous.items():
            signal.signal(each, handler)

    try:
        for each in (signal.SIGINT, signal.SIGTERM):
            previous[each] = signal.signal(each, ask)
    except ValueError:  # not in the main thread, as in a notebook's worker: signals stay as they are
        pass
    try:
        yield stop
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


class Log:
    """Numbers in metrics.jsonl, a row per step, and in TensorBoard if asked for."""

    def __init__(self, workdir: Path, tensorboard: bool = False) -> None:
        self.path = workdir / "metrics.jsonl"
        self._events = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard needs tensorboardX: pip install -e '.[tensorboard]'") from None
            self._events = SummaryWriter(str(workdir / "tensorboard"))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._events:
            self._events.close()

    def rows(self) -> list[dict[str, float]]:
        """What was logged so far; a last line cut short by a crash is left out."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def rewind(self, step: int) -> None:
        """Forgets what was logged after `step`: those steps will be run again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Appends a row."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture [H, W] or [H, W, C] for TensorBoard; without it, nothing (pictures are files anyway)."""
        if self._events:
            self._events.add_image(name, image, step, dataformats="HW" if image.ndim == 2 else "HWC")


class Bar:
    """A progress bar with time left; where there is no terminal, as in a log file, a plain line every 20 seconds."""

    def __init__(self, total: int, verb: str, unit: str, begin: int = 0, earlier: float = 0.0) -> None:
        self._verb, self._done, self._total = verb, begin, total
        self._spent, self._since = earlier, time.perf_counter()
        self._first: tuple[int, float] | None = None
        self._printed = self._since
        self._bar = tqdm(total=total, initial=begin, desc=verb, unit=unit, disable=None, dynamic_ncols=True)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def seconds(self) -> float:
        """Seconds spent, those of earlier sessions included and pauses left out."""
        return self._spent + time.perf_counter() - self._since

    def rate(self) -> float:
        """Units per second, without the first one, which compiles."""
        done, seconds = self._first or (self._done, self.seconds())
        elapsed = self.seconds() - seconds
        return (self._done - done) / elapsed if elapsed > 0 else 0.0

    def update(self, units: int = 1) -> None:
        """So many more are done."""
        self._done += units
        self._bar.update(units)
        if self._first is None:
            self._first = (self._done, self.seconds())

    def note(self, text: str) -> None:
        """Shows something beside the bar."""
        self._bar.set_postfix_str(text)
        now = time.perf_counter()
        if self._bar.disable and (now - self._printed > 20 or self._done == self._total):
            self._printed = now
            rate = self.rate()
            left = f", {(self._total - self._done) / rate:.0f} s left" if rate else ""
            print(f"{self._verb} {self._done}/{self._total}  {text}{left}", flush=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count."""
        self._spent = self.seconds()
        yield
        self._since = time.perf_counter()
