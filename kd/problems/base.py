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
# Computes a mask's weights (K, h, w) from the height and width of a feature map.
Mask = Callable[[tuple[int, int]], Tensor]

KNOWN = "known"  # unit of means over the boxes that have cached teacher outputs


class Mean(NamedTuple):
    """A scalar mean and the unit it was taken over.

    Processes and micro-batches hold unequal numbers of units, so their means are weighted by count.

    Attributes:
        value: The mean.
        unit: A key of `Task.counts`, such as `images`.
        judged: What a critic trains on after the student's step: the student's map, the teacher's
            map and the images, all detached.
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
        confusable: For each of the C classes, the name of its group of confusable classes, or None.
        visible: Maps image ids (K,) to the number of other objects in each image, (K,).
        where: Prefix of error messages.
        truth: Returns the val split's ground truth, in the form that the problem's metric takes;
            None if the batches contain the whole ground truth.
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
        """Merge the predictions of all ranks; every rank must call it."""


class Evaluator(Collector, Protocol):
    """A collector that also scores the collected predictions."""

    def compute(self) -> dict[str, float]:
        """All metrics by name; metrics that are fractions are in 0..1."""

    def records(self) -> Mapping[str, NDArray[Any]]:
        """The arrays of `predictions.npz`."""

    def save_predictions(self, path: Path) -> None:
        """Write predictions and ground truth as an .npz file."""


class Rows(NamedTuple):
    """Meaning of the rows of a batch's outputs; by default, each row is an image.

    Attributes:
        unit: `images`, `hidden` (objects) or `boxes`, a key of a task's counts.
        images: Index in the batch of each row's image, (R,) int64; None: row n is image n.
        labels: Class of each row, (R,) int64, -1 where unlabelled.
        ids: Keys of the cached teacher outputs, (R,) int64.
        hidden: Whether the teacher gets one input per row, in which the row's object is hidden.
            Then the teacher's feature maps have these rows too, and every row has an output.
    """

    unit: str = "images"
    images: Tensor | None = None
    labels: Tensor | None = None
    ids: Tensor | None = None
    hidden: bool = False

    @property
    def partial(self) -> bool:
        """Whether rows without a teacher output are allowed."""
        return self.images is not None and not self.hidden


class ReadsOutputs(Protocol):
    """The part of a distillation term that tasks read.

    Attributes:
        student: Name of the student output or layer that the term reads.
        mask_value: Parameter of the term's mask, such as `psi`; None if it has none.
    """

    @property
    def student(self) -> str: ...
    @property
    def mask_value(self) -> float | None: ...


class Task(Protocol):
    """Inputs, losses and decoding of one kind of problem; frozen, without a model.

    The default implementations fit tasks whose output has one row per image.

    Attributes:
        outputs: Names of model outputs that terms may read; any other name is a layer path.
        class_scores: Names of the outputs whose dimension 1 is the classes.
        mask_names: Names of the masks that terms may use.
    """

    outputs: ClassVar[Collection[str]] = ("logits",)
    class_scores: ClassVar[Collection[str]] = ()
    mask_names: ClassVar[Collection[str]] = ()

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple[Tensor | None, ...]:
        """Positional arguments of the model's `forward`."""

    @abstractmethod
    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Supervised losses by name, unweighted."""

    @abstractmethod
    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Predictions for the evaluator, for most tasks log-probabilities of the rows, (R, C)."""

    @abstractmethod
    def metric(self, classes: Classes) -> Evaluator:
        """Build the evaluator that collects and scores the task's predictions."""

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """Named masks for distillation; the first dimension matches the teacher's input batch.

        `valid` is boolean and true for the grid cells where student and teacher can be compared,
        such as the cells inside the images.
        """
        return {}

    def rows(self, batch: Batch) -> Rows:
        """Describe the rows of the model's outputs."""
        return Rows()

    def counts(
        self, batch: Batch, units: Collection[str] = (), masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        """Count each unit in a batch, before any model runs.

        The means of micro-batches and processes are weighted by these counts to get the mean of the
        whole batch.

        Args:
            batch: The batch, on its device.
            units: Further units to count: names of masks that terms average over, `valid`, or
                `frame` (all grid cells).
            masks: The result of `masks(batch)`, if it was computed already.
        """
        size = (batch["images"].shape[-2], batch["images"].shape[-1])
        found = self.masks(batch) if masks is None else masks
        counts = {name: found[name](size).sum().float() for name in units if name in found}
        if "valid" in found:
            images = found["valid"](size).flatten(1).any(dim=1)
            counts["valid_images"] = images.sum().float()
        return {"images": full_count(batch, "images"), **counts}

    def place_unit(self, mask: str, grid: tuple[int, int], batch: Batch) -> str:
        """Unit of a mean over the grid cells that a mask selects; the mask `frame` selects all."""
        return self.rows(batch).unit if mask == "frame" else mask

    def for_terms(self, terms: Sequence[ReadsOutputs]) -> Self:
        """Return the task with the masks and outputs that these distillation terms need."""
        return self

    def for_teaching(self, outputs: Collection[str]) -> Self:
        """Return the task for a live teacher from which terms read only these outputs or layers."""
        return self


Split = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of the training samples of a dataset.

    Attributes:
        seed: Random seed, at least 0.
        epochs: Number of epochs of the training, for schedules.
        images: Ids of the images to sample; None: all.
        labelled: Ids of the images whose labels may be used; None: all.
        hide: Whether a sample hides one random object of its image or each in turn; used only by
            problems that hide objects.
        cached: Cached teacher outputs to add to the samples.
    """

    seed: int
    epochs: int = 1
    images: NDArray[np.int64] | None = None
    labelled: NDArray[np.int64] | None = None
    hide: Literal["one", "all"] = "all"
    cached: Sequence[CachedField] = ()


@dataclass(frozen=True)
class Dataset(ABC):
    """A dataset whose files were found and checked.

    Attributes:
        section: The recipe's data section.
    """

    section: DatasetSection

    @property
    @abstractmethod
    def problem(self) -> Problem[Any]:
        """The problem that opened the dataset."""

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Names of the C classes."""

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return len(self.class_names)

    def labelled(self, seed: int) -> NDArray[np.int64] | None:
        """Ids of the train images whose labels a student with this seed may use; None: all."""
        return None

    @abstractmethod
    def class_info(self) -> Classes:
        """Classes and ground truth for the metric."""


S = TypeVar("S")


@dataclass(frozen=True)
class SplitDataset(Dataset, Generic[S]):
    """A dataset with an index of images and annotations for each split."""

    train: S
    val: S

    def split(self, name: Split) -> S:
        """Return the index of the train or val split."""
        return self.train if name == "train" else self.val


class Teacher(Protocol):
    """A trained teacher.

    Attributes:
        folder: Folder of the teacher's run.
        problem: The problem that the teacher was trained on.
        section: The data section of the teacher's recipe.
        model: The frozen network.
        task: The teacher's task, for inputs and decoding.
    """

    @property
    def folder(self) -> Path: ...
    @property
    def problem(self) -> Problem[Any]: ...
    @property
    def section(self) -> DatasetSection: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def task(self) -> Task: ...


class TeacherView(Protocol):
    """A split prepared as teacher input, from which a cache of the teacher's outputs is built.

    Each row of the teacher's output becomes a record of the cache.

    Attributes:
        data: The dataset.
        unit: `objects` or `images`: whether a record belongs to an object or to an image.
        image_ids: Ids of the images with records, (I,).
        records_per_image: Average number of records per image.
        provenance: Dataset and transform that cached outputs depend on, for the cache's manifest.
        grid: Height and width that score maps are resized to; None if all have the same shape.
    """

    @property
    def data(self) -> Dataset: ...
    @property
    def unit(self) -> str: ...
    @property
    def image_ids(self) -> NDArray[np.int64]: ...
    @property
    def records_per_image(self) -> float: ...
    @property
    def provenance(self) -> dict[str, str]: ...
    @property
    def grid(self) -> tuple[int, int] | None: ...

    def samples(self, images: NDArray[np.int64] | None = None) -> Samples:
        """Samples of all images, or of the images with these ids."""

    def records(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids of a batch's records, (R,), and for each record its image's index in the batch."""

    def mirrored(self, batch: Batch) -> dict[str, Tensor]:
        """Mirror the batch's images left to right, each within its own size."""

    def moved(self, cached: Sequence[CachedField], augment: dict[str, Any]) -> Samples:
        """Augmented training samples; cached maps are flipped, shifted and scaled like the images.

        Raises:
            UserError: The problem does not support this.
        """


D = TypeVar("D", bound=Dataset)


class Problem(ABC, Generic[D]):
    """A kind of data and everything that depends on it, one for each folder of `kd.problems`.

    Methods for abilities that a problem may lack raise a `UserError` unless they are overridden.

    Attributes:
        spec: Name, data section and tasks, without torch.
        teacher_output: Name of the teacher output that is cached in addition to layers.
        cached_splits: Splits that `kd.cache` stores by default.
        hides_objects: Whether teachers predict the class of a hidden object: then their posteriors
            are always cached, and they can be queried about the context of any region.
        task_needs_student: Whether a student's task depends on its network, e.g. on the strides of
            its feature pyramid.
        some_posteriors: Whether students see all objects at once while a context teacher hides each
            in turn: then posteriors are cached, possibly only of some objects, and all other
            outputs come from live teachers.
        moves_cached_maps: Whether cached maps can be transformed like augmented images.
        transferred: Name of the student whose trunk comes from a teacher's run, "" if none does.
        results_type: Class of the objects that `results` returns.
    """

    spec: ClassVar[ProblemSpec]
    teacher_output: ClassVar[str] = "logits"
    cached_splits: ClassVar[tuple[Split, ...]] = ("train",)
    hides_objects: ClassVar[bool] = False
    task_needs_student: ClassVar[bool] = False
    some_posteriors: ClassVar[bool] = False
    moves_cached_maps: ClassVar[bool] = False
    transferred: ClassVar[str] = ""
    results_type: ClassVar[type[Results]]

    # Data

    @abstractmethod
    def open(self, section: Any) -> D:
        """Open both splits of a dataset and check them.

        Raises:
            UserError: Files are missing, corrupt, or in another format.
        """

    def class_names(self, section: Any) -> tuple[str, ...]:
        """Read a dataset's class names, without its images where possible."""
        return self.open(section).class_names

    def train_annotations(self, section: Any) -> Path | None:
        """The COCO JSON of the train split, if there is one."""
        return None

    @abstractmethod
    def training(self, data: D, sampling: Sampling, task: Task | None = None) -> Samples:
        """Samples of the train split.

        Args:
            data: The dataset.
            sampling: Options.
            task: The task that is trained, if its losses need further entries in the batch.
        """

    @abstractmethod
    def evaluation(self, data: D, split: Split = "val") -> Samples:
        """Samples of a split for evaluation, without augmentation."""

    def folds(self, data: D, count: int) -> list[NDArray[np.int64]]:
        """For each of `count` folds, the ids of the train images outside of the fold."""
        raise UserError(
            f"folds: only for teachers of hidden objects; this dataset has {self.spec.help}"
        )

    def cached_data(self, data: D) -> Dataset:
        """The dataset on which teachers run to cache outputs for this problem's students."""
        return data

    def object_ids(self, data: D) -> NDArray[np.int64]:
        """Annotation ids of the train objects, which identify cached posteriors."""
        raise UserError(
            f"{data.section.name}: posteriors belong to objects, not to {self.spec.help}"
        )

    def teacher_view(
        self, teacher: Teacher, data: D, split: Split, *, size: int | None = None
    ) -> TeacherView:
        """A split as the teacher's input for caching.

        Args:
            teacher: The teacher.
            data: The dataset.
            split: Train or val.
            size: Long side of the images in pixels; None: as in the teacher's training.

        Raises:
            UserError: The problem does not support caching, or not at this size.
        """
        raise UserError(
            f"{data.section.name}: outputs for {self.spec.help} cannot be cached; set "
            "soft_targets.kind=live"
        )

    # Models

    def build_teacher(self, model: Model, num_classes: int) -> nn.Module:
        """Build a teacher by name, with random weights unless its options name pretrained ones."""
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
            data: The dataset that the student is trained on.
            labelled: Ids of the images whose labels the student may use; None: all.
            context: False builds the student without a context head, whatever its options are.
            outputs: Outputs and layers that the variant's distillation terms read.
        """
        return self.named_student(model.name, model.options, num_classes=data.num_classes)

    def named_student(self, name: str, options: Mapping[str, Any], **given: Any) -> nn.Module:
        """Build one of this problem's students by name.

        Args:
            name: A registered name, or `package.module:attribute`.
            options: Options of the recipe, checked against the builder's parameters.
            given: Arguments computed from the dataset, passed if the builder takes them.

        Raises:
            UserError: The name is unknown or a student of another problem, or an option is wrong.
        """
        check_problem(STUDENTS, name, self.spec.name, what="student")
        student: nn.Module = build(STUDENTS, name, options, what="student", **given)
        return student

    def resolve_student(self, model: Model) -> Model:
        """Replace references to other runs in a recipe's student section by what they refer to."""
        return model

    def fit(self, model: nn.Module, data: D, images: NDArray[np.int64] | None = None) -> None:
        """Fit a model that is estimated from counts; leave models that are trained unchanged."""

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
            model: The network, whose attributes (such as its pyramid's levels) set options.
            fractions: Result of `class_fractions`; needed to compute losses with class weights.

        Raises:
            UserError: The task or one of its options is unknown.
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
        """Options of the task that the dataset's section sets."""
        return {}

    def class_fractions(
        self, section: TaskSection, data: D, images: NDArray[np.int64] | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """Class fractions of the train images with these ids, or of all, for class weights."""
        return {}

    def comparable_names(
        self, task: Task, names: Sequence[str], others: Sequence[str]
    ) -> tuple[str, ...]:
        """Names of the output channels of a teacher with classes `names`.

        `others` are the class names of the dataset that the teacher's outputs are compared on.
        """
        return tuple(names)

    # Results

    def results(self, task: str, metrics: Mapping[str, Metric] | None = None) -> Results:
        """Scores, tables and figures of a task's predictions; `metrics` are custom ones by name."""
        return self.results_type(metrics or {})


def full_count(batch: Batch, name: str) -> Tensor:
    """The number of rows of a batch's entry, as a scalar on the batch's device."""
    # Created on the device, because a copy to the GPU would wait for all pending work.
    return torch.full((), float(len(batch[name])), device=batch["images"].device)


def named(output: Tensor | Output) -> dict[str, Tensor]:
    """Return a model's raw output as a dict; a single tensor gets the name `logits`."""
    return {"logits": output} if isinstance(output, Tensor) else dict(output)


def cached_masks(masks: Mapping[str, Mask]) -> dict[str, Mask]:
    """Wrap masks so that each is computed only once per grid."""
    return {name: functools.cache(mask) for name, mask in masks.items()}


def stride_of(pixels: int, places: int) -> int:
    """Stride of a feature map with `places` cells along a side of `pixels` pixels.

    The stride is the power of two for which `pixels / stride`, rounded up, equals `places`; if none
    does, the one that fits when rounded down, as in VGG and DenseNet.
    """
    strides = [1 << power for power in range(pixels.bit_length() + 1)]
    up = [stride for stride in strides if -(-pixels // stride) == places]
    down = [stride for stride in strides if pixels // stride == places]
    return next(iter(up + down), -(-pixels // places))
