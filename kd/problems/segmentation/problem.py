"""Semantic segmentation as a problem: its data, students and results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from kd.config.recipes import Model, TaskSection
from kd.metrics.registry import Metric
from kd.problems.base import Split, Teacher, TeacherView
from kd.problems.images import ImageProblem
from kd.problems.results import Results
from kd.problems.segmentation.data import SegmentationDataset, open_maps
from kd.problems.segmentation.evaluation import SegmentationResults
from kd.problems.segmentation.schema import SPEC, SegmentationSection
from kd.problems.spec import ProblemSpec
from kd.problems.teacher_views import ImagesView


class SegmentationProblem(ImageProblem[SegmentationDataset]):
    """Images with label maps."""

    spec: ClassVar[ProblemSpec] = SPEC

    def open(self, section: SegmentationSection) -> SegmentationDataset:
        """Open both splits; small ones are read and checked."""
        return open_maps(section)

    def teacher_view(
        self, teacher: Teacher, data: SegmentationDataset, split: Split, *, size: int | None = None
    ) -> TeacherView:
        """Whole images, by default at the long side of the teacher's training."""
        if size is None:
            own = getattr(teacher.section, "size", None)
            size = max(own) if isinstance(own, tuple) else own
        return ImagesView(
            data, split, data.split(split).images,
            lambda only: data.whole(split, size=size, only=only), size=size, resizes_maps=False,
        )  # fmt: skip

    def build_student(self, model: Model, data: SegmentationDataset, **_: Any) -> nn.Module:
        """Build a segmentation network."""
        return self.named_student(model.name, model.options, num_classes=data.num_classes)

    def class_fractions(
        self, section: TaskSection, data: SegmentationDataset,
        images: NDArray[np.int64] | None = None,
    ) -> dict[str, NDArray[np.float64]]:  # fmt: skip
        """`pixel_fractions`, if the task weights classes."""
        return data.class_fractions() if section.options.get("class_weights") else {}

    def results(self, task: str, metrics: Mapping[str, Metric] | None = None) -> Results:
        """Results from confusion matrices per image."""
        return SegmentationResults(metrics or {})


PROBLEM = SegmentationProblem()
