"""Results of segmentation models: tables and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from kd.metrics.registry import METRICS
from kd.nn.segmentation import MultiScale
from kd.problems.images import ImageResults
from kd.problems.objects.figures import matrix_figure
from kd.problems.results import Evaluation
from kd.problems.segmentation import metric
from kd.problems.segmentation.data import SegmentationDataset
from kd.report.class_bars import NAMED_CLASSES, metric_by_class
from kd.report.overlay import overlay_figure
from kd.report.style import legend_above
from kd.report.tables import RESAMPLED, Table
from kd.utils.images import VOID


@dataclass(frozen=True)
class SegmentationEvaluation(Evaluation):
    """Tables and figures that compare segmentation models."""

    @cached_property
    def classes(self) -> dict[str, list[metric.ClassRow]]:
        """For each run, the metrics of every class that occurs in ground truth or predictions."""
        return {name: metric.per_class(records) for name, records in self.runs.items()}

    @property
    def classes_with_pixels(self) -> list[metric.ClassRow]:
        """The first run's metrics of the classes that occur in the ground truth."""
        return [row for row in next(iter(self.classes.values())) if row.fraction > 0]

    @property
    def ious(self) -> dict[str, dict[int, float]]:
        """IoU by run name and class index."""
        return {name: {row.label: row.iou for row in rows} for name, rows in self.classes.items()}

    def class_table(self) -> Table:
        """Table by class: all metrics and confusions if there is one run, only IoU if several."""
        names, lines = self.names, []
        if len(self.runs) > 1:
            for row in self.classes_with_pixels:
                ious = (_percent(own.get(row.label, np.nan)) for own in self.ious.values())
                lines.append((names[row.label], _percent(row.fraction, 2), *ious))
            return Table("IoU (%) by class", ("class", "pixels (%)", *self.runs), (tuple(lines),))
        for row in next(iter(self.classes.values())):
            bounds = METRICS["mIoU"].bounds(metric.interval(self.first, f"iou/{row.label}"))
            instead = ", ".join(f"{names[c]} {100 * part:.0f} %" for c, part in row.instead)
            lines.append((names[row.label], _percent(row.fraction, 2), _percent(row.iou), bounds,
                          _percent(row.accuracy), instead))  # fmt: skip
        header = ("class", "pixels (%)", "IoU (%)", "95 % interval", "accuracy (%)",
                  "predicted instead")  # fmt: skip
        notes = ("pixels: fraction of the scored pixels", RESAMPLED)
        return Table("By class", header, (tuple(lines),), notes)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        yield "class_iou", self.iou_figure()
        if len(self.runs) == 1:
            yield "confusions", self.confusion_figure()

    def iou_figure(self) -> Figure:
        """Draw the IoU of the most frequent classes, and each class's fraction of the pixels."""
        drawn = self.classes_with_pixels[:NAMED_CLASSES]
        heights = {
            name: [100 * own.get(row.label, 0.0) for row in drawn]
            for name, own in self.ious.items()
        }
        pixels = [100 * row.fraction for row in drawn]
        limits = (float(10.0 ** np.floor(np.log10(pixels[-1]))), 150.0)
        labels = [self.names[row.label] for row in drawn]
        figure, above, below = metric_by_class(heights, labels, pixels, limits)
        above.set(ylabel="IoU (%)", ylim=(0, 100))
        below.set_ylabel("pixels (%)")
        legend_above(above)
        return figure

    def confusion_figure(self) -> Figure:
        """Draw the first run's confusion matrix of the most frequent classes, in percent."""
        matrix = self.first["confusion"].sum(axis=0)
        percent = 100 * matrix.sum(axis=1) / matrix.sum()
        rows = [f"{name} ({part:.2g} %)" for name, part in zip(self.names, percent, strict=True)]
        figure = matrix_figure(matrix, self.names, rows, most=30)
        figure.axes[0].set_ylabel("true class (fraction of the pixels)")
        return figure

    def details(self, name: str) -> dict[str, Any]:
        names = self.names
        rows = [
            {"name": names[row.label], "pixels": row.fraction, "IoU": row.iou,
             "accuracy": None if row.accuracy != row.accuracy else row.accuracy,
             "instead": {names[c]: fraction for c, fraction in row.instead}}
            for row in self.classes[name]
        ]  # fmt: skip
        return {"classes": rows}


@dataclass(frozen=True)
class SegmentationResults(ImageResults):
    """Results of segmentation models, computed from each image's confusion matrix."""

    evaluation_type: ClassVar[type[Evaluation]] = SegmentationEvaluation
    things: ClassVar[str] = "images"
    not_by_id: ClassVar[tuple[str, ...]] = ("names",)
    our_rows: ClassVar[tuple[str, ...]] = metric.ROWS
    our_bounded: ClassVar[tuple[str, ...]] = ("mIoU",)
    image_name: ClassVar[str] = "overlay"
    cost_metric: ClassVar[str | None] = "mIoU"

    check = staticmethod(metric.check)
    check_same_truth = staticmethod(metric.check_same_truth)
    our_value = staticmethod(metric.value)
    our_interval = staticmethod(metric.interval)
    our_difference = staticmethod(metric.difference)

    def overlay(
        self, data: SegmentationDataset, place: int, image: Tensor, predicted: Mapping[str, Tensor]
    ) -> Figure:
        """Draw label maps over an image; panel titles contain the pixel accuracy."""
        truth = data.val.label_map(place, (image.shape[1], image.shape[2]))
        own = {f"{name}{_accuracy(one, truth)}": one for name, one in predicted.items()}
        return overlay_figure(image, {"truth": truth, **own}, data.class_names)

    def at_scales(self, model: nn.Module, scales: Sequence[float], *, mirror: bool) -> nn.Module:
        return MultiScale(model, scales, mirror=mirror)

    def usual_size(self, data: SegmentationDataset) -> tuple[int, int]:
        """Most frequent (height, width) of the model's input on val images."""
        samples = data.whole("val", size=data.section.size)
        seen = Counter(samples.seen(own) for own in samples.file_sizes())
        return seen.most_common(1)[0][0]


def _accuracy(predicted: Tensor, truth: Tensor) -> str:
    known = truth != VOID
    if not known.any():
        return ""
    return f", {100 * float((predicted[known] == truth[known]).float().mean()):.0f} % right"


def _percent(number: float, digits: int = 1) -> str:
    return "" if np.isnan(number) else f"{100 * number:.{digits}f}"
