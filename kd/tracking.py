"""TensorBoard and metrics.jsonl, with the same tags in every run so that curves overlay."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.checkpoint import write_whole
from kd.errors import UserError


class Tracker:
    """Writes scalars, figures and pictures of a run; silent where `enabled` is false.

    Tags: `loss/<name>` (unweighted), `loss/total`, `train/lr`, `eval/<metric>`.

    Args:
        folder: The run folder.
        enabled: False on ranks other than 0.
        resume_step: Steps after this one are dropped from an earlier start of the same run.

    Raises:
        UserError: The folder cannot be written.
    """

    def __init__(self, folder: Path, *, enabled: bool = True, resume_step: int = 0) -> None:
        self._enabled = enabled
        if not enabled:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            write_whole(path, lambda p: p.write_text(_lines_up_to(path, resume_step)))
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error}; name another --out") from error
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(
            str(folder), purge_step=resume_step + 1 if resume_step else None
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers under their tags."""
        if not self._enabled:
            return
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
            self._file.write(json.dumps({"step": step, "tag": tag, "value": value}) + "\n")
        self._file.flush()

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Write a matplotlib figure and close it."""
        if self._enabled:
            self._writer.add_figure(tag, figure, step)

    def image(self, tag: str, image: Tensor, step: int) -> None:
        """Write a picture, uint8 (3, H, W)."""
        if self._enabled:
            self._writer.add_image(tag, image.to(torch.uint8).cpu().numpy(), step)

    def text(self, tag: str, text: str) -> None:
        """Write Markdown."""
        if self._enabled:
            self._writer.add_text(tag, text)

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write the run's settings with its final metrics, for TensorBoard's table of runs."""
        if not self._enabled:
            return
        from torch.utils.tensorboard.summary import hparams

        flat = {
            k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in values.items()
        }
        for summary in hparams(flat, dict(metrics)):  # type: ignore[no-untyped-call]
            self._writer.file_writer.add_summary(summary)

    def close(self) -> None:
        """Flush to disk."""
        if self._enabled:
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def _lines_up_to(path: Path, step: int) -> str:
    """What an earlier start wrote, without steps that will be run again or a torn last line."""
    if not step or not path.is_file():
        return ""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off by a kill
        if entry["step"] <= step:
            kept.append(line + "\n")
    return "".join(kept)


def flatten(values: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Nested settings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{place}.{key}" if place else str(key)
        flat |= flatten(value, dotted) if isinstance(value, Mapping) else {dotted: value}
    return flat
