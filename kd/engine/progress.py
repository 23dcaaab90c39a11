"""What a person sees of a long run, and how they may stop it."""

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
    """Notes the first Ctrl-C or SIGTERM, for a checkpoint and a clean end; a second one ends all.

    Called, it says whether there was one.
    """

    def __init__(self) -> None:
        self._asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> CleanStop:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old[number] = signal.signal(number, self._ask)
            except ValueError:  # not in the main thread: whoever runs us there stops us
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self._asked

    def _ask(self, *_: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True


class ProgressBar:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, label: str, steps: int, done: int, *, enabled: bool = True) -> None:
        self._label, self._steps, self._done = label, steps, done
        self._silent = not enabled
        self._bar: RichProgress | None = None
        self._said = time.monotonic()
        if sys.stderr.isatty() and not self._silent:
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
        elif not self._silent:
            now, last = time.monotonic(), place.step == self._steps
            if last or now - self._said > _SECONDS_BETWEEN_LINES:
                self._said = now
                _log.info("%s: step %d of %d", self._label, place.step, self._steps)
