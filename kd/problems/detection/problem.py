"""The problem of object detection: opens datasets, builds students, and scores results."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from kd.config.recipes import Model
from kd.data.open_files import class_names
from kd.problems.base import Dataset, Problem, Sampling, Split, Task, Teacher, TeacherView
from kd.problems.detection.data import DetectionDataset, DetectionSamples, open_detection
from kd.problems.detection.evaluation import DetectionResults
from kd.problems.detection.inference import DetectionInference
from kd.problems.detection.schema import SPEC
from kd.problems.inference import Inference
from kd.problems.objects.schema import ObjectsSection
from kd.problems.results import Results
from kd.problems.spec import ProblemSpec


class DetectionProblem(Problem[DetectionDataset]):
    """Object detection: images with the boxes of all their objects."""

    spec: ClassVar[ProblemSpec] = SPEC
    results_type: ClassVar[type[Results]] = DetectionResults
    teacher_output: ClassVar[str] = "posterior"
    task_needs_student: ClassVar[bool] = True
    some_posteriors: ClassVar[bool] = True

    open = staticmethod(open_detection)

    def class_names(self, section: ObjectsSection) -> tuple[str, ...]:
        return class_names(section, layout=section.layout, classes=section.classes)

    def training(
        self, data: DetectionDataset, sampling: Sampling, task: Task | None = None
    ) -> DetectionSamples:
        """Training samples: the labelled images with all their boxes."""
        known = data.labelled(sampling.seed)
        return data.samples(
            "train", train=True, seed=sampling.seed, labelled=known, only=known,
            cached=sampling.cached,
        )  # fmt: skip

    def evaluation(self, data: DetectionDataset, split: Split = "val") -> DetectionSamples:
        return data.samples(split)

    def cached_data(self, data: DetectionDataset) -> Dataset:
        return data.objects

    def object_ids(self, data: DetectionDataset) -> NDArray[np.int64]:
        return data.train.object_ids.astype(np.int64)

    def teacher_view(
        self, teacher: Teacher, data: DetectionDataset, split: Split, *, size: int | None = None
    ) -> TeacherView:
        return data.objects.problem.teacher_view(teacher, data.objects, split, size=size)

    def build_student(
        self, model: Model, num_classes: int, *, prior: Sequence[float] | None = None,
        context: bool = True, outputs: Collection[str] = (),
    ) -> nn.Module:  # fmt: skip
        """Build a detector; initialise its context head, if it has one, with the class prior."""
        options = {**model.options, **({} if context else {"context": False})}
        given: dict[str, Any] = {"num_classes": num_classes}
        if options.get("context") and "prior" not in options:
            given["prior"] = prior
        return self.named_student(model.name, options, **given)

    def student_prior(
        self, data: DetectionDataset, labelled: NDArray[np.int64] | None = None
    ) -> Sequence[float]:
        prior: list[float] = data.prior(labelled).tolist()
        return prior

    def inference(
        self, task: str, section: ObjectsSection, class_names: Sequence[str]
    ) -> Inference:
        return DetectionInference(class_names, section.size)


PROBLEM = DetectionProblem()
