"""Write TensorBoard events and `metrics.jsonl`, with the same tags for all runs."""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from kd.errors import UserError
from kd.utils.io import write_atomic


class Tracker:
    """Write a run's scalars, figures and images to its folder.

    The tags of scalars are `loss/<name>` (unweighted), `loss/total`, `train/lr` and
    `eval/<metric>`.

    Args:
        folder: Run folder.
        enabled: False on all processes but one; then nothing is written.
        resume_step: Step of the checkpoint that training resumes from; scalars of later steps are
            removed, because these steps are repeated.
    """

    def __init__(self, folder: Path, *, enabled: bool = True, resume_step: int = 0) -> None:
        self._enabled = enabled
        if not enabled:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            write_atomic(path, lambda p: p.write_text(_lines_up_to(path, resume_step)))
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            hint = "choose another folder with --out"
            raise UserError(f"{folder}: cannot be written: {error}; {hint}") from error
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._writer: Any = SummaryWriter(
            str(folder), purge_step=resume_step + 1 if resume_step else None
        )
        # Write the curves even if training ends in an error.
        self._end = weakref.finalize(self, _end, self._writer, self._file)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars by tag."""
        if not self._enabled:
            return
        with self._disk_errors_named():
            for tag, value in values.items():
                self._file.write(json.dumps({"step": step, "tag": tag, "value": value}) + "\n")
                self._writer.add_scalar(tag, value, step)
            self._file.flush()

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Write a matplotlib figure and close it."""
        if self._enabled:
            with self._disk_errors_named():
                self._writer.add_figure(tag, figure, step)

    def image(self, tag: str, image: Tensor, step: int) -> None:
        """Write an image, uint8 (3, H, W)."""
        if self._enabled:
            with self._disk_errors_named():
                self._writer.add_image(tag, image.to(torch.uint8).cpu().numpy(), step)

    def text(self, tag: str, text: str) -> None:
        """Write a Markdown text."""
        if self._enabled:
            with self._disk_errors_named():
                self._writer.add_text(tag, text)

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write the run's settings and final metrics, for TensorBoard's table of all runs."""
        if not self._enabled:
            return
        from torch.utils.tensorboard.summary import hparams

        flat = {
            k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in values.items()
        }
        with self._disk_errors_named():
            for summary in hparams(flat, dict(metrics)):
                self._writer.file_writer.add_summary(summary)

    def close(self) -> None:
        """Flush to disk and close."""
        if self._enabled:
            with self._disk_errors_named():
                self._file.flush()
                os.fsync(self._file.fileno())
                self._writer.flush()
            self._end()

    @contextlib.contextmanager
    def _disk_errors_named(self) -> Iterator[None]:
        """Raise a UserError that names the folder in place of an OSError.

        TensorBoard writes in a thread; the next call of the writer raises the thread's error.
        """
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._folder}: curves cannot be written: {error}; free disk space, then resume "
                "with --resume"
            ) from error


def _end(writer: Any, file: IO[str]) -> None:
    """Close the files; ignore errors, because failed writes were already reported."""
    for one in (file, writer):
        with contextlib.suppress(OSError):
            one.close()


def _lines_up_to(path: Path, step: int) -> str:
    """Return the lines of `metrics.jsonl` up to a step, without a truncated last line."""
    if not step or not path.is_file():
        return ""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # truncated when the process was killed
        if entry["step"] <= step:
            lines.append(line + "\n")
    return "".join(lines)


def flatten(values: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Flatten nested settings to a dict with dotted keys, with `place` as their prefix."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{place}.{key}" if place else str(key)
        flat |= flatten(value, dotted) if isinstance(value, Mapping) else {dotted: value}
    return flat
