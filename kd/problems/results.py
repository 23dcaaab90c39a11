"""Results of a task: checks, scores, comparisons, tables and figures of its predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from kd.data.loader import Sample, to_device
from kd.errors import UserError
from kd.metrics.bootstrap import Interval, bootstrap, paired_bootstrap
from kd.metrics.records import Records
from kd.metrics.registry import Metric, metric_named
from kd.nn.freeze import evaluating
from kd.report.comparison import comparison_figure
from kd.report.tables import Scored, Table, run_table, score, side_by_side_table


@dataclass(frozen=True)
class Results(ABC):
    """Checks, scores, tables and figures of the predictions of one kind of task.

    Methods that begin with `our` serve the metrics of `kd.metrics.registry`; the public methods
    of the same names also take the user's metrics.

    Attributes:
        own_metrics: The user's metrics by name.
        things: Scored things in the plural: `objects`.
        ids: The array of ids, by which rows are sorted.
        not_by_id: Arrays without a row for each id.
        our_rows: Default metrics of tables.
        our_bounded: Metrics with intervals in tables of several runs.
        image_name: Stem of the files of single images.
        drawn_in_training: Whether images are drawn at the end of a run.
        cost_metric: The metric that is drawn against the cost of networks, if any.
        drawn_from: Source of the images of several runs side by side, if they are drawn.
    """

    own_metrics: Mapping[str, Metric] = field(default_factory=dict)
    things: ClassVar[str]
    ids: ClassVar[str] = "image_ids"
    not_by_id: ClassVar[tuple[str, ...]] = ()
    our_rows: ClassVar[tuple[str, ...]]
    our_bounded: ClassVar[tuple[str, ...]] = ()
    image_name: ClassVar[str] = "image"
    drawn_in_training: ClassVar[bool] = False
    cost_metric: ClassVar[str | None] = None
    drawn_from: ClassVar[Literal["models", "records"] | None] = None

    # Records

    @abstractmethod
    def check(self, records: Records, where: str) -> None:
        """Raise a `UserError` if records are malformed; its message begins with `where`."""

    @abstractmethod
    def check_same_truth(self, records: Records, other: Records, pair: str) -> None:
        """Raise a `UserError` if ground truths of the same ids differ; `pair` names both."""

    def check_same(self, records: Records, other: Records, pair: str) -> None:
        """Raise a `UserError` if ids or ground truths differ; `pair` names both."""
        ids, others = records[self.ids], other[self.ids]
        if not np.array_equal(ids, others):
            common = len(np.intersect1d(ids, others))
            raise UserError(
                f"{pair} scored different {self.things} ({len(ids)} and {len(others)}, {common} in "
                "both): other data, another split or other limits of size; evaluate both on the "
                "same"
            )
        self.check_same_truth(records, other, pair)

    def named(self, records: Records, names: Sequence[str] | None) -> Records:
        """Add the class names, if `not_by_id` lists `names`."""
        wanted = names is not None and "names" in self.not_by_id
        return {**records, "names": np.array(names)} if wanted else records

    def about(self, records: Records) -> str:
        """Number of scored things, for titles."""
        return f"{len(records[self.ids])} {self.things}"

    def references(self, records: Records) -> Mapping[str, Records]:
        """Reference predictions by name that follow from the records alone."""
        return {}

    def notes(self, records: Records) -> Sequence[str]:
        """Notes about these references, below tables."""
        return ()

    # Metrics

    @abstractmethod
    def our_value(self, records: Records, name: str) -> float | None:
        """A registered metric; None if no row counts for it."""

    @abstractmethod
    def our_interval(self, records: Records, name: str) -> Interval | None:
        """A registered metric with its 95 % interval over images, if there is one."""

    @abstractmethod
    def our_difference(self, records: Records, twin: Records, name: str) -> Interval:
        """A registered metric minus a twin's; NaN bounds where there are none."""

    @property
    def rows(self) -> tuple[str, ...]:
        """Default metrics of tables: registered ones, then the user's."""
        return (*self.our_rows, *self.own_metrics)

    @property
    def bounded(self) -> tuple[str, ...]:
        """Metrics with intervals in tables of several runs."""
        return (*self.our_bounded, *self.own_metrics)

    def metric(self, name: str) -> Metric:
        """The declaration of a metric."""
        return metric_named(name, self.own_metrics)

    def value(self, records: Records, name: str) -> float | None:
        """A metric; None if no row counts for it. Raises a `UserError` if it is unknown."""
        if name not in self.own_metrics:
            return self.our_value(records, name)
        values = self._per_item(records, name)
        there = ~np.isnan(values)
        return float(values[there].mean()) if there.any() else None

    def interval(self, records: Records, name: str) -> Interval | None:
        """A metric with its 95 % interval over images, if there is one."""
        if name not in self.own_metrics:
            return self.our_interval(records, name)
        values = self._per_item(records, name)
        there = ~np.isnan(values)
        return bootstrap(values[there], records["image_ids"][there]) if there.any() else None

    def difference(self, records: Records, twin: Records, name: str) -> Interval:
        """A metric minus a twin's on the same images; NaN bounds where there are none."""
        if name not in self.own_metrics:
            return self.our_difference(records, twin, name)
        after, before = (self._per_item(one, name) for one in (records, twin))
        both = ~np.isnan(after) & ~np.isnan(before)
        return paired_bootstrap(before[both], after[both], records["image_ids"][both])

    def own_values(self, records: Records) -> dict[str, float]:
        """The user's metrics, without those for which no row counts."""
        found = {name: self.value(records, name) for name in self.own_metrics}
        return {name: number for name, number in found.items() if number is not None}

    def _per_item(self, records: Records, name: str) -> NDArray[np.float64]:
        per_item = self.own_metrics[name].per_item
        assert per_item is not None  # `load_metrics` has checked it
        values, count = np.asarray(per_item(records), np.float64), len(records[self.ids])
        if values.shape != (count,):
            raise UserError(
                f"metric {name!r}: per_item gave {values.shape} for {count} {self.things}, "
                f"expected ({count},)"
            )
        return values

    def read_file(self, annotations: Path, results: Path) -> Records:
        """Read a results file in COCO's format; a `UserError` for tasks without such files."""
        raise UserError(f"{results}: results files have boxes, not {self.things}")

    # Reports

    def summary(self, data: Any, records: Records) -> dict[str, float]:
        """References in `summary.json`: metrics prefixed by `prior_`, `ceiling_`, ..."""
        return {}

    @abstractmethod
    def evaluation(
        self,
        title: str,
        runs: Mapping[str, Records],
        section: Mapping[str, Any],
        opened: Callable[[], Any] | None = None,
    ) -> Evaluation:
        """Tables and figures of one or several runs.

        Args:
            title: Title of the first table.
            runs: Name -> predictions on the same val split.
            section: The dataset's section, plain values.
            opened: Opens the dataset, for names and references; None for results files.

        Raises:
            UserError: The predictions belong to another dataset.
        """

    def comparison(self, runs: Mapping[str, Records], table: Table) -> Figure:
        """Draw runs side by side, by default as bars of the table's metrics."""
        return comparison_figure(table)

    def training_figures(
        self, data: Any, records: Records, label: str
    ) -> Iterator[tuple[str, Figure]]:
        """Figures, by tag, that are logged at the end of a run."""
        return iter(())

    # Images

    def draw(
        self,
        data: Any,
        predictors: Mapping[str, Predictor],
        runs: Mapping[str, Records],
        *,
        count: int,
        accelerator: Accelerator,
    ) -> Iterator[Figure]:
        """Draw at most `count` val images spread over the split with each model's predictions.

        Args:
            data: The opened dataset.
            predictors: Name -> model, in the order of the panels.
            runs: Name -> records of the same models, if available.
            count: Number of images.
            accelerator: Device and precision.
        """
        return iter(())

    def draw_training(
        self, data: Any, task: object, terms: Sequence[Any], *, count: int
    ) -> Iterator[tuple[str, Figure]]:
        """Draw the inputs of distillation terms on training images, by the figure's name."""
        return iter(())

    # Networks

    def at_scales(self, model: nn.Module, scales: Sequence[float], *, mirror: bool) -> nn.Module:
        """Wrap a model to average outputs over scales and mirrored images, where supported."""
        raise UserError(f"predicts {self.things}; --scales and --flip are for label maps")

    def usual_size(self, data: Any) -> tuple[int, int]:
        """Height and width of most val images, where the cost of networks is measured."""
        raise UserError(f"predicts {self.things}; --cost is for label maps")


