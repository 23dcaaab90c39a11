"""Tables of hidden objects: accuracy by bins and by class, and confusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kd.metrics import classification as scores
from kd.metrics.confusion import ClassRow, Confusion, per_class
from kd.metrics.records import Array, Records
from kd.metrics.registry import METRICS
from kd.report.tables import OVER_IMAGES, Table

Runs = Mapping[str, Records]


def bins_table(kind: str, runs: Runs, references: Runs) -> Table | None:
    """Top-1 by hidden fraction (kind `fraction`) or number of visible objects (`visible`)."""
    first = next(iter(runs.values()))
    top1 = METRICS["top1"]
    lines = []
    for name in scores.BINS[kind]:
        metric = f"{kind}/{name}_top1"
        if (found := scores.measure(first, metric)) is None:
            continue
        cells = [scores.bin_title(kind, name).replace("\n", ", "), str(len(found.values))]
        for records in runs.values():
            bounds = top1.bounds(scores.interval(records, metric))
            cells.append(f"{top1.text(scores.value(records, metric))} {bounds}".rstrip())
        cells += [top1.text(scores.value(one, metric)) for one in references.values()]
        lines.append(tuple(cells))
    if not lines:
        return None
    what = "fraction of the image hidden" if kind == "fraction" else "other objects in the image"
    header = (what, "objects", *runs, *references)
    return Table(f"top1 (%) by {what}", header, (tuple(lines),), (OVER_IMAGES,))


def classes_side_by_side(runs: Runs, names: Sequence[str]) -> Table:
    """Top-1 of every class that occurs, with a column for each run."""
    columns = [{row.label: row for row in per_class(records)} for records in runs.values()]
    lines = [
        (names[label], str(row.support), *(f"{100 * column[label].top1:.1f}" for column in columns))
        for label, row in columns[0].items()
    ]
    return Table("top1 (%) by class", ("class", "val objects", *runs), (tuple(lines),))


def class_table(rows: Sequence[ClassRow], names: Sequence[str], train_counts: Array) -> Table:
    """Objects, accuracy and the most frequent wrong predictions of every class that occurs.

    Args:
        rows: From `per_class`.
        names: C names.
        train_counts: Train objects by class, (C,).
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
            ", ".join(f"{names[p.predicted]} {100 * p.fraction:.0f} %" for p in row.instead),
        )
        for row in rows
    ]
    header = ("class", "val objects", "val (%)", "train (%)", "top1 (%)",
              "top5 (%)", "predicted instead")  # fmt: skip
    return Table("By class", header, (tuple(lines),))


def confusion_table(
    pairs: Sequence[Confusion], names: Sequence[str], title: str, *, most: int = 15
) -> Table:
    """The first `most` pairs of a hidden class and a class predicted in its place."""
    lines = [
        (names[pair.true], names[pair.predicted], str(pair.count), f"{100 * pair.fraction:.1f}",
         f"{100 * pair.expected:.1f}", f"{pair.lift:.1f}")
        for pair in list(pairs)[:most]
    ]  # fmt: skip
    header = ("hidden", "predicted", "objects", "of the class (%)", "prior (%)", "lift")
    note = "lift: how many times more often than predictions drawn from the class prior"
    return Table(title, header, (tuple(lines),), (note,))
