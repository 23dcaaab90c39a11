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

    `our_value`, `our_interval` and `our_difference` compute the metrics of `kd.metrics.registry`;
    `value`, `interval` and `difference` compute these and custom metrics.

    Attributes:
        own_metrics: Custom metrics, written by the user, by name.
        evaluation_type: Class that makes the tables and figures.
        things: Plural noun for what is scored, such as "objects", for messages and titles.
        ids: Name of the records' array of ids; rows are sorted by it.
        not_by_id: Names of the arrays that do not have one row per id.
        our_rows: Registered metrics that tables list by default.
        our_bounded: Registered metrics with intervals in tables of several runs.
        image_name: File name of figures of single images, without number and suffix.
        drawn_in_training: Whether images are drawn at the end of a training run.
        cost_metric: Name of the metric that is plotted against the cost of networks; None: no plot.
        drawn_from: Whether figures of several runs on the same images need the models or only the
            records; None: there are no such figures.
    """

    own_metrics: Mapping[str, Metric] = field(default_factory=dict)
    evaluation_type: ClassVar[type[Evaluation]]
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
        """Raise a `UserError` if arrays are missing or malformed; `where` begins its message."""

    @abstractmethod
    def check_same_truth(self, records: Records, other: Records, pair: str) -> None:
        """Raise a `UserError` if ground truths of the same ids differ; `pair` names both runs."""

    def check_same(self, records: Records, other: Records, pair: str) -> None:
        """Raise a `UserError` if ids or ground truths differ; `pair` names both runs."""
        ids, others = records[self.ids], other[self.ids]
        if not np.array_equal(ids, others):
            common = len(np.intersect1d(ids, others))
            raise UserError(
                f"{pair} scored different {self.things} ({len(ids)} and {len(others)}, {common} in "
                "both): the dataset, split or range of object sizes differs; evaluate both on the "
                "same data"
            )
        self.check_same_truth(records, other, pair)

    def named(self, records: Records, names: Sequence[str] | None) -> Records:
        """Add the class names to the records, if `not_by_id` lists an array `names`."""
        wanted = names is not None and "names" in self.not_by_id
        return {**records, "names": np.array(names)} if wanted else records

    def about(self, records: Records) -> str:
        """The number of scored objects or images in words, for titles."""
        return f"{len(records[self.ids])} {self.things}"

    def references(self, records: Records) -> Mapping[str, Records]:
        """Reference predictions by name, computed from the records alone."""
        return {}

    def notes(self, records: Records) -> Sequence[str]:
        """Notes below tables that explain the `references`."""
        return ()

    # Metrics

    @abstractmethod
    def our_value(self, records: Records, name: str) -> float | None:
        """Value of a registered metric; None if it is undefined for these records."""

    @abstractmethod
    def our_interval(self, records: Records, name: str) -> Interval | None:
        """A registered metric with its 95 % bootstrap interval over images, if available."""

    @abstractmethod
    def our_difference(self, records: Records, twin: Records, name: str) -> Interval:
        """A registered metric minus that of `twin`, with NaN bounds if they are unknown."""

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the metrics that tables list by default: registered, then custom ones."""
        return (*self.our_rows, *self.own_metrics)

    @property
    def bounded(self) -> tuple[str, ...]:
        """Names of the metrics that have intervals in tables of several runs."""
        return (*self.our_bounded, *self.own_metrics)

    def metric(self, name: str) -> Metric:
        """Declaration of a registered or custom metric."""
        return metric_named(name, self.own_metrics)

    def value(self, records: Records, name: str) -> float | None:
        """Value of a metric; None if it is undefined. Raise a UserError for unknown names."""
        if name not in self.own_metrics:
            return self.our_value(records, name)
        values = self._per_item(records, name)
        there = ~np.isnan(values)
        return float(values[there].mean()) if there.any() else None

    def interval(self, records: Records, name: str) -> Interval | None:
        """A metric with its 95 % bootstrap interval over images, if available."""
        if name not in self.own_metrics:
            return self.our_interval(records, name)
        values = self._per_item(records, name)
        there = ~np.isnan(values)
        return bootstrap(values[there], records["image_ids"][there]) if there.any() else None

    def difference(self, records: Records, twin: Records, name: str) -> Interval:
        """A metric minus that of `twin` on the same images; NaN bounds if they are unknown."""
        if name not in self.own_metrics:
            return self.our_difference(records, twin, name)
        after, before = (self._per_item(one, name) for one in (records, twin))
        both = ~np.isnan(after) & ~np.isnan(before)
        return paired_bootstrap(before[both], after[both], records["image_ids"][both])

    def own_values(self, records: Records) -> dict[str, float]:
        """Values of the custom metrics by name, without undefined ones."""
        found = {name: self.value(records, name) for name in self.own_metrics}
        return {name: number for name, number in found.items() if number is not None}

    def _per_item(self, records: Records, name: str) -> NDArray[np.float64]:
        per_item = self.own_metrics[name].per_item
        assert per_item is not None  # because `load_metrics` has checked it
        values, count = np.asarray(per_item(records), np.float64), len(records[self.ids])
        if values.shape != (count,):
            raise UserError(
                f"metric {name!r}: per_item returned shape {values.shape} for {count} "
                f"{self.things}, expected ({count},)"
            )
        return values

    def read_file(self, annotations: Path, results: Path) -> Records:
        """Read a results file in COCO's format; raise a UserError for tasks without boxes."""
        raise UserError(
            f"{results}: a results file contains boxes, but this task scores {self.things}"
        )

    # Reports

    def summary(self, data: Any, records: Records) -> dict[str, float]:
        """Metrics of references for `summary.json`, such as `prior_<metric>`."""
        return {}

    def evaluation(
        self, title: str, runs: Mapping[str, Records], section: Mapping[str, Any],
        opened: Callable[[], Any] | None = None,
    ) -> Evaluation:  # fmt: skip
        """Tables and figures of one or several runs.

        Args:
            title: Title of the first table.
            runs: Name of each run -> its records, all of the same val split.
            section: The dataset's section as plain values.
            opened: Function that opens the dataset; None for results files.

        Raises:
            UserError: The predictions belong to another dataset.
        """
        known = self.references(next(iter(runs.values())))
        return self.evaluation_type(self, title, section, runs, known, opened)

    def comparison(self, runs: Mapping[str, Records], table: Table) -> Figure:
        """Draw several runs in one figure, by default as bars of the table's metrics."""
        return comparison_figure(table)

    def training_figures(
        self, data: Any, records: Records, label: str
    ) -> Iterator[tuple[str, Figure]]:
        """Figures to log at the end of a run, each with its TensorBoard tag."""
        return iter(())

    # Images

    def draw(
        self, data: Any, predictors: Mapping[str, Predictor], runs: Mapping[str, Records], *,
        count: int, accelerator: Accelerator,
    ) -> Iterator[Figure]:  # fmt: skip
        """Draw at most `count` val images, spread over the split, with each model's predictions.

        Args:
            data: The opened dataset.
            predictors: Name -> model, in the order of the panels.
            runs: Name -> records of the same models, if available.
            count: Largest number of images.
            accelerator: Device and precision.
        """
        return iter(())

    def draw_training(
        self, data: Any, task: object, terms: Sequence[Any], *, count: int
    ) -> Iterator[tuple[str, Figure]]:
        """Draw inputs of the distillation terms, such as their masks; yield (name, figure)."""
        return iter(())

    # Networks

    def at_scales(self, model: nn.Module, scales: Sequence[float], *, mirror: bool) -> nn.Module:
        """Wrap a model to average its outputs over scales and mirrored images.

        Raise a UserError if the task does not support this.
        """
        raise UserError(
            f"--scales and --flip are only for label maps; this model predicts {self.things}"
        )

    def usual_size(self, data: Any) -> tuple[int, int]:
        """Most frequent height and width of val images, for measuring the cost of networks."""
        raise UserError(f"--cost is only for label maps; this model predicts {self.things}")


