"""Progress of long work on the terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class Bar:
    """A progress bar with the time left; without a terminal, as in a log file, a plain line every 20 seconds."""

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
        """Seconds of work, earlier sessions included, pauses excluded."""
        return self._spent + time.perf_counter() - self._since

    def rate(self) -> float:
        """Units per second, without the first update, which compiles."""
        done, seconds = self._first or (self._done, self.seconds())
        elapsed = self.seconds() - seconds
        return (self._done - done) / elapsed if elapsed > 0 else 0.0

    def update(self, units: int = 1) -> None:
        """Adds to the number of units done."""
        self._done += units
        self._bar.update(units)
        if self._first is None:
            self._first = (self._done, self.seconds())

    def note(self, text: str) -> None:
        """Shows text with the bar."""
        self._bar.set_postfix_str(text)
        now = time.perf_counter()
        if self._bar.disable and (now - self._printed > 20 or self._done == self._total):
            self._printed = now
            rate = self.rate()
            left = f", {(self._total - self._done) / rate:.0f} s left" if rate else ""
            print(f"{self._verb} {self._done}/{self._total}  {text}{left}", flush=True)

    @property
    def done(self) -> int:
        """Units done."""
        return self._done

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside this context does not count."""
        self._spent = self.seconds()
        yield
        self._since = time.perf_counter()


class Reading:
    """Called with what is done, the images done so far and all: shows a bar for what takes longer than a second."""

    def __init__(self, after: float = 1.0) -> None:
        self._after, self._what, self._since = after, "", 0.0
        self._bar: Bar | None = None

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar:
            self._bar.__exit__()
            self._bar = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what or (self._bar and done < self._bar.done):  # other work than before
            self.__exit__()
            self._what, self._since = what, time.perf_counter()
        if not self._bar and time.perf_counter() - self._since > self._after:
            self._bar = Bar(total, what, "image", done)
        if self._bar:
            self._bar.update(done - self._bar.done)
            self._bar.note("")
