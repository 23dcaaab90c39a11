"""Interfaces of problems, datasets, tasks and metrics.

A batch is a dict of tensors, `images` (N, 3, H, W) among them; `docs/batch.md` lists its keys.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kd.config.datasets import DatasetSection
from kd.config.recipes import Model, TaskSection
from kd.data.loader import Samples
from kd.errors import UserError
from kd.metrics.registry import Metric
from kd.problems.results import Results
from kd.problems.spec import ProblemSpec
from kd.registry import build, check_options, check_problem
from kd.storage.fields import CachedField
from students import STUDENTS
from teachers import TEACHERS

Batch = Mapping[str, Tensor]
Output = Mapping[str, Tensor]
# Height and width of a feature map to the weights (K, h, w) of a mask on it.
Mask = Callable[[tuple[int, int]], Tensor]

KNOWN = "known"  # a unit: boxes with cached teacher outputs


class Mean(NamedTuple):
    """A scalar mean and the unit it was taken over, a key of `Task.counts`.

    Ranks and micro-batches hold unequal numbers of objects; the unit's counts weight their means.
    A critic learns from `judged` afterwards: both sides' maps and the images, detached.
    """

    value: Tensor
    unit: str
    judged: tuple[Tensor, ...] = ()

    def detach(self) -> Mean:
        """Detach the value from its graph."""
        return self._replace(value=self.value.detach())


class Classes(NamedTuple):
    """Classes and ground truth of a dataset, for its metric.

    Attributes:
        names: C class names.
        prior: Class fractions of the train objects, (C,).
        confusable: C names of groups of confusable classes, None for no group.
        visible: Image ids (K,) to the number of other objects in the image of each.
        where: Prefix of error messages.
        truth: Returns the val split's ground truth, in the form that the problem's metric takes;
            None where batches hold all of it.
    """

    names: Sequence[str]
    prior: NDArray[np.float64] | None = None
    confusable: Sequence[str | None] | None = None
    visible: Callable[[NDArray[np.int64]], NDArray[np.int64]] | None = None
    where: str = "evaluation"
    truth: Callable[[], Any] | None = None


class Collector(Protocol):
    """Collects decoded predictions over batches and ranks."""

    def take(self, decoded: Tensor, batch: Batch) -> None:
        """Add a batch's predictions, as `Task.decode` returns them."""

    def gather(self) -> None:
        """Exchange with the other ranks."""


class Evaluator(Collector, Protocol):
    """Scores the collected predictions."""

    def compute(self) -> dict[str, float]:
        """All metrics by name, fractions in 0..1."""

    def records(self) -> Mapping[str, NDArray[Any]]:
        """The arrays of `predictions.npz`."""

    def save_predictions(self, path: Path) -> None:
        """Write predictions and ground truth as an .npz file."""


class Rows(NamedTuple):
    """Rows of a batch's outputs; without arguments, one for each image.

    Attributes:
        unit: `images`, `hidden` (objects) or `boxes`, a key of a task's counts.
        images: The image of each row, (R,) int64; None: row n belongs to image n.
        labels: (R,) int64, -1 where unlabelled.
        ids: Keys of the cached teacher outputs, (R,) int64.
        hidden: Whether the teacher gets an input for each row, with its object hidden; then its
            feature maps have these rows too, and no row lacks a teacher's output.
    """

    unit: str = "images"
    images: Tensor | None = None
    labels: Tensor | None = None
    ids: Tensor | None = None
    hidden: bool = False

    @property
    def partial(self) -> bool:
        """Whether some rows may lack a teacher's output."""
        return self.images is not None and not self.hidden


class ReadsOutputs(Protocol):
    """The part of a distillation term that tasks read."""

    @property
    def student(self) -> str:
        """Output or layer of the student."""

    @property
    def mask_value(self) -> float | None:
        """Parameter of its mask, if the mask has one."""


