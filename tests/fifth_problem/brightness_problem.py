"""Mean brightness of an image: samples, task, metric and results of a problem of one's own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from brightness import SPEC, BrightnessSection
from numpy.typing import NDArray
from torch import Tensor, nn

from kd.data.loader import Sample
from kd.errors import UserError
from kd.metrics.bootstrap import Interval, bootstrap, paired_bootstrap
from kd.metrics.records import Records
from kd.metrics.registry import Metric
from kd.problems.base import Batch, Classes, Dataset, Mean, Output, Problem, Sampling, Split, Task
from kd.problems.results import Evaluation, Results
from kd.problems.spec import ProblemSpec
from kd.report.tables import Table

ABSOLUTE_ERROR = Metric(
    "absolute_error", "mean distance from the true brightness", "levels", higher_is_better=False
)


class BrightnessSamples:
    """Random images and the mean of each, from 0 to 255."""

    def __init__(self, section: BrightnessSection, split: Split, *, train: bool) -> None:
        """Draw them."""
        self.train = train
        random = np.random.default_rng(0 if split == "train" else 1)
        shape = (section.images, 3, section.size, section.size)
        levels = random.integers(32, 224, (section.images, 1, 1, 1))
        self.pixels = (levels + random.integers(-32, 32, shape)).astype(np.uint8)

    def __len__(self) -> int:
        """How many."""
        return len(self.pixels)

    def together(self, batch_size: int) -> int:
        """All are of one size."""
        return batch_size

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """The image of a position, the same in every epoch."""
        _, position = place
        image = torch.from_numpy(self.pixels[position])
        return {
            "images": image,
            "sizes": torch.tensor(image.shape[1:]),
            "image_ids": torch.tensor(position),
            "targets": image.float().mean(),
        }


@dataclass(frozen=True)
class BrightnessDataset(Dataset):
    """Both splits."""

    section: BrightnessSection

    class_names: ClassVar[tuple[str, ...]] = ("brightness",)

    @property
    def problem(self) -> Problem[Any]:
        """The only problem of this module."""
        return PROBLEM

    def class_info(self) -> Classes:
        """Names alone."""
        return Classes(self.class_names, where=self.section.name)


@dataclass(frozen=True, kw_only=True)
class Brightness(Task):
    """Predict the brightness in levels of 0 to 255."""

    outputs: ClassVar[Collection[str]] = ("value",)

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        """Images from 0 to 1, (N, 3, H, W)."""
        return (batch["images"].float() / 255,)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Squared error of the fraction of the largest level."""
        return {"mse": Mean(F.mse_loss(output["value"], batch["targets"] / 255), "images")}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Levels, (N,)."""
        return output["value"].float() * 255

    def metric(self, classes: Classes) -> BrightnessMetric:
        """Absolute error."""
        return BrightnessMetric()


class BrightnessMetric:
    """Collects the predictions of all images."""

    def __init__(self) -> None:
        """Begin with none."""
        self.rows: list[tuple[int, float, float]] = []

    def take(self, decoded: Tensor, batch: Batch) -> None:
        """Take in a batch."""
        columns = (batch["image_ids"], decoded, batch["targets"])
        self.rows += zip(*(column.tolist() for column in columns), strict=True)

    def gather(self) -> None:
        """Exchange with the other ranks."""
        if dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self.rows)
            self.rows = [row for part in parts for row in part]

    def records(self) -> Records:
        """Ids, predictions and targets in the order of ids."""
        rows = np.array(sorted(set(self.rows)))
        return {"image_ids": rows[:, 0].astype(int), "values": rows[:, 1], "targets": rows[:, 2]}

    def compute(self) -> dict[str, float]:
        """The mean absolute error."""
        return {ABSOLUTE_ERROR.name: float(errors_of(self.records()).mean())}

    def per_class(self, names: object) -> list[tuple[str, int, float]]:
        """There are no classes."""
        return []

    def save_predictions(self, path: Path) -> None:
        """Write the records."""
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **self.records())


def errors_of(records: Records) -> NDArray[np.float64]:
    """The absolute error of each image, (N,)."""
    return np.asarray(np.abs(records["values"] - records["targets"]), np.float64)


@dataclass(frozen=True)
class BrightnessEvaluation(Evaluation):
    """A table of single images stands for that of classes."""

    def class_table(self) -> Table:
        """The error of each image by the first run."""
        ids, errors = self.first["image_ids"].tolist(), errors_of(self.first).tolist()
        rows = tuple((str(one), f"{error:.1f}") for one, error in zip(ids, errors, strict=True))
        return Table("image by image", ("image", "error"), (rows,))


@dataclass(frozen=True)
class BrightnessResults(Results):
    """Absolute errors, compared image by image."""

    evaluation_type: ClassVar[type[Evaluation]] = BrightnessEvaluation
    things: ClassVar[str] = "images"
    our_rows: ClassVar[tuple[str, ...]] = (ABSOLUTE_ERROR.name,)

    def metric(self, name: str) -> Metric:
        """The declaration of the metric, of this problem's or one of ours."""
        return ABSOLUTE_ERROR if name == ABSOLUTE_ERROR.name else super().metric(name)

    def check(self, records: Records, where: str) -> None:
        """Check that there are predictions of every image."""
        if len(records["values"]) != len(records["image_ids"]):
            raise UserError(f"{where}: values and ids differ in number")

    def check_same_truth(self, records: Records, other: Records, pair: str) -> None:
        """Check the targets."""
        if not np.array_equal(records["targets"], other["targets"]):
            raise UserError(f"{pair} have different targets")

    def our_value(self, records: Records, name: str) -> float:
        """The mean over images."""
        return float(errors_of(records).mean())

    def our_interval(self, records: Records, name: str) -> Interval:
        """Over images."""
        return bootstrap(errors_of(records), records["image_ids"])

    def our_difference(self, records: Records, twin: Records, name: str) -> Interval:
        """Over the same images."""
        return paired_bootstrap(errors_of(twin), errors_of(records), records["image_ids"])


class BrightnessProblem(Problem[BrightnessDataset]):
    """Images with the brightness of each."""

    spec: ClassVar[ProblemSpec] = SPEC
    teacher_output: ClassVar[str] = "value"
    results_type: ClassVar[type[Results]] = BrightnessResults

    def open(self, section: BrightnessSection) -> BrightnessDataset:
        """There is nothing to check."""
        return BrightnessDataset(section)

    def training(
        self, data: BrightnessDataset, sampling: Sampling, task: Task | None = None
    ) -> BrightnessSamples:
        """The train split."""
        return BrightnessSamples(data.section, "train", train=True)

    def evaluation(self, data: BrightnessDataset, split: Split = "val") -> BrightnessSamples:
        """A split as it is."""
        return BrightnessSamples(data.section, split, train=False)


class Regressor(nn.Module):
    """A convolution, pooling and a linear layer."""

    def __init__(self, *, width: int = 4) -> None:
        """Build it at random weights."""
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU())
        self.head = nn.Linear(width, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The value of each image, (N,)."""
        return {"value": self.head(self.features(images).mean(dim=(2, 3)))[:, 0]}


def matched(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared distance of a student's values from a teacher's, mean over images."""
    return F.mse_loss(student, teacher)


PROBLEM = BrightnessProblem()
