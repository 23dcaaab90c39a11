"""Results of detectors, of runs and of results files in COCO's format."""

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
    """Boxes that were found, beside the true ones."""

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
        """The numbers of objects and of images."""
        objects = int((~records["truth_crowds"]).sum())
        return f"{objects} objects in {len(records['image_ids'])} images"

    def evaluation(
        self,
        title: str,
        runs: Mapping[str, Records],
        section: Mapping[str, Any],
        opened: Callable[[], DetectionDataset] | None = None,
    ) -> Evaluation:
        """Tables and figures; the records hold all that is needed."""
        names = [str(name) for name in next(iter(runs.values()))["names"]]
        return DetectionEvaluation(self, title, section, runs, names)

    def read_file(self, annotations: Path, results: Path) -> Records:
        """Read a results file of any detector, in COCO's format.

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
            confusable=truth.confusable_groups,
        )
        self.check(records, str(annotations))
        return records

    def draw(
        self,
        data: DetectionDataset,
        predictors: Mapping[str, Predictor],
        runs: Mapping[str, Records],
        *,
        count: int,
        accelerator: Accelerator,
    ) -> Iterator[Figure]:
        """Draw the boxes that were found on val images, beside the true ones."""
        return box_overlays(runs, data.objects.val, count=count)

    def draw_training(
        self, data: DetectionDataset, task: object, terms: Sequence[Any], *, count: int
    ) -> Iterator[tuple[str, Figure]]:
        """Draw where terms with masks imitate, for each level of the student's pyramid."""
        if any(term.kind.mask for term in terms):
            yield from mask_figures(data.samples("val"), task, count=count)


@dataclass(frozen=True)
class DetectionEvaluation(Evaluation):
    """Detections, by class and by size."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Pascal VOC's numbers too."""
        return (*self.results.rows, *scores.VOC)

    @cached_property
    def classes(self) -> dict[str, list[scores.BoxRow]]:
        """Rows of every run, class by class."""
        return {name: scores.per_class(records) for name, records in self.runs.items()}

    def summary_tables(self) -> list[Table]:
        """Metrics with their intervals, and AP by size."""
        return [*super().summary_tables(), size_table(self.runs)]

    def class_table(self) -> Table:
        """Class by class: one run in full, of several the AP."""
        if len(self.runs) > 1:
            return box_classes_side_by_side(self.classes, self.names)
        (rows,) = self.classes.values()
        return box_class_table(rows, self.first, self.names)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """AP by class and by size."""
        yield "class_ap", class_ap_figure(self.classes, self.names)
        yield "size_ap", size_figure(self.runs)

    def details(self, name: str) -> dict[str, Any]:
        """COCO's numbers of each class."""
        rows = [
            {"name": self.names[row.label], "objects": row.objects, **row.numbers}
            for row in self.classes[name]
        ]
        return {"classes": rows}
