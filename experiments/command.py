"""What all commands share: the flag --workdir, JAX's settings, and errors as one message instead of a traceback."""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from diffusion.cpu.memory import keep_memory
from diffusion.io import files
from experiments import signals
from experiments.paths import cache_folder, define_path

# Defined once for all commands, so that a notebook or a test can import several of them.
_WORKDIR = define_path(
    "workdir",
    None,
    "Work directory of a training run; experiments.train's default: runs/ and the config's name. To sample with "
    "experts, those of all, separated by commas.",
)


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
        logging.set_verbosity(logging.WARNING)  # at INFO, JAX lists the accelerators that it did not find
        try:
            main(argv)
        except signals.Stopped as e:
            sys.exit(_complain(e, 130))
        except KeyboardInterrupt:
            sys.exit(_complain("Interrupted; files saved before are complete.", 130))
        except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as e:
            if os.environ.get("PATCH_DIFFUSION_TRACEBACK"):
                raise
            sys.exit(_complain(e, 1))

    app.run(guarded, flags_parser=parse)


def start() -> None:
    """Caches compiled programs between processes, and keeps freed memory between steps (`keep_memory`).

    Programs are cached in $JAX_COMPILATION_CACHE_DIR, or in the folder xla of `cache_folder`.
    """
    keep_memory()
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "xla"))
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


def has_workdir() -> bool:
    """Whether --workdir was given."""
    return bool(_WORKDIR.value)


def workdirs() -> list[Path]:
    """--workdir, which may list several, the runs of SNR experts, separated by commas.

    Raises:
      ValueError: it is not given, or empty somewhere.
    """
    folders = [str(workdir())] if workdir().exists() else str(workdir()).split(",")
    if not all(folders):
        raise ValueError(f"--workdir={_WORKDIR.value} has an empty name between its commas")
    return [Path(folder) for folder in folders]


def refuse_given(names: Iterable[str], why: str) -> None:
    """Raises ValueError if one of these flags was given, which has no effect for the reason `why`."""
    for name in names:
        flag = flags.FLAGS[name]
        if flag.present:
            value = ",".join(flag.value) if isinstance(flag.value, list) else flag.value
            raise ValueError(f"--{name}={value} has no effect {why}: leave it out")


def output_folder(parent: Path, result: str, outdir: str | None, overwrite: bool) -> Path:
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


def _complain(error: Exception | str, status: int) -> int:
    print(f"\n{'' if status == 130 else 'error: '}{error}", file=sys.stderr)
    return status
