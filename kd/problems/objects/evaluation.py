"""Results of tasks about objects: tables and figures of object classes and scene labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from accelerate import Accelerator
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kd.errors import UserError
from kd.metrics import classification as scores
from kd.metrics.bootstrap import Interval
from kd.metrics.confusion import ClassRow, Confusion, beyond_prior, confusions, per_class
from kd.metrics.multilabel import average_precision, mean_precisions
from kd.metrics.records import Records, check_arrays, check_same_classes
from kd.metrics.registry import METRICS
from kd.problems.objects import figures, metric
from kd.problems.objects.baselines import ABOUT, EXACT, PRIOR, exact_records, on_data, references
from kd.problems.objects.data import ObjectsDataset
from kd.problems.objects.draw import hidden_scenes
from kd.problems.results import Evaluation, Predictor, Results
from kd.report.tables import OVER_IMAGES, Scored, Table, difference_notes

CHANCE = "random"
# Metrics that `summary.json` also lists for the exact posterior, as `ceiling_<metric>`.
CEILINGS = ("top1", "top5", "nll", "confusable_top1", "confusable_pair_top1", "mean_class_top1",
            "topn_auc")  # fmt: skip


@dataclass(frozen=True)
class ObjectsEvaluation(Evaluation):
    """Tables and figures of predicted object classes: overall, by bin, by class, and confusions."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*(f"top{n}" for n in scores.TOPS),
                *(name for name in self.results.rows if name not in ("top1", "top5")))  # fmt: skip

    @cached_property
    def scored(self) -> list[Scored]:
        """Metrics of each run, then of uniform random guesses, then of each reference."""
        found = super().scored
        runs, known = found[: len(self.runs)], found[len(self.runs) :]
        ours = [name for name in runs[0].values if name not in self.results.own_metrics]
        guesses = {name: scores.chance(self.first, name) for name in ours}
        chance = Scored(CHANCE, {name: n for name, n in guesses.items() if n is not None})
        return [*runs, chance, *known]

    @cached_property
    def classes(self) -> list[ClassRow]:
        """Metrics of the first run, one row per class."""
        return per_class(self.first)

    @cached_property
    def train_counts(self) -> NDArray[np.int64]:
        """Number of usable train objects of each class, (C,)."""
        assert self.opened is not None
        counts: NDArray[np.int64] = self.opened().train_counts()
        return counts

    def notes(self) -> Sequence[str]:
        notes = [ABOUT[name] for name in self.references if name in ABOUT]
        if len(self.runs) > 1:
            return notes
        known = self.references
        return [*notes, *difference_notes(self.results, self.first, known, ("top1", "nll"))]

    def summary_tables(self) -> list[Table]:
        """Tables of all metrics, and of top-1 by hidden fraction and by visible objects."""
        bins = [self.bins_table(kind) for kind in scores.BINS]
        return [*super().summary_tables(), *(table for table in bins if table is not None)]

    def bins_table(self, kind: str) -> Table | None:
        """Table of top-1 accuracy in each bin of `BINS[kind]`; None if all bins are empty."""
        top1, lines = METRICS["top1"], []
        for name in scores.BINS[kind]:
            binned = f"{kind}/{name}_top1"
            if (found := scores.measure(self.first, binned)) is None:
                continue
            objects = np.count_nonzero(~np.isnan(found))
            cells = [scores.bin_title(kind, name).replace("\n", ", "), str(objects)]
            for records in self.runs.values():
                bounds = top1.bounds(scores.interval(records, binned))
                cells.append(f"{top1.text(scores.value(records, binned))} {bounds}".rstrip())
            known = self.references.values()
            lines.append((*cells, *(top1.text(scores.value(one, binned)) for one in known)))
        what = figures.BINNED_BY[kind]
        header = (what, "objects", *self.runs, *self.references)
        title = f"top1 (%) by {what}"
        return Table(title, header, (tuple(lines),), (OVER_IMAGES,)) if lines else None

    def class_table(self) -> Table:
        """Table by class: all metrics and confusions if there is one run, only top-1 if several."""
        names = self.names
        if len(self.runs) > 1:
            columns = [
                {row.label: row.top1 for row in per_class(one)} for one in self.runs.values()
            ]
            cells = [
                (names[row.label], str(row.support), *(_percent(own[row.label]) for own in columns))
                for row in self.classes
            ]
            return Table("top1 (%) by class", ("class", "val objects", *self.runs), (tuple(cells),))
        train = max(int(self.train_counts.sum()), 1)
        val = sum(row.support for row in self.classes)
        lines = [
            (names[row.label], str(row.support), _percent(row.support / val),
             _percent(self.train_counts[row.label] / train), _percent(row.top1), _percent(row.top5),
             ", ".join(f"{names[p.predicted]} {100 * p.fraction:.0f} %" for p in row.instead))
            for row in self.classes
        ]  # fmt: skip
        header = ("class", "val objects", "val (%)", "train (%)", "top1 (%)", "top5 (%)",
                  "predicted instead")  # fmt: skip
        return Table("By class", header, (tuple(lines),))

    def all_tables(self) -> list[Table]:
        tables = super().all_tables()
        if len(self.runs) == 1:
            tables.append(self.confusion_table("Most frequent confusions", confusions(self.first)))
            beyond = beyond_prior(self.first)
            tables.append(self.confusion_table("Confusions beyond the class prior", beyond))
        return tables

    def confusion_table(self, title: str, pairs: Sequence[Confusion], *, most: int = 15) -> Table:
        """Table of the first `most` confusions: hidden class and wrongly predicted class."""
        lines = [
            (self.names[pair.true], self.names[pair.predicted], str(pair.count),
             _percent(pair.fraction), _percent(pair.expected), f"{pair.lift:.1f}")
            for pair in pairs[:most]
        ]  # fmt: skip
        header = ("hidden", "predicted", "objects", "of the class (%)", "prior (%)", "lift")
        note = "lift: how many times more often than predictions drawn from the class prior"
        return Table(title, header, (tuple(lines),), (note,))

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Yield (name, figure); figures by class are drawn only for a single run."""
        runs, known, names = self.runs, self.references, self.names
        yield "top_n", figures.top_n_figure(runs, known)
        yield "hidden_fraction", figures.bins_figure("fraction", runs, known)
        if "visible" in self.first:
            yield "visible_objects", figures.bins_figure("visible", runs, known)
        yield "calibration", figures.reliability_figure(runs)
        val_counts = np.bincount(self.first["labels"], minlength=len(names))
        yield "class_fractions", figures.class_fraction_figure(self.train_counts, val_counts, names)
        if len(runs) > 1:
            return
        # The prior is left out, because it always predicts the same class.
        others = {name: per_class(one) for name, one in known.items() if name != PRIOR}
        yield "per_class", figures.per_class_figure(self.classes, names, others)
        yield "confusions", figures.confusion_figure(self.first, names)
        yield "beyond_prior", figures.beyond_prior_figure(beyond_prior(self.first), names)

    def details(self, name: str) -> dict[str, float]:
        """Top-1 accuracy in each bin, for `metrics.json`; empty for random guesses."""
        records = {**self.runs, **self.references}.get(name)
        if records is None:  # uniform guesses
            return {}
        bins = [f"{kind}/{one}_top1" for kind, found in scores.BINS.items() for one in found]
        values = {binned: scores.value(records, binned) for binned in bins}
        return {binned: number for binned, number in values.items() if number is not None}

    def numbers(self) -> dict[str, Any]:
        found, names = super().numbers(), self.names
        if len(self.runs) > 1:
            return found
        found["classes"] = [
            {"name": names[row.label], "support": row.support, "top1": row.top1,
             "top5": row.top5, "instead": {names[p.predicted]: p.count for p in row.instead}}
            for row in self.classes
        ]  # fmt: skip
        found["confusions"] = [
            {"hidden": names[pair.true], "predicted": names[pair.predicted], "objects": pair.count,
             "fraction": pair.fraction, "prior": pair.expected, "lift": pair.lift}
            for pair in confusions(self.first)
        ]  # fmt: skip
        return found


@dataclass(frozen=True)
class ObjectResults(Results):
    """Results of tasks that predict the class of each object."""

    evaluation_type: ClassVar[type[Evaluation]] = ObjectsEvaluation
    things: ClassVar[str] = "objects"
    ids: ClassVar[str] = "object_ids"
    not_by_id: ClassVar[tuple[str, ...]] = metric.BY_CLASS
    our_rows: ClassVar[tuple[str, ...]] = (
        "top1", "mean_class_top1", "top5", "nll", "ece", "confusable_top1", "confusable_pair_top1",
    )  # fmt: skip
    our_bounded: ClassVar[tuple[str, ...]] = ("top1", "top5", "nll")
    image_name: ClassVar[str] = "hidden_scene"
    drawn_in_training: ClassVar[bool] = True

    check = staticmethod(metric.check)
    check_same_truth = staticmethod(metric.check_same_truth)
    our_value = staticmethod(scores.value)
    our_interval = staticmethod(scores.interval)
    our_difference = staticmethod(scores.difference)

    def about(self, records: Records) -> str:
        images = len(set(records["image_ids"].tolist()))
        return f"{len(records['labels'])} objects in {images} images"

    def references(self, records: Records) -> Mapping[str, Records]:
        """The class prior as a reference prediction, if the records contain the prior."""
        prior = scores.prior_records(records)
        return {} if prior is None else {PRIOR: prior}

    def summary(self, data: ObjectsDataset, records: Records) -> dict[str, float]:
        """Metrics of the exact posterior as `ceiling_<metric>`; only for the embedded scenes."""
        exact = exact_records(data, records)
        if EXACT not in exact:
            return {}
        values = scores.evaluate(exact[EXACT])
        return {f"ceiling_{name}": values[name] for name in CEILINGS if name in values}

    def evaluation(
        self, title: str, runs: Mapping[str, Records], section: Mapping[str, Any],
        opened: Callable[[], ObjectsDataset] | None = None,
    ) -> Evaluation:  # fmt: skip
        """Evaluate runs next to the class prior, co-occurrence and exact posterior."""
        assert opened is not None
        data = opened()
        runs = {name: on_data(data, one, name) for name, one in runs.items()}
        known = references(data, next(iter(runs.values())))
        return ObjectsEvaluation(self, title, section, runs, known, lambda: data)

    def comparison(self, runs: Mapping[str, Records], table: Table) -> Figure:
        return figures.top_n_figure(runs, self.references(next(iter(runs.values()))))

    def training_figures(
        self, data: ObjectsDataset, records: Records, label: str
    ) -> Iterator[tuple[str, Figure]]:
        """Figures for TensorBoard: top-n curves, and top-1 by hidden fraction."""
        exact = {n: r for n, r in exact_records(data, records).items() if n == EXACT}
        known = {**self.references(records), **exact}
        yield "eval/top_n", figures.top_n_figure({"model": records}, known)
        yield "eval/hidden_fraction", figures.bins_figure("fraction", {label: records})

    def draw(
        self, data: ObjectsDataset, predictors: Mapping[str, Predictor],
        runs: Mapping[str, Records], *, count: int, accelerator: Accelerator,
    ) -> Iterator[Figure]:  # fmt: skip
        return hidden_scenes(predictors, data, count=count, accelerator=accelerator)


@dataclass(frozen=True)
class SceneLabelsEvaluation(Evaluation):
    """Tables of scene labels; there are no figures."""

    @cached_property
    def classes(self) -> list[dict[str, Any]]:
        """Name, number of images and AP by run of each class that occurs, most frequent first."""
        support = self.first["present"].sum(axis=0)
        order = [c for c in np.argsort(-support, kind="stable").tolist() if support[c]]
        return [
            {"name": self.names[c], "images": int(support[c]), "AP": {
                name: average_precision(one["log_probs"][:, c], one["present"][:, c])
                for name, one in self.runs.items()
            }}
            for c in order
        ]  # fmt: skip

    def class_table(self) -> Table:
        """Table of the image count and average precision of each class that occurs."""
        ap = METRICS["AP"]
        lines = [
            (row["name"], str(row["images"]), *(ap.text(row["AP"][name]) for name in self.runs))
            for row in self.classes
        ]
        return Table("AP (%) by class", ("class", "images", *self.runs), (tuple(lines),))

    def numbers(self) -> dict[str, Any]:
        return {**super().numbers(), "classes": self.classes}


@dataclass(frozen=True)
class SceneLabelResults(Results):
    """Results of tasks that predict which classes are in each image."""

    evaluation_type: ClassVar[type[Evaluation]] = SceneLabelsEvaluation
    things: ClassVar[str] = "images with labels"
    our_rows: ClassVar[tuple[str, ...]] = ("mAP", "weighted_AP", "micro_AP")

    def check(self, records: Records, where: str) -> None:
        """Raise a UserError, prefixed with `where`, if arrays are missing or differ in shape."""
        check_arrays(records, ("image_ids", "log_probs", "present"), where, " of labels")
        shapes = {name: records[name].shape for name in ("log_probs", "present")}
        if len(set(shapes.values())) > 1 or len(records["image_ids"]) != len(records["present"]):
            raise UserError(f"{where}: arrays of different lengths: {shapes}")

    def check_same_truth(self, records: Records, other: Records, pair: str) -> None:
        """Raise a UserError, prefixed with `pair`, if two runs differ in classes or labels."""
        own, others = records["present"], other["present"]
        check_same_classes(own.shape[1], others.shape[1], pair)
        if wrong := int((own != others).any(axis=1).sum()):
            raise UserError(
                f"{pair} have different labels for {wrong} images; they were evaluated on "
                "different data"
            )

    def our_value(self, records: Records, name: str) -> float | None:
        """Compute a metric; None if no image has a label."""
        if name not in self.our_rows:
            raise UserError(f"metric {name!r}: unknown; there are {', '.join(self.our_rows)}")
        return mean_precisions(records["log_probs"], records["present"]).get(name)

    def our_interval(self, records: Records, name: str) -> Interval | None:
        """Return None: bootstrapping would have to rank all images again for every resample."""
        self.our_value(records, name)
        return None

    def our_difference(self, records: Records, twin: Records, name: str) -> Interval:
        """Metric of `records` minus that of `twin`, with NaN as interval bounds."""
        own, other = (self.our_value(one, name) for one in (records, twin))
        if own is None or other is None:
            raise UserError(f"metric {name!r}: undefined, since no image has labels")
        return Interval(own - other, float("nan"), float("nan"))

    def references(self, records: Records) -> Mapping[str, Records]:
        """The reference `chance`, which gives every class and image the same score."""
        return {"chance": {**records, "log_probs": np.zeros_like(records["log_probs"])}}


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"
