"""What a task is, and what it works on: batches, masks, means with their units.

A batch is a dict of tensors, `images` (N, 3, H, W) among them; `docs/batch.md` lists its keys.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    TypeVar,
    cast,
)

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kd.config.datasets import DatasetSection
from kd.config.recipes import Model, TaskSection
from kd.data.loader import Samples
from kd.errors import UserError
from kd.formats.coco import CocoIndex
from kd.metrics.kitti_ap import KittiTruth
from kd.metrics.registry import Metric as DeclaredMetric
from kd.problems.detection.metric import BoxTruth
from kd.problems.results import Results
from kd.problems.saliency.baselines import GazeTruth
from kd.problems.spec import ProblemSpec
from kd.registry import build, check_options, check_problem
from kd.storage.fields import CachedField
from students import STUDENTS
from teachers import TEACHERS

if TYPE_CHECKING:
    pass

Batch = Mapping[str, Tensor]
Output = Mapping[str, Tensor]
# Height and width of a feature map to the weights (K, h, w) of a mask on it.
Mask = Callable[[tuple[int, int]], Tensor]

KNOWN = "known"  # a unit: boxes about which a teacher was asked


class Mean(NamedTuple):
    """A scalar mean and the unit it was taken over, a key of `Task.counts`.

    Ranks and micro-batches hold unequal numbers of objects; with the unit their means can be put
    together to the mean of the whole batch. `judged` is what a critic learns from afterwards: both
    sides' maps and the images, detached.
    """

    value: Tensor
    unit: str
    judged: tuple[Tensor, ...] = ()

    def detach(self) -> Mean:
        """The same without a graph behind it."""
        return self._replace(value=self.value.detach())


class Classes(NamedTuple):
    """What a metric is told of a data set: the class names, C each of the rest.

    `prior` are the class fractions of the train objects; classes of one group in `confusable`
    (None: no group) look alike; `visible` maps image ids (K,) to how many other objects the image
    of each holds; `where` is what messages begin with; `truth` reads the boxes on the val images,
    as their JSON has them, and `kitti` the same as KITTI's difficulties ask for them; `gaze` is
    where people looked on the val images, and the references of saliency maps.
    """

    names: Sequence[str]
    prior: NDArray[np.float64] | None = None
    confusable: Sequence[str | None] | None = None
    visible: Callable[[NDArray[np.int64]], NDArray[np.int64]] | None = None
    where: str = "evaluation"
    truth: Callable[[], BoxTruth] | None = None
    kitti: Callable[[], KittiTruth] | None = None
    gaze: GazeTruth | None = None


class Collector(Protocol):
    """Takes in what a task decodes, of all ranks in the end."""

    def take(self, decoded: Tensor, batch: Batch) -> None:
        """Take in a batch's answers, as the task decoded them."""
        ...

    def gather(self) -> None:
        """Exchange with the other ranks."""
        ...


class Metric(Collector, Protocol):
    """Says how good the collected answers are."""

    def compute(self) -> dict[str, float]:
        """Every number by name, shares in 0..1."""
        ...

    def records(self) -> Mapping[str, NDArray[Any]]:
        """The arrays of `predictions.npz`."""
        ...

    def save_predictions(self, path: Path) -> None:
        """Write the answers and what is true as an .npz file."""
        ...


class Rows(NamedTuple):
    """What one row of a batch's outputs is about; without arguments, an image.

    Args:
        unit: What a row is: `images`, `hidden` (objects) or `boxes`, a key of a task's counts.
        images: The image that each row is on, (R,) int64; None: row n is image n.
        labels: Of the rows, (R,) int64, -1 where unlabelled.
        ids: Under which a teacher's outputs about the rows are cached, (R,) int64.
        hidden: Whether the teacher sees an input for each row, with its object hidden: then its
            feature maps have these rows as well, and it says something of every one.
    """

    unit: str = "images"
    images: Tensor | None = None
    labels: Tensor | None = None
    ids: Tensor | None = None
    hidden: bool = False

    @property
    def partial(self) -> bool:
        """Whether a teacher of hidden objects may have nothing to say about some rows."""
        return self.images is not None and not self.hidden


class ReadsOutputs(Protocol):
    """What a task must know of a distillation term."""

    @property
    def student(self) -> str:
        """The output or layer of the student that it reads."""
        ...

    @property
    def mask_value(self) -> float | None:
        """Of a mask with a number of its own, that number."""
        ...


