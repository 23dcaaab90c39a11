"""Progress bars, and interruption of training by Ctrl-C without loss of progress."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from kd.engine.checkpoint import Progress

_log = logging.getLogger("kd")
_SECONDS_BETWEEN_LINES = 15


class CleanStop:
    """A context manager that catches the first Ctrl-C or SIGTERM.

    Calling the object returns whether a signal has arrived, so that training can write a checkpoint
    and stop after the current step. A second signal raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self._requested = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> CleanStop:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old[number] = signal.signal(number, self._request)
            except ValueError:  # only the main thread can handle signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self._requested

    def _request(self, *_: object) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True


class ProgressBar:
    """Show the progress of training: a bar on a terminal, log lines elsewhere.

    Entering the context returns the function that takes a new position and updates the bar.

    Args:
        label: Name of the run.
        steps: Total number of steps.
        done: Number of steps completed before a resume.
        enabled: False on all processes but one; then nothing is shown.
    """

    def __init__(self, label: str, steps: int, done: int, *, enabled: bool = True) -> None:
        self._label, self._steps, self._done, self._enabled = label, steps, done, enabled
        self._bar: RichProgress | None = None
        self._logged = time.monotonic()
        if sys.stderr.isatty() and enabled:
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(),
            )  # fmt: skip

    def __enter__(self) -> Callable[[Progress, int], None]:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._steps, completed=self._done)
        return self._advance

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _advance(self, place: Progress, batches: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=place.step)
        elif self._enabled:
            now, last = time.monotonic(), place.step == self._steps
            if last or now - self._logged > _SECONDS_BETWEEN_LINES:
                self._logged = now
                _log.info("%s: step %d of %d", self._label, place.step, self._steps)
