"""Report AP before and after rescoring: overall, by class and by strength of context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from kd.context.rescore import STRENGTHS, Evidence, Setting, combine
from kd.metrics.bootstrap import Interval, percentiles
from kd.metrics.coco_ap import Floats, MeanAP, summary
from kd.metrics.registry import Metric
from kd.report.style import COLOURS, GREY, new_figure
from kd.report.tables import CLEAR, Row, Table

CURVE = (0.0, *STRENGTHS)  # strengths of context at which AP is drawn
_AP = Metric("AP", unit="%", digits=2)
_LISTED = 5  # classes that gained most, and as many that lost most


@dataclass(frozen=True)
class Change:
    """AP before and after rescoring, with the 95 % bootstrap interval of the difference."""

    name: str  # COCO metric or class
    before: float
    after: float
    difference: Interval
    support: int | None = None  # number of objects of a class

    @property
    def row(self) -> Row:
        """Table cells: name, before, after, difference."""
        name = self.name if self.support is None else f"  {self.name} ({self.support})"
        cells = _AP.text(self.before), _AP.text(self.after), _AP.change(self.difference)
        return name, *cells


def changes_of(
    meter: MeanAP, before: Floats, after: Floats, names: Sequence[str], samples: int
) -> tuple[list[Change], list[Change]]:
    """Compare two sets of scores (D,) by a paired bootstrap of `samples` resamples of the images.

    Returns:
        Changes of COCO metrics, and of the AP of each class with objects, largest gain first.
    """
    images = meter.images
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(images, np.full(images, 1 / images), size=samples)
    rows = np.concatenate([np.ones((1, images), np.int64), drawn])  # first each image once
    old = meter.average(meter.match(before), rows)
    new = old if np.array_equal(before, after) else meter.average(meter.match(after), rows)

    def change(name: str, first: Floats, second: Floats, support: int | None = None) -> Change:
        gaps = second - first
        difference = percentiles(float(gaps[0]), gaps[1:])
        return Change(name, float(first[0]), float(second[0]), difference, support)

    numbers, changed = summary(old), summary(new)
    overall = [
        change(name, numbers[name], changed[name])
        for name in numbers
        if not np.isnan(numbers[name][0])
    ]
    old_classes, new_classes = (ap[:, 0].mean(axis=1) for ap in (old, new))  # (R, C)
    support = meter.support[:, 0].sum(axis=1)
    classes = [
        change(names[label], old_classes[:, label], new_classes[:, label], int(support[label]))
        for label in np.flatnonzero(support).tolist()
    ]
    return overall, sorted(classes, key=lambda one: -one.difference.mean)


def changes_json(overall: Sequence[Change], classes: Sequence[Change]) -> dict[str, Any]:
    """Convert changes to JSON values."""
    return {
        "before": {one.name: one.before for one in overall},
        "after": {one.name: one.after for one in overall},
        "difference": {one.name: one.difference.mean for one in overall},
        "interval": {one.name: [*one.difference[1:]] for one in overall},
        "classes": {
            one.name: {
                "support": one.support,
                "before": one.before,
                "after": one.after,
                "interval": [*one.difference[1:]],
            }
            for one in classes
        },
    }


def change_table(
    overall: Sequence[Change], classes: Sequence[Change], title: str, notes: Sequence[str]
) -> Table:
    """Tabulate AP overall and of the classes with the largest gains and losses."""
    gained = [one for one in classes if one.difference.mean > 0][:_LISTED]
    lost = [one for one in reversed(classes) if one.difference.mean < 0][:_LISTED]
    return Table(
        title=title,
        header=("", "before", "after", "after - before"),
        groups=tuple(tuple(one.row for one in group) for group in (overall, gained, lost) if group),
        notes=(CLEAR, "intervals: images resampled; classes: AP (number of objects)", *notes),
    )


def curves_of(meter: MeanAP, known: Evidence, fitted: Sequence[Setting]) -> dict[str, list[float]]:
    """Compute AP on all images at the strengths in `CURVE`, for each rule."""
    alones = dict.fromkeys([None, 0.0, *(setting.alone for setting in fitted)])
    return {
        rule_name(alone): [
            float(summary(meter.average(meter.match(scores, areas=1)))["AP"][0])
            for scores in (combine(known, Setting(a, alone)) for a in CURVE)
        ]
        for alone in alones
    }


def rule_name(alone: float | None) -> str:
    """Name the rescoring rule in tables and figures; for `alone`, see `Setting`."""
    return "plain" if alone is None else f"competing, b = {alone:g}"


def curve_figure(
    curves: Mapping[str, Sequence[float]], fitted: Sequence[Setting], title: str
) -> Figure:
    """Draw AP over `CURVE` for each rule, and mark the fitted settings."""
    figure, axes = new_figure(5.8, 3.8)
    base = 100 * next(iter(curves.values()))[0]
    axes.axhline(base, color=GREY, linewidth=0.9, linestyle="--", label="without context (a = 0)")
    for (name, values), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(CURVE, 100 * np.asarray(values), color=colour, label=name, marker=".")
    for setting in dict.fromkeys(fitted):
        line = curves.get(rule_name(setting.alone), next(iter(curves.values())))
        height = 100 * float(np.interp(setting.strength, CURVE, line))
        label = "fitted (folds)" if setting == fitted[0] else None
        axes.plot(setting.strength, height, "o", color="black", markersize=7, fillstyle="none",
                  label=label)  # fmt: skip
    axes.set(xlabel="strength of context, a", ylabel="AP (%)")
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure
