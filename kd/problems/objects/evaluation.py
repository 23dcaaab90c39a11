"""An evaluation's tables, figures and numbers, put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kd.metrics import classification as scores
from kd.metrics.confusion import ClassRow, beyond_prior, confusions, per_class
from kd.metrics.records import Records
from kd.problems.base import Dataset, Metric
from kd.problems.objects import tables
from kd.problems.objects.baselines import ABOUT, PRIOR
from kd.problems.objects.class_figures import (
    beyond_prior_figure,
    class_share_figure,
    confusion_figure,
    per_class_figure,
)
from kd.problems.objects.data import ObjectsDataset
from kd.problems.objects.tables import Scored
from kd.report.curves import reliability_figure, share_hidden_figure, top_n_figure, visible_figure
from kd.report.tables import Table


@dataclass(frozen=True)
class Evaluation:
    """Answers of one or several runs about the same val objects, and what they are held against.

    Args:
        title: Above the first table.
        data: The data set.
        runs: Name -> predictions.
        references: Name -> the same objects as the reference answers them.
    """

    title: str
    data: ObjectsDataset
    runs: Mapping[str, Records]
    references: Mapping[str, Records]
    picture = "hidden_scene"

    @cached_property
    def scored(self) -> list[Scored]:
        """Metrics of runs and references."""
        return tables.scored(self.runs, self.references)

    @cached_property
    def classes(self) -> list[ClassRow]:
        """Class by class, of the first run."""
        return per_class(self._first)

    @cached_property
    def train_counts(self) -> NDArray[np.int64]:
        """(C,) usable objects of each class in the train split."""
        return self.data.train_counts()

    @property
    def _first(self) -> Records:
        return next(iter(self.runs.values()))

    def summary_tables(self) -> list[Table]:
        """Metrics, and top-1 by share hidden and by number of visible objects."""
        notes = [ABOUT[name] for name in self.references if name in ABOUT]
        if len(self.runs) > 1:
            main = tables.side_by_side_table(self.scored, self.title, notes)
        else:
            notes += tables.difference_notes(self._first, self.references)
            main = tables.run_table(self.scored, self.title, notes)
        bins = [tables.bins_table(kind, self.runs, self.references) for kind in scores.BINS]
        return [main, *(table for table in bins if table is not None)]

    def class_table(self) -> Table:
        """Class by class: one run in full, of several the top-1."""
        names = self.data.val.class_names
        if len(self.runs) > 1:
            return tables.classes_side_by_side(self.runs, names)
        return tables.class_table(self.classes, names, self.train_counts)

    def confusion_tables(self) -> list[Table]:
        """One run's most frequent confusions, and those that the class prior does not explain."""
        names, first = self.data.val.class_names, self._first
        return [
            tables.confusion_table(confusions(first), names, "Most frequent confusions"),
            tables.confusion_table(beyond_prior(first), names, "Beyond what the prior would say"),
        ]

    def all_tables(self) -> list[Table]:
        """What `table.md` holds."""
        parts = [*self.summary_tables(), self.class_table()]
        return parts if len(self.runs) > 1 else [*parts, *self.confusion_tables()]

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Every figure with its name; those of classes for a single run only."""
        runs, known = self.runs, self.references
        curves, lines = ({n: scores.curve(r) for n, r in part.items()} for part in (runs, known))
        yield "top_n", top_n_figure(curves, lines)
        yield "share_hidden", share_hidden_figure(runs, known)
        if "visible" in self._first:
            yield "visible_objects", visible_figure(runs, known)
        yield "calibration", reliability_figure(runs)
        names = self.data.val.class_names
        val_counts = np.bincount(self._first["labels"], minlength=len(names))
        yield "class_shares", class_share_figure(self.train_counts, val_counts, names)
        if len(runs) > 1:
            return
        # The prior is right about one class and wrong about all others: no line worth drawing.
        others = {name: per_class(one) for name, one in known.items() if name != PRIOR}
        yield "per_class", per_class_figure(self.classes, names, others)
        yield "confusions", confusion_figure(self._first, names)
        yield "beyond_prior", beyond_prior_figure(beyond_prior(self._first), names)

    def numbers(self) -> dict[str, Any]:
        """Everything in the tables, in full precision, for `metrics.json`."""
        found: dict[str, Any] = {
            "title": self.title,
            "data": self.data.section.model_dump(mode="json"),
            "objects": len(self._first["labels"]),
        }
        for one in self.scored:
            part = "runs" if one.name in self.runs else "references"
            found.setdefault(part, {})[one.name] = {
                **one.plain,
                **self._bins({**self.runs, **self.references}.get(one.name)),
            }
        if len(self.runs) == 1:
            names = self.data.val.class_names
            found["classes"] = [
                {"name": names[row.label], "support": row.support, "top1": row.top1,
                 "top5": row.top5, "instead": {names[p.said]: p.count for p in row.instead}}
                for row in self.classes
            ]  # fmt: skip
            found["confusions"] = [
                {"hidden": names[pair.true], "said": names[pair.said], "objects": pair.count,
                 "share": pair.share, "prior": pair.expected, "lift": pair.lift}
                for pair in confusions(self._first)
            ]  # fmt: skip
        return found

    def _bins(self, records: Records | None) -> dict[str, float]:
        if records is None:  # uniform guesses have none
            return {}
        names = [f"{kind}/{name}_top1" for kind, bins in scores.BINS.items() for name in bins]
        found = {name: scores.value(records, name) for name in names}
        return {name: number for name, number in found.items() if number is not None}


@dataclass(frozen=True)
class Scores:
    """What a task scores that does not ask about objects; it has tables, no figures."""

    title: str
    data: Dataset
    metric: Metric

    def summary_tables(self) -> list[Table]:
        """Every number."""
        return [tables.numbers_table(self.metric.compute(), self.title)]

    def class_table(self) -> Table:
        """Every class that occurs."""
        return tables.scores_table(self.metric.per_class(self.data.class_names))

    def all_tables(self) -> list[Table]:
        """What `table.md` holds."""
        return [*self.summary_tables(), self.class_table()]

    def numbers(self) -> dict[str, Any]:
        """The numbers of the tables, in full precision."""
        rows = self.metric.per_class(self.data.class_names)
        return {
            "title": self.title,
            "data": self.data.section.model_dump(mode="json"),
            **self.metric.compute(),
            "by_class": [{"name": row[0], "support": row[1], "score": row[2]} for row in rows],
        }


def about(data: ObjectsDataset, records: Records) -> str:
    """What the answers are about, for a title."""
    objects, images = len(records["labels"]), len(set(records["image_ids"].tolist()))
    return f"{data.section.name} val: {objects} objects in {images} images"
