"""Progress of long work on bytes, for people and for log files."""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from rich import progress as rich_progress
from rich.console import Console

log = logging.getLogger(__name__)


class Meter:
    """Progress of something counted in bytes: a bar on a terminal, a line every tenth elsewhere.

    Args:
        title: What is being done.
        total: Bytes, None if unknown.
        done: Bytes that are there already.
    """

    def __init__(self, title: str, total: int | None, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self.bar: rich_progress.Progress | None = None
        self.tenth = 10 * done // total if total else 0

    def __enter__(self) -> Meter:
        """Show the bar."""
        if sys.stderr.isatty():
            self.bar = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(),
                rich_progress.DownloadColumn(),
                rich_progress.TransferSpeedColumn(),
                rich_progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.bar.add_task(self.title, total=self.total, completed=self.done)
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()

    def advance(self, count: int) -> None:
        """Add `count` bytes."""
        self.done += count
        if self.bar is not None:
            self.bar.advance(self.bar.task_ids[0], count)
        elif self.total and 10 * self.done // self.total > self.tenth:
            self.tenth = 10 * self.done // self.total
            log.info("%s: %d %% of %s", self.title, 10 * self.tenth, readable(self.total))


def readable(count: int) -> str:
    """Bytes as people write them: 19.3 GB."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
