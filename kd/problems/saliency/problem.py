"""Saliency: where people look on an image."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from kd.config.recipes import Model
from kd.metrics.registry import Metric
from kd.problems.base import Problem, Sampling, Split, Task, Teacher, TeacherView
from kd.problems.results import Results
from kd.problems.saliency.data import SaliencyDataset, open_fixations
from kd.problems.saliency.evaluation import SaliencyResults
from kd.problems.saliency.samples import SaliencySamples
from kd.problems.saliency.schema import SPEC, SaliencySection
from kd.problems.saliency.task import SALIENCY
from kd.problems.spec import ProblemSpec
from kd.problems.teacher_views import ImagesView

TEACHER_MAP = "teacher_saliency"  # a student's second map, which imitates the teacher's


class SaliencyProblem(Problem[SaliencyDataset]):
    """Images with people's fixations."""

    spec: ClassVar[ProblemSpec] = SPEC
    teacher_output: ClassVar[str] = SALIENCY
    cached_splits: ClassVar[tuple[Split, ...]] = ("train", "val")

    def open(self, section: SaliencySection) -> SaliencyDataset:
        """Open both splits; small ones are read once."""
        return open_fixations(section)

    def training(
        self, data: SaliencyDataset, sampling: Sampling, task: Task | None = None
    ) -> SaliencySamples:
        """Whole images, padded to one frame."""
        return data.padded(sampling.seed, sampling.cached)

    def evaluation(self, data: SaliencyDataset, split: Split = "val") -> SaliencySamples:
        """Whole images."""
        return data.whole(split, size=data.section.size)

    def teacher_view(
        self, teacher: Teacher, data: SaliencyDataset, split: Split, *, size: int | None = None
    ) -> TeacherView:
        """Whole images, by default scaled as in the teacher's training."""
        shown = size or getattr(teacher.section, "size", None)
        return ImagesView(
            data, split, data.split(split).images,
            lambda only: data.whole(split, size=shown, only=only), size=shown, resizes_maps=True,
        )  # fmt: skip

    def build_student(
        self,
        model: Model,
        data: SaliencyDataset,
        *,
        labelled: NDArray[np.int64] | None = None,
        context: bool = True,
        outputs: Collection[str] = (),
    ) -> nn.Module:
        """Build a saliency student; it has its second map where terms read that."""
        options = {**model.options, "branches": "b" if TEACHER_MAP in outputs else "a"}
        return self.named_student(model.name, options)

    def results(self, task: str, metrics: Mapping[str, Metric] | None = None) -> Results:
        """Saliency is scored image by image."""
        return SaliencyResults(metrics or {})


PROBLEM = SaliencyProblem()
