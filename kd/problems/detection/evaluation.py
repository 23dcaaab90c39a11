"""An evaluation of detectors: tables, figures and numbers, put together from their records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kd.errors import UserError
from kd.formats.coco_results import read_detections, read_truth
from kd.metrics.records import Records
from kd.problems.detection import records as box_records
from kd.problems.detection.figures import (
    box_class_table,
    box_classes_side_by_side,
    class_ap_figure,
    size_figure,
    size_table,
)
from kd.problems.detection.scores import VOC, BoxRow, per_class
from kd.problems.objects import tables
from kd.problems.objects.tables import Scored, scored_run
from kd.problems.records import DETECTIONS
from kd.report.tables import Table
from kd.runs.read import distinct_names


@dataclass(frozen=True)
class BoxEvaluation:
    """What one or several detectors found on the same val pictures.

    Args:
        title: Above the first table.
        data: What the pictures are, plain values for `metrics.json`.
        runs: Name -> predictions.
    """

    title: str
    data: Mapping[str, Any]
    runs: Mapping[str, Records]
    picture = "boxes"

    @cached_property
    def scored(self) -> list[Scored]:
        """Metrics of every run, Pascal VOC's too."""
        metrics = (*DETECTIONS.rows, *VOC)
        return [scored_run(name, records, metrics) for name, records in self.runs.items()]

    @cached_property
    def classes(self) -> dict[str, list[BoxRow]]:
        """Class by class, of every run."""
        return {name: per_class(records) for name, records in self.runs.items()}

    @property
    def _first(self) -> Records:
        return next(iter(self.runs.values()))

    @property
    def _names(self) -> list[str]:
        return [str(name) for name in self._first["names"]]

    def summary_tables(self) -> list[Table]:
        """Metrics with their intervals, and AP by size."""
        if len(self.runs) > 1:
            return [tables.side_by_side_table(self.scored, self.title), size_table(self.runs)]
        return [tables.run_table(self.scored, self.title), size_table(self.runs)]

    def class_table(self) -> Table:
        """Class by class: one run in full, of several the AP."""
        if len(self.runs) > 1:
            return box_classes_side_by_side(self.classes, self._names)
        (rows,) = self.classes.values()
        return box_class_table(rows, self._first, self._names)

    def all_tables(self) -> list[Table]:
        """What `table.md` holds."""
        return [*self.summary_tables(), self.class_table()]

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Every figure with its name."""
        yield "class_ap", class_ap_figure(self.classes, self._names)
        yield "size_ap", size_figure(self.runs)

    def numbers(self) -> dict[str, Any]:
        """Everything in the tables, in full precision, for `metrics.json`."""
        runs = {
            one.name: {
                **one.plain,
                "classes": [
                    {"name": self._names[row.label], "objects": row.objects, **row.numbers}
                    for row in self.classes[one.name]
                ],
            }
            for one in self.scored
        }
        return {
            "title": self.title,
            "data": dict(self.data),
            "pictures": len(self._first["image_ids"]),
            "runs": runs,
        }


def about_boxes(name: str, records: Records) -> str:
    """What detections are about, for a title."""
    objects = int((~records["truth_crowds"]).sum())
    return f"{name}: {objects} objects in {len(records['image_ids'])} pictures"


def results_records(annotations: Path, results: Path) -> Records:
    """What any detector found, as its results file in COCO's format has it.

    Raises:
        UserError: What is wrong with one of the files.
    """
    truth = read_truth(annotations)
    found = read_detections(results, truth)
    records = box_records.box_records(
        truth.boxes,
        found.boxes,
        found.scores,
        image_ids=truth.image_ids,
        names=truth.class_names,
        category_ids=truth.category_ids,
        confusable=truth.looks,
    )
    box_records.check(records, str(annotations))
    return records


def results_evaluation(annotations: Path, results: Sequence[Path]) -> BoxEvaluation:
    """The evaluation of one or several results files.

    Args:
        annotations: COCO instances JSON.
        results: Files of the same images; their names are the runs'.

    Raises:
        UserError: What is wrong with one of the files, or two are the same.
    """
    if len(set(results)) < len(results):
        raise UserError(f"{results[-1]}: the same results twice")
    names = distinct_names([path.with_suffix("") for path in results])
    runs = {
        name: results_records(annotations, path) for name, path in zip(names, results, strict=True)
    }
    first = next(iter(runs.values()))
    about = {"annotations": str(annotations)}
    return BoxEvaluation(about_boxes(annotations.stem, first), about, runs)
