"""Saliency as a problem: its data, students and results."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from torch import nn

from kd.config.recipes import Model
from kd.metrics.registry import Metric
from kd.problems.base import Split, Teacher, TeacherView
from kd.problems.images import ImageProblem
from kd.problems.results import Results
from kd.problems.saliency.data import SaliencyDataset, open_fixations
from kd.problems.saliency.evaluation import SaliencyResults
from kd.problems.saliency.schema import SPEC, SaliencySection
from kd.problems.saliency.task import SALIENCY, SECOND_MAP
from kd.problems.spec import ProblemSpec
from kd.problems.teacher_views import ImagesView


class SaliencyProblem(ImageProblem[SaliencyDataset]):
    """Images with people's fixations."""

    spec: ClassVar[ProblemSpec] = SPEC
    teacher_output: ClassVar[str] = SALIENCY
    cached_splits: ClassVar[tuple[Split, ...]] = ("train", "val")

    def open(self, section: SaliencySection) -> SaliencyDataset:
        """Open both splits; small ones are read and checked."""
        return open_fixations(section)

    def teacher_view(
        self, teacher: Teacher, data: SaliencyDataset, split: Split, *, size: int | None = None
    ) -> TeacherView:
        """Whole images, by default scaled as in the teacher's training."""
        scaled = size or getattr(teacher.section, "size", None)
        return ImagesView(
            data, split, data.split(split).images,
            lambda only: data.whole(split, size=scaled, only=only), size=scaled, resizes_maps=True,
        )  # fmt: skip

    def build_student(
        self, model: Model, data: SaliencyDataset, *, outputs: Collection[str] = (), **_: Any
    ) -> nn.Module:
        """Build a saliency student, with a second map if terms read it."""
        options = {**model.options, "branches": "b" if SECOND_MAP in outputs else "a"}
        return self.named_student(model.name, options)

    def results(self, task: str, metrics: Mapping[str, Metric] | None = None) -> Results:
        """Results from metrics of each image's map."""
        return SaliencyResults(metrics or {})


PROBLEM = SaliencyProblem()
