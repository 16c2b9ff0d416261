"""The log of a run: numbers in JSON lines, and whatever else follows the run."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.trackers import Tracker


class Log:
    """Numbers in a file of JSON lines, a row per step; numbers and images also to the trackers, if any.

    Without `writes`, as in all processes of a run but one, it reads alone.
    """

    def __init__(self, path: Path, trackers: Sequence[Tracker] = (), *, writes: bool = True) -> None:
        self.path, self._writes = path, writes
        self._trackers = list(trackers)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        self._each(lambda tracker: tracker.close(error is None))

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
        if not self._writes:
            return
        kept = [row for row in self.rows() if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Appends a row."""
        if self._writes:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.tell(step, values)

    def tell(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers for the trackers alone, such as those of the final report."""
        self._each(lambda tracker: tracker.scalars(step, values))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """An image uint8 [H, W], [H, W, 1] or [H, W, 3] for the trackers; nothing without them."""
        if self._trackers:
            image = np.broadcast_to(image if image.ndim == 3 else image[..., None], (*image.shape[:2], 3))
        self._each(lambda tracker: tracker.image(step, name, image))

    def _each(self, call: Callable[[Tracker], Any]) -> None:
        """Calls every tracker. One that fails is left out from then on, since a training must not end with it."""
        for tracker in tuple(self._trackers):
            try:
                call(tracker)
            except Exception as e:  # whatever a package of others raises
                self._trackers.remove(tracker)
                print(f"a tracker failed and is left out from here on: {type(e).__name__}: {e}")