@dataclass(frozen=True)
class Evaluation(ABC):
    """Tables, figures and numbers of one or several runs on the same val split.

    Args:
        results: The kind of predictions.
        title: Title of the first table.
        data: The dataset's section, plain values for `metrics.json`.
        runs: Name -> predictions.
        names: Class names.
        references: Name -> reference predictions.
    """

    results: Results
    title: str
    data: Mapping[str, Any]
    runs: Mapping[str, Records]
    names: Sequence[str] = ()
    references: Mapping[str, Records] = field(default_factory=dict)

    @property
    def first(self) -> Records:
        """Predictions of the first run."""
        return next(iter(self.runs.values()))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics of the tables."""
        return self.results.rows

    @cached_property
    def scored(self) -> list[Scored]:
        """Metrics of the runs with intervals, then of the references without."""
        runs, known = self.runs.items(), self.references.items()
        return [
            *(score(self.results, name, one, self.metrics) for name, one in runs),
            *(score(self.results, name, one, self.metrics, intervals=False) for name, one in known),
        ]

    def notes(self) -> Sequence[str]:
        """Notes below the first table."""
        return self.results.notes(self.first)

    def summary_tables(self) -> list[Table]:
        """The printed tables."""
        about = (self.results, self.scored, self.title, self.notes())
        if len(self.runs) == 1:
            return [run_table(*about)]
        return [side_by_side_table(*about, bounded=self.results.bounded)]

    @abstractmethod
    def class_table(self) -> Table:
        """The table by class, or by image where there are no classes."""

    def all_tables(self) -> list[Table]:
        """The tables of `table.md`."""
        return [*self.summary_tables(), self.class_table()]

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Figures by name."""
        return iter(())

    def details(self, name: str) -> dict[str, Any]:
        """Further numbers of a run or reference in `metrics.json`."""
        return {}

    def numbers(self) -> dict[str, Any]:
        """Contents of the tables in full precision, for `metrics.json`."""
        found: dict[str, Any] = {
            "title": self.title,
            "data": dict(self.data),
            f"{self.results.ids.removesuffix('_ids')}s": len(self.first[self.results.ids]),
        }
        for one in self.scored:
            part = "runs" if one.name in self.runs else "references"
            found.setdefault(part, {})[one.name] = {**one.plain, **self.details(one.name)}
        return found


class Decoder(Protocol):
    """The part of a task that drawing needs."""

    def inputs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
        """Inputs of the model."""

    def decode(self, output: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Predictions from the model's outputs."""


@dataclass(frozen=True)
class Predictor:
    """A model whose predictions are drawn.

    Args:
        model: An `AdaptedStudent`, on the device.
        task: Its inputs and decoding.
        size: Size of its images, as datasets take it; None: the size of each file.
    """

    model: nn.Module
    task: Decoder
    size: int | tuple[int, int] | None = None

    @torch.no_grad()
    def __call__(self, sample: Sample, accelerator: Accelerator) -> Tensor:
        """Decode the first prediction of a batch, on the CPU."""
        batch = to_device(sample, accelerator.device, channels_last=False)
        with evaluating(self.model), accelerator.autocast():
            output, _ = self.model(*self.task.inputs(batch))
        return self.task.decode(output, batch)[0].cpu()


def spread(count: int, images: int) -> list[int]:
    """At most `count` positions, spread evenly over a split of so many images."""
    count = min(count, images)
    return [number * images // count for number in range(count)]
