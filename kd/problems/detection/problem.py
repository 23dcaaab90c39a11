"""Detection: every object of an image, in its box."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from kd.config.recipes import Model
from kd.data.open_files import class_names
from kd.metrics.registry import Metric
from kd.problems.base import Dataset, Problem, Sampling, Split, Task, Teacher, TeacherView
from kd.problems.detection.data import DetectionDataset
from kd.problems.detection.evaluation import DetectionResults
from kd.problems.detection.samples import DetectionSamples
from kd.problems.detection.schema import SPEC
from kd.problems.objects.data import open_objects
from kd.problems.objects.schema import ObjectsSection
from kd.problems.results import Results
from kd.problems.spec import ProblemSpec


class DetectionProblem(Problem[DetectionDataset]):
    """Objects with boxes, all of which are to be found."""

    spec: ClassVar[ProblemSpec] = SPEC
    teacher_output: ClassVar[str] = "posterior"
    task_needs_student: ClassVar[bool] = True
    some_posteriors: ClassVar[bool] = True

    def open(self, section: ObjectsSection) -> DetectionDataset:
        """Open both splits; the embedded scenes are rendered where they are not there yet."""
        return DetectionDataset(open_objects(section))

    def class_names(self, section: ObjectsSection) -> tuple[str, ...]:
        """The class names, without the images."""
        return class_names(section, layout=section.layout, classes=section.classes)

    def training(
        self, data: DetectionDataset, sampling: Sampling, task: Task | None = None
    ) -> DetectionSamples:
        """Images with all their boxes, those alone whose labels may be used."""
        known = data.labelled(sampling.seed)
        return data.samples(
            "train", train=True, labelled=known, only=known, seed=sampling.seed,
            cached=sampling.cached,
        )  # fmt: skip

    def evaluation(self, data: DetectionDataset, split: Split = "val") -> DetectionSamples:
        """Whole images with all their boxes."""
        return data.samples(split)

    def cached_data(self, data: DetectionDataset) -> Dataset:
        """A context teacher's posteriors are cached with each object hidden in turn."""
        return data.objects

    def object_ids(self, data: DetectionDataset) -> NDArray[np.int64]:
        """Annotation ids of the train objects; those that are too small to be hidden have none."""
        return data.objects.train.object_ids.astype(np.int64)

    def teacher_view(
        self, teacher: Teacher, data: DetectionDataset, split: Split, *, size: int | None = None
    ) -> TeacherView:
        """As a context teacher sees the objects."""
        return data.objects.problem.teacher_view(teacher, data.objects, split, size=size)

    def build_student(
        self,
        model: Model,
        data: DetectionDataset,
        *,
        labelled: NDArray[np.int64] | None = None,
        context: bool = True,
        outputs: Collection[str] = (),
    ) -> nn.Module:
        """Build a detector; a context head is told how common each class is."""
        options = {**model.options, **({} if context else {"context": False})}
        given: dict[str, Any] = {"num_classes": data.num_classes}
        if options.get("context") and "prior" not in options:
            given["prior"] = data.prior(labelled).tolist()
        return self.named_student(model.name, options, **given)

    def results(self, task: str, metrics: Mapping[str, Metric] | None = None) -> Results:
        """Boxes are matched image by image."""
        return DetectionResults(metrics or {})


PROBLEM = DetectionProblem()
