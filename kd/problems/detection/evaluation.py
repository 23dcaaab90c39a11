"""Results of detectors: tables and figures of average precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import Tensor

from kd.formats.coco_results import read_detections, read_truth
from kd.metrics.bootstrap import Interval
from kd.metrics.coco_ap import AREAS
from kd.metrics.records import Records
from kd.metrics.registry import METRICS
from kd.problems.detection import scores
from kd.problems.detection.data import DetectionDataset
from kd.problems.detection.draw import found_figures, mask_figures
from kd.problems.results import Evaluation, Predictor, Results
from kd.report.class_bars import NAMED_CLASSES, interval_bars, metric_by_class
from kd.report.style import INK, legend_above, new_figure
from kd.report.tables import OVER_IMAGES, RESAMPLED, Table
from kd.utils.images import read_image

_AP = METRICS["AP"]


@dataclass(frozen=True)
class DetectionEvaluation(Evaluation):
    """Tables and figures that compare the average precision of detectors."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics in the tables, including those of Pascal VOC."""
        return (*self.results.rows, *scores.VOC)

    @cached_property
    def classes(self) -> dict[str, list[scores.BoxRow]]:
        """COCO metrics by run, for each class that has an object."""
        return {name: scores.per_class(records) for name, records in self.runs.items()}

    @property
    def by_class(self) -> dict[str, dict[int, dict[str, float]]]:
        """COCO metrics by run name, class index and metric name."""
        return {
            name: {row.label: row.numbers for row in rows} for name, rows in self.classes.items()
        }

    def summary_tables(self) -> list[Table]:
        return [*super().summary_tables(), self.size_table()]

    def size_table(self) -> Table:
        """Table of AP and object count for small, medium and large objects."""
        lines = []
        for metric, size in scores.SIZES.items():
            objects = int(scores.objects_of(self.first, size).sum())
            cells = [_size_title(size).replace("\n", ", "), str(objects)]
            for records in self.runs.values():
                bounds = _AP.bounds(scores.interval(records, metric))
                cells.append(f"{_AP.text(scores.value(records, metric))} {bounds}".strip())
            lines.append(tuple(cells))
        header = ("size of the object", "objects", *self.runs)
        return Table("AP (%) by size", header, (tuple(lines),), (OVER_IMAGES,))

    def class_table(self) -> Table:
        """Table by class: all COCO metrics if there is one run, only AP if there are several."""
        lines = []
        for row in next(iter(self.classes.values())):
            name, objects = self.names[row.label], str(row.objects)
            if len(self.runs) > 1:
                found = (own[row.label]["AP"] for own in self.by_class.values())
                lines.append((name, objects, *map(_AP.text, found)))
                continue
            ap, *others = (_AP.text(row.numbers.get(metric)) for metric in scores.COCO)
            bounds = _AP.bounds(scores.interval(self.first, f"AP/{row.label}"))
            lines.append((name, objects, ap, bounds, *others))
        if len(self.runs) > 1:
            return Table("AP (%) by class", ("class", "objects", *self.runs), (tuple(lines),))
        ap, *others = scores.COCO
        header = ("class", "objects", ap, "95 % interval", *others)
        notes = ("in percent; empty if a class has no object of a size", RESAMPLED)
        return Table("By class", header, (tuple(lines),), notes)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        yield "class_ap", self.class_figure()
        yield "size_ap", self.size_figure()

    def class_figure(self) -> Figure:
        """Draw AP (bars) and AP50 (lines) of the most frequent classes, and their object counts."""
        rows = next(iter(self.classes.values()))
        drawn = rows[:NAMED_CLASSES]
        heights, lines = (
            {name: [100 * own[row.label][metric] for row in drawn]
             for name, own in self.by_class.items()}
            for metric in ("AP", "AP50")
        )  # fmt: skip
        objects = [row.objects for row in drawn]
        labels = [self.names[row.label] for row in drawn]
        figure, above, below = metric_by_class(heights, labels, objects, (0.7, 1.5 * objects[0]))
        place, width = np.arange(len(drawn)), 0.84 / len(lines)
        for number, half in enumerate(lines.values()):
            middle = place + (number - (len(lines) - 1) / 2) * width
            label = "AP50" if number == len(lines) - 1 else "_"  # "_" is hidden from the legend
            above.hlines(half, middle - 0.45 * width, middle + 0.45 * width, colors=INK,
                         linewidth=1.2, label=label)  # fmt: skip
        above.set(ylabel="AP (%)", ylim=(0, 101))
        legend_above(above)
        left_out = f"the {len(drawn)} most frequent of {len(rows)}"
        below.set(ylabel="objects", xlabel="" if len(drawn) == len(rows) else left_out)
        return figure

    def size_figure(self) -> Figure:
        """Draw the AP of all, small, medium and large objects with 95 % intervals."""
        figure, axes = new_figure(5.6, 3.8)
        sizes = {"AP": "all", **scores.SIZES}
        drawn = [metric for metric in sizes if scores.value(self.first, metric) is not None]
        nothing = Interval(0.0, np.nan, np.nan)
        heights = {
            name: [scores.interval(run, metric) or nothing for metric in drawn]
            for name, run in self.runs.items()
        }
        counts = [int(scores.objects_of(self.first, sizes[metric]).sum()) for metric in drawn]
        labels = [
            f"{_size_title(sizes[metric])}\n{count} objects"
            for metric, count in zip(drawn, counts, strict=True)
        ]
        interval_bars(axes, heights, labels, digits=1)
        axes.set(ylabel="AP (%)")
        legend_above(axes)
        return figure

    def details(self, name: str) -> dict[str, Any]:
        rows = [
            {"name": self.names[row.label], "objects": row.objects, **row.numbers}
            for row in self.classes[name]
        ]
        return {"classes": rows}


