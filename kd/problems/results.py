"""Checks, scores, tables and figures of a task's predictions."""

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

    "Records" are the arrays of `predictions.npz`. Methods whose names begin with `our_` compute
    registered metrics; `value`, `interval` and `difference` also compute custom ones.

    Attributes:
        own_metrics: The user's custom metrics, by name.
        evaluation_type: Class that makes the tables and figures.
        things: Plural noun for the scored items, such as "objects", for messages and titles.
        ids: Name of the array of ids in the records; rows are sorted by it.
        not_by_id: Names of arrays that do not have one row per id.
        our_rows: Registered metrics that tables list by default.
        our_bounded: Registered metrics that have intervals in tables of several runs.
        image_name: File name of figures of single images, without number and suffix.
        drawn_in_training: Whether a training run draws images at its end.
        cost_metric: Metric to plot against the cost of networks; None: no plot.
        drawn_from: Whether figures that compare runs on images need the models or only the records;
            None: there are no such figures.
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
        """Raise a `UserError` with the prefix `where` if arrays are missing or malformed."""

    @abstractmethod
    def check_same_truth(self, records: Records, other: Records, pair: str) -> None:
        """Raise a `UserError` if the ground truth of two runs differs. `pair` names both runs."""

    def check_same(self, records: Records, other: Records, pair: str) -> None:
        """Raise a `UserError` if ids or ground truth of two runs differ. `pair` names both runs."""
        ids, others = records[self.ids], other[self.ids]
        if not np.array_equal(ids, others):
            common = len(np.intersect1d(ids, others))
            raise UserError(
                f"{pair} scored different {self.things} ({len(ids)} and {len(others)}, {common} in "
                "both): dataset, split or size limits differ; evaluate both on the same data"
            )
        self.check_same_truth(records, other, pair)

    def named(self, records: Records, names: Sequence[str] | None) -> Records:
        """Add class names to the records if this kind of task stores an array `names`."""
        wanted = names is not None and "names" in self.not_by_id
        return {**records, "names": np.array(names)} if wanted else records

    def about(self, records: Records) -> str:
        """Return the number of scored items in words, for titles."""
        return f"{len(records[self.ids])} {self.things}"

    def references(self, records: Records) -> Mapping[str, Records]:
        """Compute reference predictions by name from the records alone."""
        return {}

    def notes(self, records: Records) -> Sequence[str]:
        """Return notes that explain the `references` below tables."""
        return ()

    # Metrics

    @abstractmethod
    def our_value(self, records: Records, name: str) -> float | None:
        """Return the value of a registered metric; None if these records do not define it."""

    @abstractmethod
    def our_interval(self, records: Records, name: str) -> Interval | None:
        """Return a registered metric with a 95 % bootstrap interval over images, if available."""

    @abstractmethod
    def our_difference(self, records: Records, twin: Records, name: str) -> Interval:
        """Return a registered metric minus that of the run `twin`; unknown bounds are NaN."""

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the metrics that tables list by default: registered, then custom."""
        return (*self.our_rows, *self.own_metrics)

    @property
    def bounded(self) -> tuple[str, ...]:
        """Names of the metrics that have intervals in tables of several runs."""
        return (*self.our_bounded, *self.own_metrics)

    def metric(self, name: str) -> Metric:
        """Return the declaration of a registered or custom metric."""
        return metric_named(name, self.own_metrics)

    def value(self, records: Records, name: str) -> float | None:
        """Return the value of a metric; None if undefined. Raise a UserError if it is unknown."""
        if name not in self.own_metrics:
            return self.our_value(records, name)
        values = self._per_item(records, name)
        there = ~np.isnan(values)
        return float(values[there].mean()) if there.any() else None

    def interval(self, records: Records, name: str) -> Interval | None:
        """Return a metric with a 95 % bootstrap interval over images, if available."""
        if name not in self.own_metrics:
            return self.our_interval(records, name)
        values = self._per_item(records, name)
        there = ~np.isnan(values)
        return bootstrap(values[there], records["image_ids"][there]) if there.any() else None

    def difference(self, records: Records, twin: Records, name: str) -> Interval:
        """Return a metric minus that of `twin` on the same images; unknown bounds are NaN."""
        if name not in self.own_metrics:
            return self.our_difference(records, twin, name)
        after, before = (self._per_item(one, name) for one in (records, twin))
        both = ~np.isnan(after) & ~np.isnan(before)
        return paired_bootstrap(before[both], after[both], records["image_ids"][both])

    def own_values(self, records: Records) -> dict[str, float]:
        """Return the values of the custom metrics by name, leaving out undefined ones."""
        found = {name: self.value(records, name) for name in self.own_metrics}
        return {name: number for name, number in found.items() if number is not None}

    def _per_item(self, records: Records, name: str) -> NDArray[np.float64]:
        per_item = self.own_metrics[name].per_item
        assert per_item is not None  # checked by `load_metrics`
        values, count = np.asarray(per_item(records), np.float64), len(records[self.ids])
        if values.shape != (count,):
            raise UserError(
                f"metric {name!r}: per_item returned shape {values.shape} for {count} "
                f"{self.things}, expected ({count},)"
            )
        return values

    def read_file(self, annotations: Path, results: Path) -> Records:
        """Read a results file in COCO's format; raise a UserError for tasks without boxes."""
        raise UserError(f"{results}: results files contain boxes; this task scores {self.things}")

    # Reports

    def summary(self, data: Any, records: Records) -> dict[str, float]:
        """Return metrics of reference predictions for `summary.json`, such as `prior_<metric>`."""
        return {}

    def evaluation(
        self, title: str, runs: Mapping[str, Records], section: Mapping[str, Any],
        opened: Callable[[], Any] | None = None,
    ) -> Evaluation:  # fmt: skip
        """Make tables and figures of one or several runs on the same val split.

        Args:
            title: Title of the first table.
            runs: Records of each run by name.
            section: The data section as plain values.
            opened: Opens the dataset; None for results files.
        """
        known = self.references(next(iter(runs.values())))
        return self.evaluation_type(self, title, section, runs, known, opened)

    def comparison(self, runs: Mapping[str, Records], table: Table) -> Figure:
        """Draw several runs in one figure, by default as bars of the table's metrics."""
        return comparison_figure(table)

    def training_figures(
        self, data: Any, records: Records, label: str
    ) -> Iterator[tuple[str, Figure]]:
        """Yield (TensorBoard tag, figure) to log at the end of a training run."""
        return iter(())

    # Images

    def draw(
        self, data: Any, predictors: Mapping[str, Predictor], runs: Mapping[str, Records], *,
        count: int, accelerator: Accelerator,
    ) -> Iterator[Figure]:  # fmt: skip
        """Draw the models' predictions on at most `count` val images, spread over the split.

        Args:
            data: The opened dataset.
            predictors: Models by name, in the order of the panels.
            runs: Records of these models by name, if available.
            count: Maximum number of images.
            accelerator: Provides device and precision.
        """
        return iter(())

    def draw_training(
        self, data: Any, task: object, terms: Sequence[Any], *, count: int
    ) -> Iterator[tuple[str, Figure]]:
        """Yield (name, figure) of what distillation terms use, such as their masks."""
        return iter(())

    # Networks

    def at_scales(self, model: nn.Module, scales: Sequence[float], *, mirror: bool) -> nn.Module:
        """Wrap a model to average its outputs over image scales and mirrored images."""
        raise UserError(f"--scales and --flip need label maps; this task scores {self.things}")

    def usual_size(self, data: Any) -> tuple[int, int]:
        """Return the most frequent (H, W) of val images, used to measure the cost of networks."""
        raise UserError(f"--cost needs label maps; this task scores {self.things}")


