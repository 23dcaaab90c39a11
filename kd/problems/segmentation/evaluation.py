"""Results of label maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import nn

from kd.metrics.records import Records
from kd.nn.multi_scale import MultiScale
from kd.problems.results import Evaluation, Predictor, Results
from kd.problems.segmentation import records as map_records
from kd.problems.segmentation.data import SegmentationDataset
from kd.problems.segmentation.draw import overlays
from kd.problems.segmentation.figures import (
    iou_figure,
    map_class_table,
    map_classes_side_by_side,
    pixel_confusion_figure,
)
from kd.report.tables import Table


@dataclass(frozen=True)
class SegmentationResults(Results):
    """Confusions of the pixels of each image."""

    things: ClassVar[str] = "images"
    not_by_id: ClassVar[tuple[str, ...]] = ("names",)
    our_rows: ClassVar[tuple[str, ...]] = map_records.ROWS
    our_bounded: ClassVar[tuple[str, ...]] = ("mIoU",)
    image_name: ClassVar[str] = "overlay"
    cost_metric: ClassVar[str | None] = "mIoU"
    drawn_from: ClassVar[Literal["models", "records"] | None] = "models"

    check = staticmethod(map_records.check)
    check_same_truth = staticmethod(map_records.check_same_truth)
    our_value = staticmethod(map_records.value)
    our_interval = staticmethod(map_records.interval)
    our_difference = staticmethod(map_records.difference)

    def evaluation(
        self,
        title: str,
        runs: Mapping[str, Records],
        section: Mapping[str, Any],
        opened: Callable[[], SegmentationDataset] | None = None,
    ) -> Evaluation:
        """Tables and figures; the records hold all that is needed but the names."""
        assert opened is not None
        return SegmentationEvaluation(self, title, section, runs, opened().class_names)

    def draw(
        self,
        data: SegmentationDataset,
        predictors: Mapping[str, Predictor],
        runs: Mapping[str, Records],
        *,
        count: int,
        accelerator: Accelerator,
    ) -> Iterator[Figure]:
        """Draw label maps over their images."""
        return overlays(data, predictors, count=count, accelerator=accelerator)

    def at_scales(self, model: nn.Module, scales: Sequence[float], *, mirror: bool) -> nn.Module:
        """A model whose scores are averaged over scales and mirrored images."""
        return MultiScale(model, scales, mirror=mirror)

    def usual_size(self, data: SegmentationDataset) -> tuple[int, int]:
        """Height and width at which most val images are seen."""
        samples = data.whole("val", size=data.section.size)
        seen = Counter(samples.seen(own) for own in samples.file_sizes())
        return seen.most_common(1)[0][0]


@dataclass(frozen=True)
class SegmentationEvaluation(Evaluation):
    """Label maps, class by class."""

    @cached_property
    def classes(self) -> dict[str, list[map_records.ClassRow]]:
        """Rows of every run, class by class."""
        return {name: map_records.per_class(records) for name, records in self.runs.items()}

    def class_table(self) -> Table:
        """Class by class: one run in full, of several the IoU."""
        if len(self.runs) > 1:
            return map_classes_side_by_side(self.classes, self.names)
        (rows,) = self.classes.values()
        return map_class_table(rows, self.first, self.names)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """IoU of the classes, and of a single run the confusions."""
        yield "class_iou", iou_figure(self.classes, self.names)
        if len(self.runs) == 1:
            confusion = self.first["confusion"].sum(axis=0)
            yield "confusions", pixel_confusion_figure(confusion, self.names)

    def details(self, name: str) -> dict[str, Any]:
        """Numbers of each class."""
        names = self.names
        rows = [
            {"name": names[row.label], "pixels": row.share, "IoU": row.iou,
             "accuracy": None if row.accuracy != row.accuracy else row.accuracy,
             "instead": {names[c]: share for c, share in row.instead}}
            for row in self.classes[name]
        ]  # fmt: skip
        return {"classes": rows}
