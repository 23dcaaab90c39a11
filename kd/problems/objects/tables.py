"""Tables of an evaluation: runs against what they are held against, by bins, by class, confusions.

What a run is held against is its *references*: name -> records of the same objects, as the class
prior, the co-occurrence of classes or the exact posterior answer them. Uniform guesses, `random`,
need no records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kd.metrics import classification as scores
from kd.metrics.bootstrap import Interval
from kd.metrics.confusion import ClassRow, Confusion, per_class
from kd.metrics.records import Array, Records
from kd.problems.records import kind_of
from kd.report.tables import (
    CLEAR,
    Table,
    bounds_cell,
    compare,
    difference_cell,
    interval_of,
    label_of,
    number_cell,
)

COLUMNS = (
    *(f"top{n}" for n in scores.TOPS),
    "mean_class_top1",
    "nll",
    "ece",
    "confusable_top1",
    "confusable_pair_top1",
)
RANDOM = "random"
# Side by side there is room for the bounds of these.
_BOUNDED = ("top1", "top5", "nll", "mIoU", "AP", "AP50", "KLD", "CC", "NSS", "sAUC")
_COUNTS = ("count", "classes")
_OVER_IMAGES = "[low, high]: 95 % interval, images drawn again"

Runs = Mapping[str, Records]


@dataclass(frozen=True)
class Scored:
    """The metrics of one run or reference."""

    name: str
    values: dict[str, float]
    intervals: dict[str, Interval] = field(default_factory=dict)

    @property
    def plain(self) -> dict[str, Any]:
        """For `metrics.json`."""
        return {
            **self.values,
            "intervals": {name: [one.low, one.high] for name, one in self.intervals.items()},
        }


def scored_run(
    name: str, records: Records, metrics: Sequence[str], *, intervals: bool = True
) -> Scored:
    """Those metrics of a run or reference that it has, of whatever kind its answers are."""
    kind = kind_of(records)
    found = {metric: kind.value(records, metric) for metric in metrics}
    values = {metric: number for metric, number in found.items() if number is not None}
    bounds = {metric: interval_of(metric, records) for metric in values} if intervals else {}
    return Scored(name, values, {metric: one for metric, one in bounds.items() if one is not None})


def scored(runs: Runs, references: Runs) -> list[Scored]:
    """Metrics of every run with intervals, then of uniform guesses and of every reference."""
    first = next(iter(runs.values()))
    names = [name for name in COLUMNS if scores.value(first, name) is not None]

    guesses = {name: scores.chance(first, name) for name in names}
    return [
        *(scored_run(name, run, names) for name, run in runs.items()),
        Scored(RANDOM, {name: n for name, n in guesses.items() if n is not None}),
        *(scored_run(name, one, names, intervals=False) for name, one in references.items()),
    ]


def run_table(rows: Sequence[Scored], title: str, notes: Sequence[str] = ()) -> Table:
    """One run: a line for each metric, with its interval, and a column for each reference."""
    run, *references = rows
    lines = []
    for name, number in run.values.items():
        cells = [
            label_of(name),
            number_cell(name, number),
            bounds_cell(name, run.intervals.get(name)),
        ]
        cells += [number_cell(name, one.values.get(name)) for one in references]
        lines.append(tuple(cells))
    header = ("metric", run.name, "95 % interval", *(one.name for one in references))
    over = "95 % interval: images drawn again"
    return Table(title, header, (tuple(lines),), (over, *notes))


def side_by_side_table(rows: Sequence[Scored], title: str, notes: Sequence[str] = ()) -> Table:
    """Several runs: a line for each, and below them a line for each reference."""
    names = list(rows[0].values)
    lines = []
    for one in rows:
        cells = [one.name]
        for name in names:
            bounds = bounds_cell(name, one.intervals.get(name)) if name in _BOUNDED else ""
            cells.append(" ".join(filter(None, [number_cell(name, one.values.get(name)), bounds])))
        lines.append(tuple(cells))
    runs = sum(bool(one.intervals) for one in rows)
    groups = tuple(group for group in (tuple(lines[:runs]), tuple(lines[runs:])) if group)
    units = "accuracies in percent, nll in nats" if "nll" in names else "in percent"
    units = "KLD in nats, IG in bits" if "KLD" in names else units
    return Table(title, ("run", *names), groups, (units, _OVER_IMAGES, *notes))


def difference_notes(records: Records, references: Runs) -> list[str]:
    """How far a run is from each reference on the same images, with 95 % intervals."""
    notes = []
    for name, reference in references.items():
        parts = []
        for metric in ("top1", "nll"):
            found = compare(metric, "run", [records], [reference]).difference
            assert found is not None
            parts.append(f"{label_of(metric)} {difference_cell(metric, found).strip()}")
        notes.append(f"less the {name}: {', '.join(parts)}")
    return [*notes, CLEAR] if notes else []


def bins_table(kind: str, runs: Runs, references: Runs) -> Table | None:
    """Top-1 by share hidden or by number of visible objects; None where that is not known.

    Args:
        kind: `share` or `visible`.
        runs: Name -> predictions of the same objects.
        references: What they are held against.
    """
    first = next(iter(runs.values()))
    lines = []
    for name in scores.BINS[kind]:
        metric = f"{kind}/{name}_top1"
        if (found := scores.measure(first, metric)) is None:
            continue
        cells = [scores.bin_title(kind, name).replace("\n", ", "), str(len(found.values))]
        for records in runs.values():
            bounds = bounds_cell(metric, interval_of(metric, records))
            cells.append(f"{number_cell(metric, scores.value(records, metric))} {bounds}".rstrip())
        cells += [number_cell(metric, scores.value(one, metric)) for one in references.values()]
        lines.append(tuple(cells))
    if not lines:
        return None
    what = {"share": "share of the picture hidden", "visible": "other objects in the picture"}[kind]
    header = (what, "objects", *runs, *references)
    return Table(f"top1 (%) by {what}", header, (tuple(lines),), (_OVER_IMAGES,))


def classes_side_by_side(runs: Runs, names: Sequence[str]) -> Table:
    """Top-1 of every class that occurs, a column for each run.

    Args:
        runs: Name -> predictions of the same objects.
        names: C names.
    """
    columns = [{row.label: row for row in per_class(records)} for records in runs.values()]
    lines = [
        (names[c], str(row.support), *(f"{100 * column[c].top1:.1f}" for column in columns))
        for c, row in columns[0].items()
    ]
    return Table("top1 (%) by class", ("class", "val objects", *runs), (tuple(lines),))


def class_table(rows: Sequence[ClassRow], names: Sequence[str], train_counts: Array) -> Table:
    """Every class that occurs: objects, accuracy, and what is said instead.

    Args:
        rows: From `per_class`.
        names: C names.
        train_counts: (C,) objects of each class among the training objects.
    """
    train, val = max(int(np.sum(train_counts)), 1), sum(row.support for row in rows)
    lines = [
        (
            names[row.label],
            str(row.support),
            f"{100 * row.support / val:.1f}",
            f"{100 * train_counts[row.label] / train:.1f}",
            f"{100 * row.top1:.1f}",
            f"{100 * row.top5:.1f}",
            ", ".join(f"{names[p.said]} {100 * p.share:.0f} %" for p in row.instead),
        )
        for row in rows
    ]
    header = ("class", "val objects", "share of val (%)", "share of train (%)", "top1 (%)",
              "top5 (%)", "says instead")  # fmt: skip
    return Table("By class", header, (tuple(lines),))


def confusion_table(
    pairs: Sequence[Confusion], names: Sequence[str], title: str, *, most: int = 15
) -> Table:
    """Pairs of a hidden class and what is said instead.

    Args:
        pairs: In the order of the lines.
        names: C names.
        title: Above the table.
        most: Lines.
    """
    lines = [
        (
            names[pair.true],
            names[pair.said],
            str(pair.count),
            f"{100 * pair.share:.1f}",
            f"{100 * pair.expected:.1f}",
            f"{pair.lift:.1f}",
        )
        for pair in list(pairs)[:most]
    ]
    header = ("hidden", "said", "objects", "share of the class (%)", "prior (%)", "lift")
    note = "lift: how many times more often than answers drawn from the class prior"
    return Table(title, header, (tuple(lines),), (note,))


def numbers_table(numbers: Mapping[str, float], title: str) -> Table:
    """A metric's numbers as they are, `chance_<name>` in a column of its own."""
    lines = [
        (
            label_of(name),
            number_cell(name, number),
            number_cell(name, numbers.get(f"chance_{name}")),
        )
        for name, number in numbers.items()
        if not name.startswith("chance_") and name not in _COUNTS
    ]
    counts = [f"{name}: {numbers[name]:.0f}" for name in _COUNTS if name in numbers]
    return Table(title, ("metric", "model", "chance"), (tuple(lines),), tuple(counts))


def scores_table(rows: Sequence[tuple[str, int, float]]) -> Table:
    """Name, support and score of each class."""
    lines = [(name, str(support), f"{100 * score:.1f}") for name, support, score in rows]
    return Table("By class", ("class", "support", "score (%)"), (tuple(lines),))