@dataclass(frozen=True)
class Evaluation(ABC):
    """Tables, figures and numbers of one or several runs on the same val split.

    Args:
        results: Computes the metrics.
        title: Title of the first table.
        data: The dataset's section as plain values, for `metrics.json`.
        runs: Name of each run -> its records.
        references: Name of each reference -> its records.
        opened: Function that opens the dataset; None if the records contain all that is needed.
    """

    results: Results
    title: str
    data: Mapping[str, Any]
    runs: Mapping[str, Records]
    references: Mapping[str, Records] = field(default_factory=dict)
    opened: Callable[[], Any] | None = None

    @property
    def first(self) -> Records:
        """Records of the first run."""
        return next(iter(self.runs.values()))

    @cached_property
    def names(self) -> Sequence[str]:
        """Class names, from the records or the dataset."""
        if "names" in self.first or self.opened is None:
            return [str(name) for name in self.first["names"]]
        names: Sequence[str] = self.opened().class_names
        return names

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics in the tables."""
        return self.results.rows

    @cached_property
    def scored(self) -> list[Scored]:
        """Metrics of each run with intervals, then of each reference without intervals."""
        runs, known = self.runs.items(), self.references.items()
        return [
            *(score(self.results, name, one, self.metrics) for name, one in runs),
            *(score(self.results, name, one, self.metrics, intervals=False) for name, one in known),
        ]

    def notes(self) -> Sequence[str]:
        """Notes below the first table."""
        return self.results.notes(self.first)

    def summary_tables(self) -> list[Table]:
        """Tables to print in the terminal."""
        about = (self.results, self.scored, self.title, self.notes())
        if len(self.runs) == 1:
            return [run_table(*about)]
        return [side_by_side_table(*about, bounded=self.results.bounded)]

    @abstractmethod
    def class_table(self) -> Table:
        """Table with a row for each class, or for some images where there are no classes."""

    def all_tables(self) -> list[Table]:
        """Tables to write to `table.md`."""
        return [*self.summary_tables(), self.class_table()]

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Yield the name and the figure for each figure."""
        return iter(())

    def details(self, name: str) -> dict[str, Any]:
        """Further values of the run or reference called `name`, for `metrics.json`."""
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
    """The part of `kd.problems.base.Task` that drawing needs."""

    def inputs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
        """Positional arguments of the model's `forward`."""

    def decode(self, output: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Predictions from the model's outputs."""


@dataclass(frozen=True)
class Predictor:
    """A model whose predictions are drawn.

    Args:
        model: An `AdaptedStudent`, on the device.
        task: The model's task, for inputs and decoding.
        size: Size of the model's input images, as the dataset's samples take it; None: each file's.
    """

    model: nn.Module
    task: Decoder
    size: int | tuple[int, int] | None = None

    @torch.no_grad()
    def __call__(self, sample: Sample, accelerator: Accelerator) -> Tensor:
        """Predict a batch and return the decoded prediction of its first row, on the CPU."""
        batch = to_device(sample, accelerator.device, channels_last=False)
        with evaluating(self.model), accelerator.autocast():
            output, _ = self.model(*self.task.inputs(batch))
        return self.task.decode(output, batch)[0].cpu()


def spread(count: int, images: int) -> list[int]:
    """Positions of at most `count` images, spread evenly over a split of `images` images."""
    count = min(count, images)
    return [number * images // count for number in range(count)]
