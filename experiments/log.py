"""The log of a run: numbers in JSON lines, and TensorBoard events."""

import json
from pathlib import Path
from typing import Any

import numpy as np


class Log:
    """Numbers in a file of JSON lines, a row per step, and as TensorBoard events in a folder, if one is given."""

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        self.path = path
        self._events = None
        if tensorboard is not None:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard needs tensorboardX: pip install -e '.[tensorboard]'") from None
            self._events = SummaryWriter(str(tensorboard))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._events:
            self._events.close()

    def rows(self) -> list[dict[str, float]]:
        """The rows logged so far; an incomplete last line, left by a crash, is skipped."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def rewind(self, step: int) -> None:
        """Removes the rows after `step`: those steps will be run again."""
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
        """An image [H, W] or [H, W, C] for TensorBoard; nothing without it."""
        if self._events:
            self._events.add_image(name, image, step, dataformats="HW" if image.ndim == 2 else "HWC")
