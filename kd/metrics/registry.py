"""Declare metrics: name, unit, direction and format. This module does not import torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kd.errors import UserError
from kd.registry import resolve

if TYPE_CHECKING:
    from kd.metrics.bootstrap import Interval
    from kd.metrics.records import Array, Records


@dataclass(frozen=True)
class Metric:
    """Declaration of a metric of predictions.

    To add a metric, define an instance with `per_item` and list it in a recipe as `metrics:
    [package.module:ATTRIBUTE]`. Its value is the mean of `per_item`; intervals and differences
    resample images:

        def brier(records):  # (K,) of the K hidden objects
            errors = np.exp(records["log_probs"])
            errors[np.arange(len(errors)), records["labels"]] -= 1
            return (errors**2).sum(axis=1)

        BRIER = Metric("brier", "squared error of the probabilities", per_item=brier,
                       higher_is_better=False)

    Attributes:
        name: Name in tables and in `summary.json`.
        help: Description in one line.
        unit: `%` for a fraction that is displayed in percent. Other units, such as `nats` or `px`,
            do not change the displayed value.
        higher_is_better: Whether larger values are better.
        digits: Decimal places; None = 1 for percent, otherwise 3.
        per_item: Maps records to one value per object or image, (N,); NaN values are excluded.
    """

    name: str
    help: str = ""
    unit: str = ""
    higher_is_better: bool = True
    digits: int | None = None
    per_item: Callable[[Records], Array] | None = None

    @property
    def label(self) -> str:
        """The name followed by the unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def scale(self) -> int:
        """Factor from a value to the displayed number: 100 for percent, otherwise 1."""
        return 100 if self.unit == "%" else 1

    def text(self, value: float | None, sign: str = "") -> str:
        """Format a value without its unit; empty for None."""
        if value is None:
            return ""
        digits = self.digits if self.digits is not None else 1 if self.unit == "%" else 3
        return f"{self.scale * value:{sign}.{digits}f}"

    def bounds(self, interval: Interval | None) -> str:
        """Format `[low, high]`; empty if the bounds are unknown."""
        if interval is None or interval.low != interval.low:  # NaN
            return ""
        return f"[{self.text(interval.low)}, {self.text(interval.high)}]"

    def change(self, difference: Interval) -> str:
        """Format a signed difference and its bounds, with a star if they exclude zero."""
        mean, low, high = (self.text(bound, "+z") for bound in difference)
        if difference.low != difference.low:  # NaN
            return f"{mean} "
        return f"{mean} [{low}, {high}]{'*' if difference.clear_of_zero else ' '}"


def _fractions(**helps: str) -> list[Metric]:
    return [Metric(name, text, "%") for name, text in helps.items()]


_LISTED = [
    *(Metric(f"top{n}", f"true class among the {n} likeliest", "%") for n in (1, 3, 5, 10, 20)),
    Metric("mean_class_top1", "mean over classes of top1", "%"),
    Metric("topn_auc", "area under the curve of top<n> over n, 0.5 by chance"),
    Metric("nll", "negative log-likelihood of the true class", "nats", higher_is_better=False),
    Metric("ece", "expected calibration error, 15 bins (Guo 2017)", higher_is_better=False),
    *_fractions(
        confusable_top1="top1 of objects of confusable classes",
        confusable_pair_top1="top1 among the classes of the object's confusable group",
        mAP="mean over classes of average precision, of the classes in an image",
        weighted_AP="mAP weighted by the number of images of each class",
        micro_AP="average precision of all pairs of image and class",
        mIoU="mean intersection over union of the classes",
        mean_accuracy="mean over classes of the fraction of correct pixels",
        pixel_accuracy="fraction of correct pixels",
        AP="COCO: mean over overlaps of 0.5 to 0.95",
        AP50="COCO: at an overlap of 0.5",
        AP75="COCO: at an overlap of 0.75",
        AP_small="COCO: objects below 32 x 32 pixels",
        AP_medium="COCO: objects of 32 x 32 to 96 x 96 pixels",
        AP_large="COCO: objects above 96 x 96 pixels",
        AR1="COCO: recall with 1 detection per class and image",
        AR10="COCO: recall with 10 detections per class and image",
        AR100="COCO: recall with 100 detections per class and image",
        AR_small="COCO: AR100 of objects below 32 x 32 pixels",
        AR_medium="COCO: AR100 of objects of 32 x 32 to 96 x 96 pixels",
        AR_large="COCO: AR100 of objects above 96 x 96 pixels",
        confusable_AP50="AP50 of confusable classes",
        VOC07_mAP="Pascal VOC 2007: mean AP at 11 recalls, overlap 0.5",
        VOC_mAP="Pascal VOC since 2010: mean AP, overlap 0.5",
        KITTI_easy="KITTI: mean AP at 40 recalls, easy objects",
        KITTI_moderate="KITTI: mean AP at 40 recalls, moderate objects",
        KITTI_hard="KITTI: mean AP at 40 recalls, hard objects",
    ),
    Metric("KLD", "KL divergence of the fixation density from the map", "nats",
           higher_is_better=False),
    Metric("CC", "correlation of the map with the fixation density"),
    Metric("SIM", "overlap of the map with the fixation density"),
    Metric("NSS", "mean of the standardised map at fixations"),
    Metric("AUC_Judd", "area under the ROC curve of fixated against all other pixels"),
    Metric("sAUC", "area under the ROC curve of fixations against those on other images"),
    Metric("IG", "information gain over the centre prior", "bits"),
]  # fmt: skip
METRICS: dict[str, Metric] = {metric.name: metric for metric in _LISTED}
# Pattern of names with a number, bin or class -> the metric with the same unit and direction.
_FAMILIES = {
    r"top[1-9]\d*": "top1",
    r"(fraction|visible)/\w.*_top1": "top1",
    r"iou/.+": "mIoU",
    r"confusable_A\w+": "AP",
    r"KITTI11_\w+": "KITTI_easy",
    r"(A[PR]|VOC|KITTI)\w*/.+": "AP",
}


def metric_named(name: str, own: Mapping[str, Metric] | None = None) -> Metric:
    """Return the declaration of a metric, first from `own`; unknown names become plain numbers.

    `name` may include a class or bin, such as `iou/car`.
    """
    if own and name in own:
        return own[name]
    if name in METRICS:
        return METRICS[name]
    for pattern, family in _FAMILIES.items():
        if re.fullmatch(pattern, name):
            return replace(METRICS[family], name=name, help="")
    return Metric(name)


def direction_note(metrics: Iterable[Metric]) -> list[str]:
    """Return a note that lists the metrics where lower is better; empty if there are none."""
    lower = dict.fromkeys(metric.name for metric in metrics if not metric.higher_is_better)
    return [f"lower is better: {', '.join(lower)}"] if lower else []


def load_metrics(paths: Iterable[str]) -> dict[str, Metric]:
    """Import the user's metrics from `package.module:ATTRIBUTE` paths and return them by name.

    Raises:
        UserError: A path cannot be imported or is not a `Metric` with `per_item`, or the name of a
            metric exists already.
    """
    found: dict[str, Metric] = {}
    for path in paths:
        metric = resolve(METRICS, path, what="metric")
        if not isinstance(metric, Metric) or metric.per_item is None:
            raise UserError(f"metrics: {path}: expected a Metric with per_item, got {metric!r:.60}")
        if metric.name in found or metric_named(metric.name) != Metric(metric.name):
            raise UserError(f"metrics: {path}: another metric is called {metric.name!r}")
        found[metric.name] = metric
    return found
