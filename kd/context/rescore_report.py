"""Report AP before and after rescoring, by class, and over the strength of context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from kd.context.rescore import Evidence, Setting, combine
from kd.metrics.bootstrap import Interval, percentiles
from kd.metrics.coco_ap import Floats, MeanAP, summary
from kd.metrics.registry import Metric
from kd.report.style import COLOURS, GREY, new_figure
from kd.report.tables import CLEAR, Row, Table

_AP = Metric("AP", unit="%", digits=2)
_LISTED = 5  # classes that gained most, and as many that lost most


@dataclass(frozen=True)
class ClassChange:
    """AP of one class."""

    name: str
    support: int
    before: float
    after: float
    difference: Interval


@dataclass(frozen=True)
class Change:
    """AP by name with old and new scores, and differences with 95 % intervals over images."""

    before: dict[str, float]
    after: dict[str, float]
    difference: dict[str, Interval]
    classes: tuple[ClassChange, ...]

    def to_json(self) -> dict[str, Any]:
        """Values for JSON."""
        classes = {
            entry.name: {
                "support": entry.support,
                "before": entry.before,
                "after": entry.after,
                "interval": [entry.difference.low, entry.difference.high],
            }
            for entry in self.classes
        }
        return {
            "before": self.before,
            "after": self.after,
            "difference": {name: gap.mean for name, gap in self.difference.items()},
            "interval": {name: [gap.low, gap.high] for name, gap in self.difference.items()},
            "classes": classes,
        }


def change_of(
    meter: MeanAP,
    before: Floats,
    after: Floats,
    names: Sequence[str],
    *,
    samples: int = 400,
    seed: int = 0,
) -> Change:
    """Evaluate two sets of scores (D,) by a paired percentile bootstrap of `samples` resamples."""
    rows = drawn_images(meter.images, samples, seed)
    old = meter.average(meter.match(before), rows)
    new = old if np.array_equal(before, after) else meter.average(meter.match(after), rows)
    numbers, changed = summary(old), summary(new)
    known = [name for name in numbers if not np.isnan(numbers[name][0])]
    old_classes, new_classes = (ap[:, 0].mean(axis=1) for ap in (old, new))  # (R, C)
    support = meter.support[:, 0].sum(axis=1)
    classes = [
        ClassChange(
            names[label],
            int(support[label]),
            float(old_classes[0, label]),
            float(new_classes[0, label]),
            _interval(new_classes[:, label] - old_classes[:, label]),
        )
        for label in np.flatnonzero(support).tolist()
    ]
    return Change(
        before={name: float(numbers[name][0]) for name in known},
        after={name: float(changed[name][0]) for name in known},
        difference={name: _interval(changed[name] - numbers[name]) for name in known},
        classes=tuple(sorted(classes, key=lambda entry: -entry.difference.mean)),
    )


def drawn_images(images: int, samples: int, seed: int) -> npt.NDArray[np.int64]:
    """Counts of the images, (1 + R, I): first 1 each, then those of R bootstrap resamples."""
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(images, np.full(images, 1 / images), size=samples)
    return np.concatenate([np.ones((1, images), np.int64), drawn])


def change_table(change: Change, title: str, notes: Sequence[str] = ()) -> Table:
    """Tabulate AP, then the classes that gained and lost most."""
    rows = [
        (name, _AP.text(change.before[name]), _AP.text(change.after[name]), _AP.change(gap))
        for name, gap in change.difference.items()
    ]
    moved = [entry for entry in change.classes if entry.difference.mean]
    gained = [entry for entry in moved if entry.difference.mean > 0][:_LISTED]
    lost = [entry for entry in reversed(moved) if entry.difference.mean < 0][:_LISTED]
    groups = [tuple(rows), tuple(map(_class_row, gained)), tuple(map(_class_row, lost))]
    return Table(
        title=title,
        header=("", "before", "after", "after - before"),
        groups=tuple(group for group in groups if group),
        notes=(CLEAR, "intervals: images resampled; classes: AP (number of objects)", *notes),
    )


def curve_of(
    meter: MeanAP, known: Evidence, strengths: Sequence[float], alones: Sequence[float | None]
) -> dict[str, list[float]]:
    """AP on all images at each strength `a`, by rule."""
    return {
        rule_name(alone): [
            float(summary(meter.average(meter.match(scores, areas=1)))["AP"][0])
            for scores in (combine(known, Setting(a, alone)) for a in strengths)
        ]
        for alone in alones
    }


def rule_name(alone: float | None) -> str:
    """Name of a rule in tables and figures."""
    return "plain" if alone is None else f"competing, b = {alone:g}"


def curve_figure(
    strengths: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    fitted: Sequence[Setting],
    title: str,
) -> Figure:
    """Draw AP over `a` (from 0) by rule, and a mark at each setting fitted by the folds."""
    figure, axes = new_figure(5.8, 3.8)
    base = 100 * next(iter(curves.values()))[0]
    axes.axhline(base, color=GREY, linewidth=0.9, linestyle="--", label="without context (a = 0)")
    for (name, values), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(strengths, 100 * np.asarray(values), color=colour, label=name, marker=".")
    for setting in dict.fromkeys(fitted):
        line = curves.get(rule_name(setting.alone), next(iter(curves.values())))
        height = 100 * float(np.interp(setting.strength, strengths, line))
        label = "fitted (folds)" if setting == fitted[0] else None
        axes.plot(setting.strength, height, "o", color="black", markersize=7, fillstyle="none",
                  label=label)  # fmt: skip
    axes.set(xlabel="strength of context, a", ylabel="AP (%)")
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _interval(values: Floats) -> Interval:
    """The interval of an observed value, the first, and its resamples, the others."""
    return percentiles(float(values[0]), values[1:])


def _class_row(entry: ClassChange) -> Row:
    name = f"  {entry.name} ({entry.support})"
    return name, _AP.text(entry.before), _AP.text(entry.after), _AP.change(entry.difference)
