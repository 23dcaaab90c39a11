"""Results of label maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from matplotlib.figure import Figure
from torch import Tensor, nn

from kd.metrics.records import Records
from kd.nn.multi_scale import MultiScale
from kd.problems.images import ImageResults
from kd.problems.results import Evaluation
from kd.problems.segmentation import records as map_records
from kd.problems.segmentation.data import SegmentationDataset
from kd.problems.segmentation.figures import (
    iou_figure,
    map_class_table,
    map_classes_side_by_side,
    pixel_confusion_figure,
)
from kd.report.overlay import overlay_figure
from kd.report.tables import Table
from kd.utils.images import VOID


@dataclass(frozen=True)
class SegmentationResults(ImageResults):
    """Results from the confusion matrix of each image."""

    things: ClassVar[str] = "images"
    not_by_id: ClassVar[tuple[str, ...]] = ("names",)
    our_rows: ClassVar[tuple[str, ...]] = map_records.ROWS
    our_bounded: ClassVar[tuple[str, ...]] = ("mIoU",)
    image_name: ClassVar[str] = "overlay"
    cost_metric: ClassVar[str | None] = "mIoU"

    check = staticmethod(map_records.check)
    check_same_truth = staticmethod(map_records.check_same_truth)
    our_value = staticmethod(map_records.value)
    our_interval = staticmethod(map_records.interval)
    our_difference = staticmethod(map_records.difference)

    def evaluation(
        self, title: str, runs: Mapping[str, Records], section: Mapping[str, Any],
        opened: Callable[[], SegmentationDataset] | None = None,
    ) -> Evaluation:  # fmt: skip
        """Tables and figures; the dataset gives the class names."""
        assert opened is not None
        return SegmentationEvaluation(self, title, section, runs, opened().class_names)

    def overlay(
        self, data: SegmentationDataset, place: int, image: Tensor, predicted: Mapping[str, Tensor]
    ) -> Figure:
        """Label maps over an image; titles give the accuracy."""
        truth = data.val.label_map(place, (image.shape[1], image.shape[2]))
        own = {f"{name}{_accuracy(one, truth)}": one for name, one in predicted.items()}
        return overlay_figure(image, {"truth": truth, **own}, data.class_names)

    def at_scales(self, model: nn.Module, scales: Sequence[float], *, mirror: bool) -> nn.Module:
        """Average the model's scores over scales and mirrored images."""
        return MultiScale(model, scales, mirror=mirror)

    def usual_size(self, data: SegmentationDataset) -> tuple[int, int]:
        """The most frequent height and width of the model's input on val images."""
        samples = data.whole("val", size=data.section.size)
        seen = Counter(samples.seen(own) for own in samples.file_sizes())
        return seen.most_common(1)[0][0]


@dataclass(frozen=True)
class SegmentationEvaluation(Evaluation):
    """Tables and figures of label maps."""

    @cached_property
    def classes(self) -> dict[str, list[map_records.ClassRow]]:
        """Rows of each class, by run."""
        return {name: map_records.per_class(records) for name, records in self.runs.items()}

    def class_table(self) -> Table:
        """All metrics by class for one run, IoU for several."""
        if len(self.runs) > 1:
            return map_classes_side_by_side(self.classes, self.names)
        (rows,) = self.classes.values()
        return map_class_table(rows, self.first, self.names)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """IoU by class, and the confusion matrix of a single run."""
        yield "class_iou", iou_figure(self.classes, self.names)
        if len(self.runs) == 1:
            confusion = self.first["confusion"].sum(axis=0)
            yield "confusions", pixel_confusion_figure(confusion, self.names)

    def details(self, name: str) -> dict[str, Any]:
        """Metrics of each class."""
        names = self.names
        rows = [
            {"name": names[row.label], "pixels": row.fraction, "IoU": row.iou,
             "accuracy": None if row.accuracy != row.accuracy else row.accuracy,
             "instead": {names[c]: fraction for c, fraction in row.instead}}
            for row in self.classes[name]
        ]  # fmt: skip
        return {"classes": rows}


def _accuracy(predicted: Tensor, truth: Tensor) -> str:
    known = truth != VOID
    if not known.any():
        return ""
    return f", {100 * float((predicted[known] == truth[known]).float().mean()):.0f} % right"
