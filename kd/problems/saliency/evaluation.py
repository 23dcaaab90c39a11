"""An evaluation of saliency maps: tables, figures and numbers, put together from their records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matplotlib.figure import Figure

from kd.metrics.records import Records
from kd.problems.objects import tables
from kd.problems.objects.tables import Scored, scored_run
from kd.problems.records import SALIENCY
from kd.problems.saliency.baselines import notes
from kd.problems.saliency.figures import picture_figure, pictures_table
from kd.report.tables import Table


@dataclass(frozen=True)
class GazeEvaluation:
    """Where one or several runs say that people look on the same val pictures.

    Args:
        title: Above the first table.
        data: What the pictures are, plain values for `metrics.json`.
        runs: Name -> predictions.
    """

    title: str
    data: Mapping[str, Any]
    runs: Mapping[str, Records]
    picture = "gaze"

    @cached_property
    def scored(self) -> list[Scored]:
        """Metrics of every run with intervals, then of what they are held against."""
        known = SALIENCY.references(self._first)
        runs = [scored_run(name, one, SALIENCY.rows) for name, one in self.runs.items()]
        beside = [
            scored_run(name, one, SALIENCY.rows, intervals=False) for name, one in known.items()
        ]
        return [*runs, *beside]

    @property
    def _first(self) -> Records:
        return next(iter(self.runs.values()))

    def summary_tables(self) -> list[Table]:
        """Metrics with their intervals, beside the references."""
        said = notes(self._first)
        if len(self.runs) > 1:
            return [tables.side_by_side_table(self.scored, self.title, said)]
        return [tables.run_table(self.scored, self.title, said)]

    def class_table(self) -> Table:
        """There are no classes: the pictures that the first run knows least and most about."""
        return pictures_table(self._first)

    def all_tables(self) -> list[Table]:
        """What `table.md` holds."""
        return [*self.summary_tables(), self.class_table()]

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """How a number is spread over the pictures, beside the references."""
        every = {**self.runs, **SALIENCY.references(self._first)}
        for metric in ("KLD", "NSS", "IG"):
            yield f"pictures_{metric}", picture_figure(every, metric)

    def numbers(self) -> dict[str, Any]:
        """Everything in the tables, in full precision, for `metrics.json`."""
        found: dict[str, Any] = {
            "title": self.title,
            "data": dict(self.data),
            "pictures": len(self._first["image_ids"]),
        }
        for one in self.scored:
            part = "runs" if one.name in self.runs else "references"
            found.setdefault(part, {})[one.name] = one.plain
        return found
