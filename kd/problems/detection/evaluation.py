"""Results of detectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from accelerate import Accelerator
from matplotlib.figure import Figure

from kd.formats.coco_results import read_detections, read_truth
from kd.metrics.records import Records
from kd.problems.detection import records as box_records
from kd.problems.detection import scores
from kd.problems.detection.data import DetectionDataset
from kd.problems.detection.draw import box_overlays, mask_figures
from kd.problems.detection.figures import (
    box_class_table,
    box_classes_side_by_side,
    class_ap_figure,
    size_figure,
    size_table,
)
from kd.problems.results import Evaluation, Predictor, Results
from kd.report.tables import Table


@dataclass(frozen=True)
class DetectionResults(Results):
    """Results from detections and ground truth of each image."""

    things: ClassVar[str] = "images with boxes"
    not_by_id: ClassVar[tuple[str, ...]] = box_records.NOT_BY_ID
    our_rows: ClassVar[tuple[str, ...]] = scores.ROWS
    our_bounded: ClassVar[tuple[str, ...]] = ("AP", "AP50")
    image_name: ClassVar[str] = "boxes"
    drawn_from: ClassVar[Literal["models", "records"] | None] = "records"

    check = staticmethod(box_records.check)
    check_same_truth = staticmethod(box_records.check_same_truth)
    our_value = staticmethod(scores.value)
    our_interval = staticmethod(scores.interval)
    our_difference = staticmethod(scores.difference)

    def about(self, records: Records) -> str:
        """Numbers of objects and images."""
        objects = int((~records["truth_crowds"]).sum())
        return f"{objects} objects in {len(records['image_ids'])} images"

    def evaluation(
        self, title: str, runs: Mapping[str, Records], section: Mapping[str, Any],
        opened: Callable[[], DetectionDataset] | None = None,
    ) -> Evaluation:  # fmt: skip
        """Tables and figures; the records hold the class names."""
        names = [str(name) for name in next(iter(runs.values()))["names"]]
        return DetectionEvaluation(self, title, section, runs, names)

    def read_file(self, annotations: Path, results: Path) -> Records:
        """Read a results file of any detector, in COCO's format."""
        truth = read_truth(annotations)
        found = read_detections(results, truth)
        records = box_records.box_records(
            truth.boxes,
            found.boxes,
            found.scores,
            image_ids=truth.image_ids,
            names=truth.class_names,
            category_ids=truth.category_ids,
            confusable=truth.confusable_groups,
        )
        self.check(records, str(annotations))
        return records

    def draw(
        self, data: DetectionDataset, predictors: Mapping[str, Predictor],
        runs: Mapping[str, Records], *, count: int, accelerator: Accelerator,
    ) -> Iterator[Figure]:  # fmt: skip
        """Draw val images with ground truth and detections, from records alone."""
        return box_overlays(runs, data.objects.val, count=count)

    def draw_training(
        self, data: DetectionDataset, task: object, terms: Sequence[Any], *, count: int
    ) -> Iterator[tuple[str, Figure]]:
        """Draw the imitation masks on each level of the student's pyramid, if terms use masks."""
        if any(term.kind.mask for term in terms):
            yield from mask_figures(data.samples("val"), task, count=count)


@dataclass(frozen=True)
class DetectionEvaluation(Evaluation):
    """Tables and figures of detectors."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics of the tables, with Pascal VOC's."""
        return (*self.results.rows, *scores.VOC)

    @cached_property
    def classes(self) -> dict[str, list[scores.BoxRow]]:
        """Rows of each class, by run."""
        return {name: scores.per_class(records) for name, records in self.runs.items()}

    def summary_tables(self) -> list[Table]:
        """Metrics with intervals, and AP by size."""
        return [*super().summary_tables(), size_table(self.runs)]

    def class_table(self) -> Table:
        """All metrics by class for one run, AP for several."""
        if len(self.runs) > 1:
            return box_classes_side_by_side(self.classes, self.names)
        (rows,) = self.classes.values()
        return box_class_table(rows, self.first, self.names)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """AP by class and by size."""
        yield "class_ap", class_ap_figure(self.classes, self.names)
        yield "size_ap", size_figure(self.runs)

    def details(self, name: str) -> dict[str, Any]:
        """COCO's metrics of each class."""
        rows = [
            {"name": self.names[row.label], "objects": row.objects, **row.numbers}
            for row in self.classes[name]
        ]
        return {"classes": rows}