@dataclass(frozen=True)
class Evaluation(ABC):
    """Tables, figures and metrics of one or several runs on the same val split.

    Args:
        results: Computes the metrics.
        title: Title of the first table.
        data: The data section as plain values, for `metrics.json`.
        runs: Records of each run by name.
        references: Records of each reference by name.
        opened: Opens the dataset; None if the records are sufficient.
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
        """Return the notes below the first table."""
        return self.results.notes(self.first)

    def summary_tables(self) -> list[Table]:
        """Return the tables to print in the terminal."""
        about = (self.results, self.scored, self.title, self.notes())
        if len(self.runs) == 1:
            return [run_table(*about)]
        return [side_by_side_table(*about, bounded=self.results.bounded)]

    @abstractmethod
    def class_table(self) -> Table:
        """Return a table with one row per class, or per sampled image if there are no classes."""

    def all_tables(self) -> list[Table]:
        """Return the tables to write to `table.md`."""
        return [*self.summary_tables(), self.class_table()]

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Yield (name, figure) pairs."""
        return iter(())

    def details(self, name: str) -> dict[str, Any]:
        """Return additional values for `metrics.json` of the run or reference called `name`."""
        return {}

    def numbers(self) -> dict[str, Any]:
        """Return the content of the tables at full precision, for `metrics.json`."""
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
    """The methods of `kd.problems.base.Task` that drawing needs."""

    def inputs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
        """Return the positional arguments of the model's `forward`."""

    def decode(self, output: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Return predictions computed from the model's outputs."""


@dataclass(frozen=True)
class Predictor:
    """A model whose predictions are drawn.

    Args:
        model: An `AdaptedStudent`, on the device.
        task: The model's task, which provides inputs and decoding.
        size: Input size, as the dataset's samples take it; None: the size of each image file.
    """

    model: nn.Module
    task: Decoder
    size: int | tuple[int, int] | None = None

    @torch.no_grad()
    def __call__(self, sample: Sample, accelerator: Accelerator) -> Tensor:
        """Return the decoded prediction for the first row of a batch, on the CPU."""
        batch = to_device(sample, accelerator.device, channels_last=False)
        with evaluating(self.model), accelerator.autocast():
            output, _ = self.model(*self.task.inputs(batch))
        return self.task.decode(output, batch)[0].cpu()


def spread(count: int, images: int) -> list[int]:
    """Return at most `count` evenly spaced image positions in a split of `images` images."""
    count = min(count, images)
    return [number * images // count for number in range(count)]