@dataclass(frozen=True)
class DetectionResults(Results):
    """Results of detectors, computed from the detections and ground-truth boxes of each image."""

    evaluation_type: ClassVar[type[Evaluation]] = DetectionEvaluation
    things: ClassVar[str] = "images with boxes"
    not_by_id: ClassVar[tuple[str, ...]] = scores.NOT_BY_ID
    our_rows: ClassVar[tuple[str, ...]] = scores.ROWS
    our_bounded: ClassVar[tuple[str, ...]] = ("AP", "AP50")
    image_name: ClassVar[str] = "boxes"
    drawn_from: ClassVar[Literal["models", "records"] | None] = "records"

    check = staticmethod(scores.check)
    check_same_truth = staticmethod(scores.check_same_truth)
    our_value = staticmethod(scores.value)
    our_interval = staticmethod(scores.interval)
    our_difference = staticmethod(scores.difference)

    def about(self, records: Records) -> str:
        objects = int((~records["truth_crowds"]).sum())
        return f"{objects} objects in {len(records['image_ids'])} images"

    def read_file(self, annotations: Path, results: Path) -> Records:
        """Read detections in COCO's results format and their ground-truth annotations."""
        truth = read_truth(annotations)
        found = read_detections(results, truth)
        records = scores.box_records(
            truth.boxes, found.boxes, found.scores, image_ids=truth.image_ids,
            names=truth.class_names, category_ids=truth.category_ids,
            confusable=truth.confusable_groups,
        )  # fmt: skip
        self.check(records, str(annotations))
        return records

    def draw(
        self, data: DetectionDataset, predictors: Mapping[str, Predictor],
        runs: Mapping[str, Records], *, count: int, accelerator: Accelerator,
    ) -> Iterator[Figure]:  # fmt: skip
        """Draw ground truth and recorded detections on val images; no model is run."""
        index = data.val
        places = {image_id: place for place, image_id in enumerate(index.image_ids.tolist())}

        def read(image_id: int) -> Tensor:
            return read_image(index.path(places[image_id]), None)

        return found_figures(runs, read, count=count)

    def draw_training(
        self, data: DetectionDataset, task: object, terms: Sequence[Any], *, count: int
    ) -> Iterator[tuple[str, Figure]]:
        """Draw the imitation masks of each student pyramid level, if a loss term uses masks."""
        if any(term.kind.mask for term in terms):
            yield from mask_figures(data.samples("val"), task, count=count)


def _size_title(size: str) -> str:
    """Title of a size range in `AREAS`, such as "small, below 32 px" (square root of the area)."""
    if size == "all":
        return "all"
    low, high = (round(bound**0.5) for bound in AREAS[size])
    if size == "small":
        return f"small\nbelow {high} px"
    return f"large\nover {low} px" if size == "large" else f"medium\n{low} to {high} px"
