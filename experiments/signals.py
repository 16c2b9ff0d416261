"""Stop signals: the first SIGINT or SIGTERM lets a run finish its step and save."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(Exception):
    """A signal ended the job after everything was saved."""


class Stop:
    """Whether a signal asked the job to stop."""

    asked = False


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
