"""Interfaces of problems, datasets, tasks and metrics.

A batch is a dict of tensors that includes `images` (N, 3, H, W); `docs/batch.md` lists all keys.
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
from kd.problems.inference import Inference
from kd.problems.results import Results
from kd.problems.spec import ProblemSpec
from kd.registry import build, check_options, check_problem
from kd.storage.fields import CachedField
from students import STUDENTS
from teachers import TEACHERS

Batch = Mapping[str, Tensor]
Output = Mapping[str, Tensor]
# Maps the height and width of a feature map to a mask's weights (K, h, w).
Mask = Callable[[tuple[int, int]], Tensor]

KNOWN = "known"  # unit of means over boxes with cached teacher outputs


class Mean(NamedTuple):
    """A scalar mean and the unit it averages over, such as images.

    Ranks and micro-batches differ in the number of units, so callers weight each mean by its count.

    Attributes:
        value: The mean.
        unit: A key of `Task.counts`.
        judged: Detached training inputs of a critic: student map, teacher map and images.
    """

    value: Tensor
    unit: str
    judged: tuple[Tensor, ...] = ()

    def detach(self) -> Mean:
        """Return a copy whose value is detached from the graph."""
        return self._replace(value=self.value.detach())


class Classes(NamedTuple):
    """Class names, class statistics and ground truth of a dataset, for its metric.

    Attributes:
        names: C class names.
        prior: Class fractions of the train objects, (C,).
        confusable: For each of the C classes, the name of its group of confusable classes, or None.
        visible: Maps image ids (K,) to the number of objects in each image besides the hidden one,
            (K,).
        where: Prefix of error messages.
        truth: Returns the val split's ground truth in the metric's format; None if batches contain
            it.
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
        """Add the predictions of a batch, as `Task.decode` returns them."""

    def gather(self) -> None:
        """Merge the predictions of all ranks. Every rank must call this."""


class Evaluator(Collector, Protocol):
    """A collector that also scores the collected predictions."""

    def compute(self) -> dict[str, float]:
        """Compute all metrics by name. Fractions are in 0..1, not in percent."""

    def records(self) -> Mapping[str, NDArray[Any]]:
        """Return the arrays to store in `predictions.npz`."""

    def save_predictions(self, path: Path) -> None:
        """Write predictions and ground truth as an .npz file."""


class Rows(NamedTuple):
    """Describe the rows of a batch's outputs. By default, each row is an image.

    Attributes:
        unit: What a row is: `images`, `hidden` (objects) or `boxes`. A key of `Task.counts`.
        images: Batch index of each row's image, (R,) int64; None if row n is image n.
        labels: Class of each row, (R,) int64, -1 if unlabelled.
        ids: Cache keys of the rows' teacher outputs, (R,) int64.
        hidden: True if the teacher gets one input per row, with that row's object hidden. Teacher
            feature maps then have R rows too, and no row lacks a teacher output.
    """

    unit: str = "images"
    images: Tensor | None = None
    labels: Tensor | None = None
    ids: Tensor | None = None
    hidden: bool = False

    @property
    def partial(self) -> bool:
        """True if some rows may lack a teacher output."""
        return self.images is not None and not self.hidden


class ReadsOutputs(Protocol):
    """The attributes of a distillation term that tasks use.

    Attributes:
        student: Name of the student output or layer that the term uses.
        mask_value: Parameter of the term's mask, such as `psi`; None if the mask has no parameter.
    """

    @property
    def student(self) -> str: ...
    @property
    def mask_value(self) -> float | None: ...


