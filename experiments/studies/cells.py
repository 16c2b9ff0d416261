"""What studies share: cells that are measured once each and stored at once, so that a study that was stopped goes on.

A cell is a dict of plain values that says what is measured, such as {"prediction": "x0", "seed": 0}; its row is the
cell, the numbers that were measured, and the seconds that took. study.json in --outdir holds all rows, those of earlier
commands too: a later command with more cells measures the new ones only. What all cells have in common are the
settings, which cannot change between commands that share a folder.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from matplotlib.figure import Figure

from diffusion.io import files, stored_config
from experiments import command
from experiments.bench.timing import machine
from experiments.paths import define_path
from experiments.progress import Bar

Cell = Mapping[str, Any]
Row = dict[str, Any]


class Study(NamedTuple):
    """What is measured, and how it is shown.

    name: of the study; the default folder is studies/NAME.
    settings: plain values that all cells share.
    cells: what to measure, in this order.
    measure: from a cell to its numbers, plain values or lists of them; those that are not finite are stored as None.
    figure: from the rows of the cells to a figure.
    paragraph: from these rows to the result in words, with the table if there is one.
    """

    name: str
    settings: Mapping[str, Any]
    cells: Sequence[Cell]
    measure: Callable[[Cell], Mapping[str, Any]]
    figure: Callable[[Sequence[Row]], Figure]
    paragraph: Callable[[Sequence[Row]], str]


def define_flags(argv: Sequence[str]) -> None:
    """Defines --outdir, which all studies have, for `command.run`."""
    del argv
    define_path("outdir", None, "Where to write, and to continue; default: studies/ and the name of the study.")


def perform(argv: Sequence[str], study: Study) -> list[Row]:
    """Measures what is left of a study, writes study.json, figure.png and paragraph.md, and prints the paragraph.

    Raises:
      UsageError: there are arguments that are no flags.
      OSError, ValueError: the folder cannot be written, or holds another study; nothing was measured.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    command.start()
    folder = Path(flags.FLAGS.outdir or Path("studies", study.name))
    rows = measured(folder, study)
    drawn, words = study.figure(rows), study.paragraph(rows) + "\n"
    files.atomic_write(folder / "figure.png", lambda file: drawn.savefig(file, format="png"))
    files.atomic_write(folder / "paragraph.md", lambda file: file.write(words.encode()))
    print(f"{words}\nWritten to {folder}: study.json, figure.png, paragraph.md")
    return rows


def measured(folder: Path, study: Study) -> list[Row]:
    """The rows of a study's cells, in their order; each is stored in `folder` as soon as it is measured.

    Raises:
      OSError, ValueError: the folder cannot be written, or holds another study or one with other settings.
    """
    files.check_writable(folder)
    stored = _read(folder / "study.json", study)
    left = [cell for cell in study.cells if _row(stored["rows"], cell) is None]
    if len(left) < len(study.cells):
        print(f"{len(study.cells) - len(left)} of {len(study.cells)} cells were measured before, in {folder}")
    with Bar(len(study.cells), "measuring", "cell", begin=len(study.cells) - len(left)) as bar:
        for cell in left:
            start = time.perf_counter()
            numbers = study.measure(cell)
            row = {**cell, **_finite(dict(numbers)), "seconds": round(time.perf_counter() - start, 2)}
            stored["rows"].append(row)
            _write(folder / "study.json", stored)
            bar.update()
            bar.note(", ".join(f"{name} {value}" for name, value in cell.items()))
    return [_row(stored["rows"], cell) for cell in study.cells]


def groups(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of these names, such as those of all seeds: {("x0", 4): [row, ...], ...}, in order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def _read(path: Path, study: Study) -> dict[str, Any]:
    """What is stored of a study; without a file, no rows."""
    if not path.exists():
        return {"study": study.name, "settings": dict(study.settings), "machine": machine(), "rows": []}
    another = "pass another --outdir"
    try:
        stored = json.loads(path.read_text())
        name, settings, rows = stored["study"], stored["settings"], stored["rows"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged or not that of a study ({e!r}); delete it or {another}") from None
    if name != study.name:
        raise ValueError(f"{path} holds the study {name!r}, not {study.name!r}; {another}")
    if differing := stored_config.config_differences(settings, study.settings):
        raise ValueError(f"{path} was measured with other settings; use them again, or {another}:\n  "
                         + "\n  ".join(differing))  # fmt: skip
    return {**stored, "rows": list(rows)}


def _write(path: Path, stored: Mapping[str, Any]) -> None:
    """One line for each row, so that many numbers of a row do not make a long file."""
    head = {name: value for name, value in stored.items() if name != "rows"}
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in stored["rows"])
    text = json.dumps(head, indent=2)[:-2] + f',\n  "rows": [\n{rows}\n  ]\n}}\n'
    files.atomic_write(path, lambda file: file.write(text.encode()))


def _row(rows: Sequence[Row], cell: Cell) -> Row | None:
    """The row of a cell, whose values compare as JSON stores them."""
    wanted = json.loads(json.dumps(dict(cell)))
    return next((row for row in rows if {name: row.get(name) for name in wanted} == wanted), None)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
