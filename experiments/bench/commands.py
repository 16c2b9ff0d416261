"""What all benchmark commands share: their flags, and from a measurement to a report, a JSON file and a plot."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.paths import define_path


def define_flags(argv: list[str]) -> None:
    """Defines --json, --rounds, --steps and --sample_steps, for `command.run`.

    Not on import, since other commands have flags of these names, and a test imports them all.
    """
    del argv
    define_path("json", None, "Also write the result, every single timing included, to this file.")
    flags.DEFINE_integer("rounds", 7, "Each program is timed this many times, in turns.", lower_bound=1)
    flags.DEFINE_integer("steps", 5, "Training steps per timing.", lower_bound=1)
    flags.DEFINE_integer("sample_steps", 10, "Sampler steps per timing; all of them cost alike.", lower_bound=1)


def amounts() -> dict[str, int]:
    """The values of --rounds, --steps and --sample_steps, as keyword arguments."""
    return {name: flags.FLAGS[name].value for name in ("rounds", "steps", "sample_steps")}


def perform(
    argv: Sequence[str],
    measure: Callable[[], dict[str, Any]],
    report: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    """Measures, prints the report, and writes the files that --json and, with `plot`, --plot ask for.

    Raises:
      UsageError: there are arguments that are no flags.
      OSError, ValueError: a file could not be written; nothing was measured.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    json_path, plot_path = flags.FLAGS.json, flags.FLAGS.plot if plot else None
    check_json(json_path)
    if plot_path and not Path(plot_path).parent.is_dir():
        raise ValueError(f"--plot={plot_path}: there is no folder {Path(plot_path).parent}; create it first")
    result = measure()
    print(report(result))
    write_json(json_path, result)
    if plot_path:
        plot(result, Path(plot_path))


def check_json(path: str | None) -> None:
    """Raises OSError unless the result can be written, before anything is measured."""
    if path:
        with Path(path).open("a"):
            pass


def write_json(path: str | None, result: dict[str, Any]) -> None:
    """Writes the result if a file was asked for."""
    if path:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
