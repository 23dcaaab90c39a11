"""The problem of objects in scenes: context of hidden objects, classification, scene labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from kd.config.recipes import Model, TaskSection
from kd.data.open_files import class_names, train_annotations
from kd.errors import UserError
from kd.formats.class_maps import ClassMaps
from kd.formats.splits import fold_of
from kd.metrics.registry import Metric
from kd.nn.cooccurrence import Fitted
from kd.problems.base import Problem, Sampling, Split, Task, Teacher, TeacherView
from kd.problems.context import hidden_objects
from kd.problems.inference import Inference
from kd.problems.objects.baselines import index_objects
from kd.problems.objects.data import ObjectSamples, ObjectsDataset, ObjectsView, open_objects
from kd.problems.objects.evaluation import ObjectResults, SceneLabelResults
from kd.problems.objects.inference import ObjectInference, SceneInference
from kd.problems.objects.schema import SPEC, ObjectsSection
from kd.problems.objects.task import ContextMap
from kd.problems.objects.transfer_trunk import TRANSFERRED, resolved, take_trunk
from kd.problems.results import Results
from kd.problems.spec import ProblemSpec

BACKGROUND = "background"  # class 0 of score maps


class ObjectsProblem(Problem[ObjectsDataset]):
    """Images with annotated objects, which context teachers predict while they are hidden."""

    spec: ClassVar[ProblemSpec] = SPEC
    teacher_output: ClassVar[str] = "posterior"
    hides_objects: ClassVar[bool] = True
    moves_cached_maps: ClassVar[bool] = True
    transferred: ClassVar[str] = TRANSFERRED

    open = staticmethod(open_objects)

    def class_names(self, section: ObjectsSection) -> tuple[str, ...]:
        """Return the class names; images need not exist."""
        return class_names(section, layout=section.layout, classes=section.classes)

    def train_annotations(self, section: ObjectsSection) -> Path | None:
        return train_annotations(section, layout=section.layout, classes=section.classes)

    def training(
        self, data: ObjectsDataset, sampling: Sampling, task: Task | None = None
    ) -> ObjectSamples:
        """Return training scenes with hidden objects, with class maps if the task needs them."""
        maps = ClassMaps(data.train, data.section.size) if isinstance(task, ContextMap) else None
        return data.samples(
            "train", train=True, mode=sampling.hide, labelled=sampling.labelled,
            only=sampling.images, seed=sampling.seed, epochs=sampling.epochs,
            cached=sampling.cached, class_maps=maps,
        )  # fmt: skip

    def evaluation(self, data: ObjectsDataset, split: Split = "val") -> ObjectSamples:
        """Return the scenes of a split, in which each usable object is hidden in turn."""
        return data.samples(split)

    def folds(self, data: ObjectsDataset, count: int) -> list[NDArray[np.int64]]:
        """For each fold, return the image ids outside it. An image's id determines its fold."""
        ids = data.train.image_ids
        folds = fold_of(ids, count)
        return [np.asarray(ids[folds != number], dtype=np.int64) for number in range(count)]

    def object_ids(self, data: ObjectsDataset) -> NDArray[np.int64]:
        return data.train.object_ids.astype(np.int64)

    def teacher_view(
        self, teacher: Teacher, data: ObjectsDataset, split: Split, *, size: int | None = None
    ) -> TeacherView:
        """Return scenes at the teacher's image size in which each object is hidden in turn."""
        if size is not None:
            raise UserError(
                f"soft_targets.size={size}: not available for hidden objects, which are cached at "
                "the teacher's image size; leave soft_targets.size out"
            )
        return ObjectsView(data, hidden_objects(teacher), split)

    def build_student(
        self, model: Model, num_classes: int, *, prior: Sequence[float] | None = None,
        context: bool = True, outputs: Collection[str] = (),
    ) -> nn.Module:  # fmt: skip
        """Build a classifier; its context head is initialised with the class prior."""
        options = {**model.options, **({} if context else {"context": False})}
        given: dict[str, Any] = {"num_classes": num_classes, "prior": prior}
        if model.name == TRANSFERRED:
            given["trunk"], options = take_trunk(model.model_copy(update={"options": options}))
            given |= dict.fromkeys(("weights", "stride"))
        return self.named_student(model.name, options, **given)

    def student_prior(
        self, data: ObjectsDataset, labelled: NDArray[np.int64] | None = None
    ) -> Sequence[float]:
        """Class fractions of the usable train objects."""
        prior: list[float] = data.prior(labelled).tolist()
        return prior

    def resolve_student(self, model: Model) -> Model:
        """Replace the teacher's run in a transferred student's options by its teacher section."""
        return resolved(model)

    def inference(
        self, task: str, section: ObjectsSection, class_names: Sequence[str]
    ) -> Inference:
        """Objects are classified in given boxes, scenes as a whole."""
        kind = SceneInference if task == "scene_labels" else ObjectInference
        return kind(class_names, section.size)

    def fit(
        self, model: nn.Module, data: ObjectsDataset, images: NDArray[np.int64] | None = None
    ) -> None:
        """Fit a co-occurrence baseline to the train annotations; leave other models unchanged."""
        if isinstance(model, Fitted):
            model.fit(index_objects(data.train, images))

    def task_options(self, data: ObjectsSection) -> dict[str, Any]:
        """Return the task option `shape`, the shape of hidden regions, from the data section."""
        return {"shape": data.shape}

    def class_fractions(
        self, section: TaskSection, data: ObjectsDataset, images: NDArray[np.int64] | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """Return those of `prior`, `pixel_fractions`, `image_fractions` that the task needs."""
        fields = {field.name for field in dataclasses.fields(self.spec.task(section.name).load())}
        found = {} if "prior" not in fields else {"prior": data.prior(images)}
        if fields & {"pixel_fractions", "image_fractions"}:
            found |= data.class_fractions(images)
        return found

    def comparable_names(
        self, task: Task, names: Sequence[str], others: Sequence[str]
    ) -> tuple[str, ...]:
        """Name the teacher's channels. Score maps have a background channel first.

        The background is named only if the compared classes `others` also begin with it.
        """
        maps = isinstance(task, ContextMap) and others[0] == BACKGROUND != names[0]
        return (BACKGROUND, *names) if maps else tuple(names)

    def results(self, task: str, metrics: Mapping[str, Metric] | None = None) -> Results:
        """Return results scored by image for scene labels, by object for all other tasks."""
        return (SceneLabelResults if task == "scene_labels" else ObjectResults)(metrics or {})


PROBLEM = ObjectsProblem()