class Task(Protocol):
    """Inputs, losses and decoding of one kind of problem; frozen, without a model.

    Subclass it: the methods with a body are right where each row of an output is an image.
    """

    outputs: ClassVar[Collection[str]] = ("logits",)  # named outputs of models; others are layers
    class_scores: ClassVar[Collection[str]] = ()  # outputs whose dimension 1 is the classes
    mask_names: ClassVar[Collection[str]] = ()  # masks that terms may name

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple[Tensor | None, ...]:
        """Arguments of the model."""

    @abstractmethod
    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Supervised losses, unweighted."""

    @abstractmethod
    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Predictions for `metric`, for most tasks log-probabilities of the rows, (R, C)."""

    @abstractmethod
    def metric(self, classes: Classes) -> Evaluator:
        """Build the evaluator that collects and scores the task's predictions."""

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """Masks for distillation by name, with a row for each input of the teacher.

        The mask `valid` is bool: the places that can be compared.
        """
        return {}

    def rows(self, batch: Batch) -> Rows:
        """Describe the rows of the model's outputs."""
        return Rows()

    def counts(
        self, batch: Batch, units: Collection[str] = (), masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        """Count each unit in a batch, before any model runs.

        The counts weight the means of micro-batches and processes in the mean of the whole batch.

        Args:
            batch: On its device.
            units: Further units: masks that terms are means over, `valid`, or `frame` (all places).
            masks: The batch's masks, if they were computed already.
        """
        size = (batch["images"].shape[-2], batch["images"].shape[-1])
        found = self.masks(batch) if masks is None else masks
        counts = {name: found[name](size).sum().float() for name in units if name in found}
        if "valid" in found:
            images = found["valid"](size).flatten(1).any(dim=1)
            counts["valid_images"] = images.sum().float()
        return {"images": full_count(batch, "images"), **counts}

    def place_unit(self, mask: str, grid: tuple[int, int], batch: Batch) -> str:
        """The unit of a mean over a mask's places on a grid; mask `frame` covers all places."""
        return self.rows(batch).unit if mask == "frame" else mask

    def for_terms(self, terms: Sequence[ReadsOutputs]) -> Self:
        """The task of a student trained with these terms, with the masks that they need."""
        return self

    def for_teaching(self, outputs: Collection[str]) -> Self:
        """The task of a teacher, restricted to the outputs and layers that are read each step."""
        return self


Split = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of the training samples of a dataset.

    Attributes:
        seed: At least 0.
        epochs: Length of the training, for schedules.
        images: Ids of the images to sample; None: all.
        labelled: Ids of the images whose labels may be used; None: all.
        hide: Hide one random object per image and epoch, or each in turn, if the problem hides any.
        cached: Teacher outputs that are added to the samples.
    """

    seed: int
    epochs: int = 1
    images: NDArray[np.int64] | None = None
    labelled: NDArray[np.int64] | None = None
    hide: Literal["one", "all"] = "all"
    cached: Sequence[CachedField] = ()


class Dataset(Protocol):
    """An opened dataset: both splits, checked."""

    @property
    def problem(self) -> Problem[Any]:
        """The problem that opened it."""

    @property
    def section(self) -> DatasetSection:
        """The recipe's section."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""

    @property
    def num_classes(self) -> int:
        """C."""

    def labelled(self, seed: int) -> NDArray[np.int64] | None:
        """Ids of the train images whose labels a student of this seed may use; None: all."""

    def class_info(self) -> Classes:
        """Classes and ground truth for the metric."""


S = TypeVar("S")
Section = TypeVar("Section", bound=Any)


@dataclass(frozen=True)
class SplitDataset(ABC, Generic[Section, S]):
    """Base class of datasets that hold both splits."""

    section: Section
    train: S
    val: S

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """C names."""

    @property
    @abstractmethod
    def problem(self) -> Problem[Any]:
        """The problem that opened it."""

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @abstractmethod
    def class_info(self) -> Classes:
        """Classes and ground truth for the metric."""

    def labelled(self, seed: int) -> NDArray[np.int64] | None:
        """None: all train images are labelled."""
        return None

    def split(self, name: Split) -> S:
        """One of the two splits."""
        return self.train if name == "train" else self.val


class Teacher(Protocol):
    """A trained teacher."""

    @property
    def folder(self) -> Path:
        """Run folder."""

    @property
    def problem(self) -> Problem[Any]:
        """The problem that it was trained on."""

    @property
    def section(self) -> DatasetSection:
        """The data that it was trained on."""

    @property
    def model(self) -> nn.Module:
        """Frozen."""

    @property
    def task(self) -> Task:
        """Its inputs and decoding."""


class TeacherView(Protocol):
    """A split as a teacher's input for caching; each row of the teacher's output is a record."""

    @property
    def data(self) -> Dataset:
        """The dataset."""

    @property
    def unit(self) -> str:
        """Objects or images: the owners of records."""

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """Images with records, (I,)."""

    @property
    def records_per_image(self) -> float:
        """On average."""

    @property
    def provenance(self) -> dict[str, str]:
        """Data and transform that cached outputs depend on."""

    @property
    def grid(self) -> tuple[int, int] | None:
        """Height and width that score maps are resized to; None: all have one shape."""

    def samples(self, images: NDArray[np.int64] | None = None) -> Samples:
        """All images, or those with these ids."""

    def records(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids of a batch's records, and the position in the batch of each one's image."""

    def mirrored(self, batch: Batch) -> dict[str, Tensor]:
        """Mirror the batch's images left to right, each within its own size."""

    def moved(self, cached: Sequence[CachedField], augment: dict[str, Any]) -> Samples:
        """Augmented training samples with these outputs moved alike.

        Raises:
            UserError: Not supported for outputs of this problem.
        """


D = TypeVar("D", bound=Dataset)


class Problem(ABC, Generic[D]):
    """A kind of data and everything that depends on it, one for each folder of `kd.problems`.

    Optional methods raise a `UserError` unless they are overridden.

    Attributes:
        spec: Name, data section and tasks, without torch.
        teacher_output: The output of teachers that is cached besides layers.
        cached_splits: Splits that `kd.cache` stores by default.
        hides_objects: Whether teachers get scenes with one object hidden: their posteriors of it
            are always cached, and they can be queried about the context of any region.
        task_needs_student: Whether a student's task depends on the network, such as on its levels.
        some_posteriors: Whether students see all objects at once while a context teacher hides each
            in turn: posteriors of some objects are cached, all other outputs are live.
        moves_cached_maps: Whether cached maps can be moved with augmented images.
        transferred: Name of the student whose trunk comes from a teacher's run, if there is one.
    """

    spec: ClassVar[ProblemSpec]
    teacher_output: ClassVar[str] = "logits"
    cached_splits: ClassVar[tuple[Split, ...]] = ("train",)
    hides_objects: ClassVar[bool] = False
    task_needs_student: ClassVar[bool] = False
    some_posteriors: ClassVar[bool] = False
    moves_cached_maps: ClassVar[bool] = False
    transferred: ClassVar[str] = ""

    # Data

    @abstractmethod
    def open(self, section: Any) -> D:
        """Open both splits of a dataset and check them.

        Raises:
            UserError: The data are missing, corrupt, or of another kind.
        """

    def class_names(self, section: Any) -> tuple[str, ...]:
        """Read a dataset's class names, without its images where possible."""
        return self.open(section).class_names

    def train_annotations(self, section: Any) -> Path | None:
        """The COCO JSON of the train split, if there is one."""
        return None

    @abstractmethod
    def training(self, data: D, sampling: Sampling, task: Task | None = None) -> Samples:
        """Training samples; some tasks of teachers need additional entries."""

    @abstractmethod
    def evaluation(self, data: D, split: Split = "val") -> Samples:
        """Samples that models are scored on."""

    def folds(self, data: D, count: int) -> list[NDArray[np.int64]]:
        """Ids of the train images outside of each fold, which its teacher is trained on."""
        raise UserError(
            f"folds: are for teachers of hidden objects; these data are {self.spec.help}"
        )

    def cached_data(self, data: D) -> Dataset:
        """The dataset whose teacher outputs are cached for students of this problem."""
        return data

    def object_ids(self, data: D) -> NDArray[np.int64]:
        """Annotation ids of the train objects with cached posteriors, if the problem has any."""
        raise UserError(f"{data.section.name}: posteriors are of objects, not of {self.spec.help}")

    def teacher_view(
        self, teacher: Teacher, data: D, split: Split, *, size: int | None = None
    ) -> TeacherView:
        """A split as the teacher's input for caching.

        Args:
            teacher: The teacher.
            data: The dataset.
            split: Train or val.
            size: Long side in pixels; None: as in the teacher's training.

        Raises:
            UserError: Not supported for this problem, or not at this size.
        """
        raise UserError(
            f"{data.section.name}: outputs are not cached for {self.spec.help}; set "
            "soft_targets.kind=live"
        )

    # Models

    def build_teacher(self, model: Model, num_classes: int) -> nn.Module:
        """Build a teacher by name, with random weights or those that its options name."""
        teacher: nn.Module = build(
            TEACHERS, model.name, model.options, what="teacher", num_classes=num_classes
        )
        return teacher

    def build_student(
        self, model: Model, data: D, *, labelled: NDArray[np.int64] | None = None,
        context: bool = True, outputs: Collection[str] = (),
    ) -> nn.Module:  # fmt: skip
        """Build a student by name.

        Args:
            model: Name and options.
            data: Its dataset.
            labelled: Ids of the images whose labels it may use; None: all.
            context: False overrides options that ask for a context head.
            outputs: Its outputs and layers that terms of its variant read.
        """
        return self.named_student(model.name, model.options, num_classes=data.num_classes)

    def named_student(self, name: str, options: Mapping[str, Any], **given: Any) -> nn.Module:
        """Build one of this problem's students by name.

        Args:
            name: A registered name, or `package.module:attribute`.
            options: The user's, checked against the builder.
            given: Arguments that follow from the dataset, passed if the builder has them.

        Raises:
            UserError: An unknown name, one for another problem, or wrong options.
        """
        check_problem(STUDENTS, name, self.spec.name, what="student")
        student: nn.Module = build(STUDENTS, name, options, what="student", **given)
        return student

    def resolve_student(self, model: Model) -> Model:
        """Replace references to other runs in a student's section by what they refer to."""
        return model

    def fit(self, model: nn.Module, data: D, images: NDArray[np.int64] | None = None) -> None:
        """Fit a model that counts rather than learns by gradient; others are unchanged."""

    # Task

    def task(
        self,
        section: TaskSection,
        data: Any,
        num_classes: int,
        *,
        model: nn.Module | None = None,
        fractions: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> Task:
        """Build the task of a recipe.

        Args:
            section: Name and options.
            data: The dataset's section.
            num_classes: C.
            model: Attributes such as a pyramid's levels become options of the task.
            fractions: From `class_fractions`; losses that need them raise without.

        Raises:
            UserError: An unknown task or option.
        """
        builder = self.spec.task(section.name).load()
        known: dict[str, Any] = {"num_classes": num_classes, **self.task_options(data)}
        for name in ("image_inputs", "levels", "loss_units"):
            if model is not None and hasattr(model, name):
                known[name] = getattr(model, name)
        known |= dict.fromkeys(("prior", "pixel_fractions", "image_fractions"))
        known |= {name: tuple(values.tolist()) for name, values in (fractions or {}).items()}
        fields = {field.name for field in dataclasses.fields(builder)}
        given = {name: value for name, value in known.items() if name in fields}
        check_options(builder, section.options, what=f"task {section.name!r}", given=given)
        task: Task = builder(**given, **section.options)
        return task

    def task_options(self, data: Any) -> dict[str, Any]:
        """Options of a task that follow from the dataset's section."""
        return {}

    def class_fractions(
        self, section: TaskSection, data: D, images: NDArray[np.int64] | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """Class fractions, for tasks with class weights, on the images with these ids or on all."""
        return {}

    def comparable_names(
        self, task: Task, names: Sequence[str], others: Sequence[str]
    ) -> tuple[str, ...]:
        """Names of a teacher's output channels, to compare with a dataset's classes (`others`)."""
        return tuple(names)

    # Results

    @abstractmethod
    def results(self, task: str, metrics: Mapping[str, Metric] | None = None) -> Results:
        """Scores, tables and figures of a task's predictions; `metrics` are the user's by name."""


def full_count(batch: Batch, name: str) -> Tensor:
    """The number of rows of a batch's entry, on its device."""
    # Filled there: a copy to a GPU would wait for all its pending work.
    return torch.full((), float(len(batch[name])), device=batch["images"].device)


def named(output: Tensor | Output) -> dict[str, Tensor]:
    """A model's raw output by name; a lone tensor is its `logits`."""
    return {"logits": output} if isinstance(output, Tensor) else dict(output)


def cached_masks(masks: Mapping[str, Mask]) -> dict[str, Mask]:
    """Cache masks: each is computed once for each grid."""
    return {name: functools.cache(mask) for name, mask in masks.items()}


def stride_of(pixels: int, places: int) -> int:
    """Pixels per place of a feature map: the power of two that rounds up to so many places.

    If there is none, one that rounds down, as in VGG and DenseNet.
    """
    strides = [1 << power for power in range(pixels.bit_length() + 1)]
    up = [stride for stride in strides if -(-pixels // stride) == places]
    down = [stride for stride in strides if pixels // stride == places]
    return next(iter(up + down), -(-pixels // places))