class Task(Protocol):
    """One kind of problem: inputs, losses and decoding. A task is frozen and holds no model.

    Subclass it: the methods with a body are right where each row of an output is an image.
    """

    # What models give by name; what else a term names is a layer.
    outputs: ClassVar[Collection[str]] = ("logits",)
    # Masks that terms may name.
    mask_names: ClassVar[Collection[str]] = ()

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple[Tensor | None, ...]:
        """The arguments of the model; None for an input that it does not get."""

    @abstractmethod
    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Supervised losses, unweighted."""

    @abstractmethod
    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Predictions for `metric`: of most tasks log-probabilities of the rows, (R, C)."""

    @abstractmethod
    def metric(self, classes: Classes) -> Metric:
        """The metric of its predictions."""

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """Masks for distillation by name, with a row for each input of the teacher.

        `valid`, bool: the places where there is something to compare.
        """
        return {}

    def rows(self, batch: Batch) -> Rows:
        """What a row of the model's outputs is about."""
        return Rows()

    def counts(
        self, batch: Batch, units: Collection[str] = (), masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        """How much of each unit a batch holds, known before any model runs.

        Losses are means; with the counts those of micro-batches and processes are put together to
        the mean of the whole batch.

        Args:
            batch: On its device.
            units: Further units: masks that terms are means over, `valid`, or `frame` (all places).
            masks: Of the batch, if they were made already.
        """
        size = (batch["images"].shape[-2], batch["images"].shape[-1])
        found = self.masks(batch) if masks is None else masks
        counts = {name: found[name](size).sum().float() for name in units if name in found}
        if "valid" in found:
            images = found["valid"](size).flatten(1).any(dim=1)
            counts["valid_images"] = images.sum().float()
        return {"images": full_count(batch, "images"), **counts}

    def place_unit(self, mask: str, grid: tuple[int, int], batch: Batch) -> str:
        """The unit of a mean over a mask's places on a grid; `frame`: over all places."""
        return self.rows(batch).unit if mask == "frame" else mask

    def for_terms(self, terms: Sequence[ReadsOutputs]) -> Self:
        """The task of a student that learns from these terms, with the masks that they need."""
        return self

    def for_teaching(self, outputs: Collection[str]) -> Self:
        """The task of a teacher of which these outputs and layers alone are read in each step."""
        return self


Split = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How training samples are drawn from a dataset.

    Attributes:
        seed: Of everything random, 0 or more.
        epochs: Length of the training, for what changes over it.
        images: Ids of the images to sample; None: all.
        labelled: Ids of the images whose labels may be used; None: all.
        hide: Objects hidden in an image and epoch: one drawn at random, or each in turn. Only for
            problems that hide objects.
        cached: Teacher outputs that come with the samples.
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
        ...

    @property
    def section(self) -> DatasetSection:
        """As the recipe has it."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""
        ...

    @property
    def num_classes(self) -> int:
        """C."""
        ...

    def labelled(self, seed: int) -> NDArray[np.int64] | None:
        """Ids of the train images whose labels a student of this seed may use; None: all."""
        ...

    def class_info(self) -> Classes:
        """What a metric needs to know."""
        ...


class Teacher(Protocol):
    """A trained teacher."""

    @property
    def folder(self) -> Path:
        """Of its run."""
        ...

    @property
    def problem(self) -> Problem[Any]:
        """The problem that it was trained on."""
        ...

    @property
    def section(self) -> DatasetSection:
        """Of the data that it was trained on."""
        ...

    @property
    def model(self) -> nn.Module:
        """Frozen."""
        ...

    @property
    def task(self) -> Task:
        """How it is called and decoded."""
        ...


class TeacherView(Protocol):
    """A split as a teacher sees it when its outputs are cached, one record a row of its output."""

    @property
    def data(self) -> Dataset:
        """The dataset."""
        ...

    @property
    def unit(self) -> str:
        """What a record belongs to: objects or images."""
        ...

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """Of the images with records, (I,)."""
        ...

    @property
    def records_per_image(self) -> float:
        """On average."""
        ...

    @property
    def provenance(self) -> dict[str, str]:
        """What cached numbers depend on beside the teacher."""
        ...

    @property
    def grid(self) -> tuple[int, int] | None:
        """Height and width to which score maps are resized; None: all have one shape."""
        ...

    def samples(self, images: NDArray[np.int64] | None = None) -> Samples:
        """All images, or those with these ids."""
        ...

    def records(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids of a batch's records and the position in the batch of each one's image."""
        ...

    def mirrored(self, batch: Batch) -> dict[str, Tensor]:
        """The batch with its images mirrored left to right, each within its own size."""
        ...

    def moved(self, cached: Sequence[CachedField], augment: dict[str, Any]) -> Samples:
        """Training samples under another augmentation, with these outputs moved alike.

        Raises:
            UserError: Outputs of this problem are not compared with those of moved images.
        """
        ...


D = TypeVar("D", bound=Dataset)


class Problem(ABC, Generic[D]):
    """A kind of data with all that depends on it; one instance for each folder of `kd.problems`.

    Methods that not every problem has raise a `UserError` unless they are overridden.

    Attributes:
        spec: What can be said of it without torch: name, data section, tasks.
        teacher_output: What is cached of a teacher beside its layers.
        cached_splits: Those that `kd.cache` stores by default.
        hides_objects: Whether teachers see scenes with one object hidden: their posteriors of it
            are always cached, and they answer queries about the context of any region.
        task_needs_student: Whether a student's task depends on the network, say on its levels.
        some_posteriors: Whether students see all objects at once while a context teacher hides each
            in turn: then posteriors are cached, of some objects, and all other outputs are live.
        transferred: The student that has the trunk of a teacher's run; empty: none has.
        moves_cached_maps: Whether cached maps are moved with augmented images, which is measured.
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
            UserError: The data are not there, damaged, or of another kind.
        """

    def class_names(self, section: Any) -> tuple[str, ...]:
        """The class names of a dataset, read without its images where that is possible."""
        return self.open(section).class_names

    def train_annotations(self, section: Any) -> Path | None:
        """The COCO JSON of the train split, where the data have one that is there."""
        return None

    @abstractmethod
    def training(self, data: D, sampling: Sampling, task: Task | None = None) -> Samples:
        """Training samples; some tasks of teachers want more in them than others."""

    @abstractmethod
    def evaluation(self, data: D, split: Split = "val") -> Samples:
        """What a model is scored on."""

    def folds(self, data: D, count: int) -> list[NDArray[np.int64]]:
        """Ids of the train images that each fold's model learns from, all but the fold's own.

        Raises:
            UserError: Teachers of this problem are not trained by folds.
        """
        raise UserError(
            f"folds: are for teachers of hidden objects; these data are {self.spec.help}"
        )

    def cached_data(self, data: D) -> Dataset:
        """The dataset whose records are cached for students of this problem."""
        return data

    def object_ids(self, data: D) -> NDArray[np.int64]:
        """Annotation ids of the train objects that cached posteriors belong to.

        Raises:
            UserError: There are no such objects.
        """
        raise UserError(f"{data.section.name}: posteriors are of objects, not of {self.spec.help}")

    def teacher_view(
        self, teacher: Teacher, data: D, split: Split, *, size: int | None = None
    ) -> TeacherView:
        """A split as a teacher sees it when its outputs are cached.

        Args:
            teacher: The teacher.
            data: The dataset.
            split: Which of it.
            size: Long side in pixels; None: as in the teacher's training.

        Raises:
            UserError: Outputs of this problem are not cached, or not at another size.
        """
        raise UserError(
            f"{data.section.name}: outputs are not cached for {self.spec.help}; set "
            "soft_targets.kind=live"
        )

    # Models

    def build_teacher(self, model: Model, num_classes: int) -> nn.Module:
        """Build a teacher by name, at random weights or those that its options name."""
        teacher: nn.Module = build(
            TEACHERS, model.name, model.options, what="teacher", num_classes=num_classes
        )
        return teacher

    @abstractmethod
    def build_student(
        self,
        model: Model,
        data: D,
        *,
        labelled: NDArray[np.int64] | None = None,
        context: bool = True,
        outputs: Collection[str] = (),
    ) -> nn.Module:
        """Build a student by name.

        Args:
            model: Name and options.
            data: Its dataset.
            labelled: Ids of the images whose labels it may use; None: all.
            context: Whether it may have a context head; without, whatever the options say.
            outputs: Its outputs and layers that terms of its variant read.
        """

    def named_student(self, name: str, options: Mapping[str, Any], **given: Any) -> nn.Module:
        """Build one of this problem's students by name.

        Args:
            name: Of the registry, or `package.module:attribute`.
            options: The user's, checked against the builder.
            given: What the builder may want to know of the dataset.

        Raises:
            UserError: An unknown name, one for another problem, or wrong options.
        """
        check_problem(STUDENTS, name, self.spec.name, what="student")
        student: nn.Module = build(STUDENTS, name, options, what="student", **given)
        return student

    def resolve_student(self, model: Model) -> Model:
        """The section of a student with all that it refers to read, so that its run needs no other.

        Raises:
            UserError: What it refers to is not there.
        """
        return model

    def fit(self, model: nn.Module, data: D, images: NDArray[np.int64] | None = None) -> None:
        """Fit a model that counts rather than learns by gradient; others stay as they are."""

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
            model: Some models say what their task needs to know, such as a pyramid's levels.
            fractions: Of `class_fractions`; losses that need them raise without.

        Raises:
            UserError: An unknown task or option.
        """
        builder = self.spec.task(section.name).load()
        known: dict[str, Any] = {"num_classes": num_classes, **self.task_options(data)}
        for name in ("pictures", "levels", "loss_units"):
            if model is not None and hasattr(model, name):
                known[name] = getattr(model, name)
        known |= dict.fromkeys(("prior", "pixel_shares", "image_shares"))
        known |= {name: tuple(values.tolist()) for name, values in (fractions or {}).items()}
        fields = {field.name for field in dataclasses.fields(cast("type[Any]", builder))}
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
        """How common each class is among the train images, for tasks whose classes have weights.

        Args:
            section: The task.
            data: The dataset.
            images: Ids of the images to count on; None: all.
        """
        return {}

    def comparable_names(
        self, task: Task, names: Sequence[str], others: Sequence[str]
    ) -> tuple[str, ...]:
        """Names of a teacher's output channels as they are compared with a dataset's classes.

        Args:
            task: The teacher's.
            names: Of the classes that it was trained on.
            others: Of the dataset's classes.
        """
        return tuple(names)

    # Results

    @abstractmethod
    def results(self, task: str, metrics: Mapping[str, DeclaredMetric] | None = None) -> Results:
        """How the predictions of a task are scored, compared and drawn.

        Args:
            task: Its name.
            metrics: The user's by name.
        """


class ObjectScenes(Dataset, Protocol):
    """A dataset of objects in scenes, see `object_scenes`."""

    @property
    def section(self) -> Any:
        """Its section of the recipe, with `min_fraction` and `max_fraction` of objects."""
        ...

    @property
    def train(self) -> CocoIndex:
        """The train split."""
        ...

    @property
    def val(self) -> CocoIndex:
        """The val split."""
        ...

    def prior(self) -> NDArray[np.float64]:
        """Fractions of the classes among the train objects, (C,)."""
        ...

    def evaluated_on(self, val: CocoIndex) -> ObjectScenes:
        """The dataset with another val split, all of whose objects are scored at any size."""
        ...


def object_scenes(data: Dataset) -> ObjectScenes:
    """Return the dataset of a problem that hides objects.

    Raises:
        UserError: It is of another problem.
    """
    if not data.problem.hides_objects:
        raise UserError(
            f"{data.section.name}: data of {data.problem.spec.name}; objects with boxes are needed "
            "here"
        )
    return cast("ObjectScenes", data)


class HiddenObjects(Protocol):
    """How a context teacher sees scenes: what queries need of its data section."""

    @property
    def size(self) -> int:
        """Long side of images, pixels."""
        ...

    @property
    def shape(self) -> Literal["box", "square", "ellipse", "segment"]:
        """Of hidden regions."""
        ...

    @property
    def min_fraction(self) -> float:
        """Smallest hidden box in training, as a fraction of the image."""
        ...

    @property
    def max_fraction(self) -> float:
        """Largest."""
        ...

    @property
    def images(self) -> bool:
        """Whether images are read, or all grey."""
        ...


class ContextTask(Task, Protocol):
    """A task whose outputs are about hidden objects."""

    @property
    def num_classes(self) -> int:
        """C."""
        ...

    def outputs_per_region(self, size: int) -> int:
        """Numbers that a model gives for one hidden region of square images of this side."""
        ...


def context_task(teacher: Teacher) -> ContextTask:
    """The task of a context teacher; errors as of `hidden_objects`."""
    hidden_objects(teacher)
    return cast("ContextTask", teacher.task)


def hidden_objects(teacher: Teacher) -> HiddenObjects:
    """How a context teacher saw scenes in training.

    Raises:
        UserError: It was trained on another problem.
    """
    if not teacher.problem.hides_objects:
        raise UserError(
            f"{teacher.folder}: trained for {teacher.problem.spec.name}; a teacher of the context "
            "of objects is needed here"
        )
    return cast("HiddenObjects", teacher.section)


def full_count(batch: Batch, name: str) -> Tensor:
    """How many rows an entry of a batch has, on its device."""
    # Filled there: a copy to a GPU would wait for all that it still has to do.
    return torch.full((), float(len(batch[name])), device=batch["images"].device)


def named(output: Tensor | Output) -> dict[str, Tensor]:
    """A model's raw output by name; a lone tensor is its `logits`."""
    return {"logits": output} if isinstance(output, Tensor) else dict(output)


def cached_masks(masks: Mapping[str, Mask]) -> dict[str, Mask]:
    """Masks of a batch that are computed once for each grid, whoever asks for them how often."""
    return {name: functools.cache(mask) for name, mask in masks.items()}


def stride_of(pixels: int, places: int) -> int:
    """Pixels per place: the power of two that rounds up to so many places, if there is one.

    Else one that rounds down to them, as VGG and DenseNet do.
    """
    strides = [1 << power for power in range(pixels.bit_length() + 1)]
    up = [stride for stride in strides if -(-pixels // stride) == places]
    down = [stride for stride in strides if pixels // stride == places]
    return next(iter(up + down), -(-pixels // places))
