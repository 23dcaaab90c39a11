"""An evaluation of label maps: its tables, figures and numbers, put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matplotlib.figure import Figure

from kd.metrics.records import Records
from kd.problems.objects import tables
from kd.problems.objects.tables import Scored, scored_run
from kd.problems.records import PICTURES
from kd.problems.segmentation.data import SegmentationDataset
from kd.problems.segmentation.figures import (
    iou_figure,
    map_class_table,
    map_classes_side_by_side,
    pixel_confusion_figure,
)
from kd.problems.segmentation.records import ClassRow, per_class
from kd.report.tables import Table


@dataclass(frozen=True)
class MapEvaluation:
    """Answers of one or several runs about the pixels of the same val pictures.

    Args:
        title: Above the first table.
        data: The data set.
        runs: Name -> predictions.
    """

    title: str
    data: SegmentationDataset
    runs: Mapping[str, Records]
    picture = "overlay"

    @cached_property
    def scored(self) -> list[Scored]:
        """Metrics of every run."""
        return [scored_run(name, one, PICTURES.rows) for name, one in self.runs.items()]

    @cached_property
    def classes(self) -> dict[str, list[ClassRow]]:
        """Class by class, of every run."""
        return {name: per_class(records) for name, records in self.runs.items()}

    @property
    def _first(self) -> Records:
        return next(iter(self.runs.values()))

    def summary_tables(self) -> list[Table]:
        """Metrics with their intervals."""
        if len(self.runs) > 1:
            return [tables.side_by_side_table(self.scored, self.title)]
        return [tables.run_table(self.scored, self.title)]

    def class_table(self) -> Table:
        """Class by class: one run in full, of several the IoU."""
        if len(self.runs) > 1:
            return map_classes_side_by_side(self.classes, self.data.class_names)
        (rows,) = self.classes.values()
        return map_class_table(rows, self._first, self.data.class_names)

    def all_tables(self) -> list[Table]:
        """What `table.md` holds."""
        return [*self.summary_tables(), self.class_table()]

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Every figure with its name; the confusions for a single run only."""
        yield "class_iou", iou_figure(self.classes, self.data.class_names)
        if len(self.runs) == 1:
            confusion = self._first["confusion"].sum(axis=0)
            yield "confusions", pixel_confusion_figure(confusion, self.data.class_names)

    def numbers(self) -> dict[str, Any]:
        """Everything in the tables, in full precision, for `metrics.json`."""
        names = self.data.class_names
        runs = {
            one.name: {
                **one.plain,
                "classes": [
                    {"name": names[row.label], "pixels": row.share, "IoU": row.iou,
                     "accuracy": None if row.accuracy != row.accuracy else row.accuracy,
                     "instead": {names[c]: share for c, share in row.instead}}
                    for row in self.classes[one.name]
                ],
            }
            for one in self.scored
        }  # fmt: skip
        return {
            "title": self.title,
            "data": self.data.section.model_dump(mode="json"),
            "pictures": len(self._first["image_ids"]),
            "runs": runs,
        }