class Task(Protocol):
    """Inputs, losses and decoding of one kind of problem. Tasks are frozen and hold no model.

    The default methods are for outputs with one row per image.

    Attributes:
        outputs: Names of model outputs that distillation terms may use. Other names are layer
            paths.
        class_scores: Names of outputs with the classes in dimension 1.
        mask_names: Names of masks that distillation terms may use.
    """

    outputs: ClassVar[Collection[str]] = ("logits",)
    class_scores: ClassVar[Collection[str]] = ()
    mask_names: ClassVar[Collection[str]] = ()

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple[Tensor | None, ...]:
        """Return the positional arguments of the model's `forward`."""

    @abstractmethod
    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Compute the unweighted supervised losses by name."""

    @abstractmethod
    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Return predictions for the evaluator, usually log-probabilities of the rows, (R, C)."""

    @abstractmethod
    def metric(self, classes: Classes) -> Evaluator:
        """Build the evaluator of the task's predictions."""

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """Return masks by name; dimension 0 matches the teacher's input batch.

        `valid` is boolean: true for grid cells that students and teachers can be compared on, such
        as cells inside the images.
        """
        return {}

    def rows(self, batch: Batch) -> Rows:
        """Describe the rows of the model's outputs."""
        return Rows()

    def counts(
        self, batch: Batch, units: Collection[str] = (), masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        """Count the units in a batch, before any model runs.

        Counts are the weights for combining the means of micro-batches and ranks.

        Args:
            batch: The batch, on its device.
            units: Additional units to count: mask names, `valid`, or `frame` (all grid cells).
            masks: The result of `masks(batch)`, if already computed.
        """
        size = (batch["images"].shape[-2], batch["images"].shape[-1])
        found = self.masks(batch) if masks is None else masks
        counts = {name: found[name](size).sum().float() for name in units if name in found}
        if "valid" in found:
            images = found["valid"](size).flatten(1).any(dim=1)
            counts["valid_images"] = images.sum().float()
        return {"images": full_count(batch, "images"), **counts}

    def place_unit(self, mask: str, grid: tuple[int, int], batch: Batch) -> str:
        """Key in `counts` of the number of grid cells in a mask; the mask `frame` has all cells."""
        return self.rows(batch).unit if mask == "frame" else mask

    def for_terms(self, terms: Sequence[ReadsOutputs]) -> Self:
        """Return a task that provides the masks and outputs that these distillation terms need."""
        return self

    def for_teaching(self, outputs: Collection[str]) -> Self:
        """Return a task for a live teacher of which only these outputs or layers are used."""
        return self


Split = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options for the training samples of a dataset.

    Attributes:
        seed: Random seed, at least 0.
        epochs: Number of training epochs, for schedules.
        images: Ids of the images to sample; None: all.
        labelled: Ids of the images whose labels may be used; None: all.
        hide: Hide `one` random object of each image or `all` in turn. Ignored by other problems.
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
    """A dataset whose files were located and checked. `section` is the recipe's data section."""

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
        """Return ids of the train images whose labels this seed's student may use; None: all."""
        return None

    @abstractmethod
    def class_info(self) -> Classes:
        """Return class names, class statistics and ground truth for the metric."""


S = TypeVar("S")


@dataclass(frozen=True)
class SplitDataset(Dataset, Generic[S]):
    """A dataset with one index of images and annotations per split."""

    train: S
    val: S

    def split(self, name: Split) -> S:
        """Return the index of the train or val split."""
        return self.train if name == "train" else self.val


class Teacher(Protocol):
    """A trained teacher: run folder, problem, data section of its recipe, frozen model and task."""

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
    """A split as teacher input, used to cache the teacher's outputs.

    The cache stores one record for each row of the teacher's output.

    Attributes:
        unit: What a record belongs to: `objects` or `images`.
        image_ids: Ids of the images with records, (I,).
        records_per_image: Average number of records per image.
        provenance: Dataset and transform that the outputs depend on, for the cache's manifest.
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
        """Return samples of all images, or of the images with these ids."""

    def records(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the record ids of a batch, (R,), and the batch index of each record's image."""

    def mirrored(self, batch: Batch) -> dict[str, Tensor]:
        """Mirror the batch's images left to right, leaving their padding in place."""

    def moved(self, cached: Sequence[CachedField], augment: dict[str, Any]) -> Samples:
        """Return augmented training samples with cached maps transformed like the images.

        Raises:
            UserError: The problem does not support this.
        """


D = TypeVar("D", bound=Dataset)


class Problem(ABC, Generic[D]):
    """A kind of data, with its datasets, models, tasks and metrics.

    Methods for optional features raise a `UserError` unless a subclass overrides them.

    Attributes:
        spec: Name, data section and tasks, importable without torch.
        teacher_output: Name of the teacher output that is cached in addition to layers.
        cached_splits: Splits that `kd.cache` caches by default.
        hides_objects: Whether teachers predict the class of a hidden object. If so, their
            posteriors are always cached, and they can be queried about the context of any region.
        task_needs_student: Whether a student's task depends on its network, e.g. on pyramid
            strides.
        some_posteriors: Whether the student sees all objects at once but its context teacher hides
            one at a time. If so, posteriors are cached (some may be missing), all other outputs
            computed live.
        moves_cached_maps: Whether cached maps can be transformed like augmented images.
        transferred: Name of the student that uses the trunk of a teacher's run; "" if there is
            none.
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
        """Open and check both splits of a dataset.

        Raises:
            UserError: Files are missing, corrupt, or in another format.
        """

    def class_names(self, section: Any) -> tuple[str, ...]:
        """Read a dataset's class names, without its images where possible."""
        return self.open(section).class_names

    def train_annotations(self, section: Any) -> Path | None:
        """Return the path of the train split's COCO JSON, if it has one."""
        return None

    @abstractmethod
    def training(self, data: D, sampling: Sampling, task: Task | None = None) -> Samples:
        """Return samples of the train split, with any extra batch entries that the task needs."""

    @abstractmethod
    def evaluation(self, data: D, split: Split = "val") -> Samples:
        """Return samples of a split without augmentation."""

    def folds(self, data: D, count: int) -> list[NDArray[np.int64]]:
        """For each of `count` folds, return the ids of the train images outside the fold."""
        raise UserError(
            f"folds: only context teachers support folds; this dataset contains {self.spec.help}"
        )

    def cached_data(self, data: D) -> Dataset:
        """Return the dataset on which teachers run to cache outputs for this problem's students."""
        return data

    def object_ids(self, data: D) -> NDArray[np.int64]:
        """Return the annotation ids of the train objects, the keys of cached posteriors."""
        raise UserError(
            f"{data.section.name}: posteriors need objects; this dataset contains {self.spec.help}"
        )

    def teacher_view(
        self, teacher: Teacher, data: D, split: Split, *, size: int | None = None
    ) -> TeacherView:
        """Prepare a split as teacher input for caching.

        `size` is the long side of the images in pixels; None: the size used to train the teacher.

        Raises:
            UserError: The problem does not support caching, or not at this size.
        """
        raise UserError(
            f"{data.section.name}: teacher outputs for {self.spec.help} cannot be cached; set "
            "soft_targets.kind=live"
        )

    # Models

    def build_teacher(self, model: Model, num_classes: int) -> nn.Module:
        """Build a teacher, with random weights unless its options specify pretrained ones."""
        teacher: nn.Module = build(
            TEACHERS, model.name, model.options, what="teacher", num_classes=num_classes
        )
        return teacher

    def build_student(
        self, model: Model, num_classes: int, *, prior: Sequence[float] | None = None,
        context: bool = True, outputs: Collection[str] = (),
    ) -> nn.Module:  # fmt: skip
        """Build a student by name, without its dataset.

        Args:
            model: Name and options.
            num_classes: C.
            prior: Class probabilities, (C,), see `student_prior`; None: uniform.
            context: If False, build no context head, even if the options ask for one.
            outputs: Student outputs and layers that distillation terms use.
        """
        return self.named_student(model.name, model.options, num_classes=num_classes)

    def student_prior(
        self, data: D, labelled: NDArray[np.int64] | None = None
    ) -> Sequence[float] | None:
        """Class probabilities that students start from, on train images with these ids or all."""
        return None

    def named_student(self, name: str, options: Mapping[str, Any], **given: Any) -> nn.Module:
        """Build one of this problem's students by name.

        Args:
            name: A registered name, or `package.module:attribute`.
            options: Options from the recipe, checked against the builder's parameters.
            given: Arguments computed from the dataset, passed on if the builder accepts them.

        Raises:
            UserError: The name is unknown or belongs to another problem, or an option is invalid.
        """
        check_problem(STUDENTS, name, self.spec.name, what="student")
        student: nn.Module = build(STUDENTS, name, options, what="student", **given)
        return student

    def resolve_student(self, model: Model) -> Model:
        """Replace references to other runs in a student section by the content they refer to."""
        return model

    def fit(self, model: nn.Module, data: D, images: NDArray[np.int64] | None = None) -> None:
        """Fit a model that is estimated from counts; leave all other models unchanged."""

    def inference(self, task: str, section: Any, class_names: Sequence[str]) -> Inference:
        """Return the `Inference` of a task's models, which does not need the dataset.

        Args:
            task: Name of the task.
            section: The data section of the model's recipe.
            class_names: The C classes that the model was trained on.
        """
        raise UserError(f"task {task}: its models cannot be used without their dataset yet")

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
            num_classes: Number of classes, C.
            model: The network. Some of its attributes, such as pyramid levels, set task options.
            fractions: Result of `class_fractions`, required for losses with class weights.

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
        """Return the task options that the data section determines."""
        return {}

    def class_fractions(
        self, section: TaskSection, data: D, images: NDArray[np.int64] | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """Compute class fractions, for class weights, of these train images (None: all)."""
        return {}

    def comparable_names(
        self, task: Task, names: Sequence[str], others: Sequence[str]
    ) -> tuple[str, ...]:
        """Name the output channels of a teacher with the classes `names`.

        `others` are the class names of the dataset on which the teacher's outputs are compared.
        """
        return tuple(names)

    # Results

    def results(self, task: str, metrics: Mapping[str, Metric] | None = None) -> Results:
        """Return scores, tables and figures for a task. `metrics` are custom metrics by name."""
        return self.results_type(metrics or {})


def full_count(batch: Batch, name: str) -> Tensor:
    """Return the length of a batch entry as a scalar tensor on the batch's device."""
    # Create the tensor on the device, because a copy to the GPU would wait for pending work.
    return torch.full((), float(len(batch[name])), device=batch["images"].device)


def named(output: Tensor | Output) -> dict[str, Tensor]:
    """Return a model's raw output as a dict. A single tensor gets the name `logits`."""
    return {"logits": output} if isinstance(output, Tensor) else dict(output)


def cached_masks(masks: Mapping[str, Mask]) -> dict[str, Mask]:
    """Wrap masks so that each is computed only once per grid size."""
    return {name: functools.cache(mask) for name, mask in masks.items()}


def stride_of(pixels: int, places: int) -> int:
    """Return the stride of a feature map with `places` cells along a side of `pixels` pixels.

    The stride is the power of two for which `pixels / stride`, rounded up, equals `places`. If
    there is none, round down instead, as VGG and DenseNet do.
    """
    strides = [1 << power for power in range(pixels.bit_length() + 1)]
    up = [stride for stride in strides if -(-pixels // stride) == places]
    down = [stride for stride in strides if pixels // stride == places]
    return next(iter(up + down), -(-pixels // places))
