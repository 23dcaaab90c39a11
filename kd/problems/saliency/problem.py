"""The problem of saliency prediction: opens datasets, builds students, and scores results."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from torch import nn

from kd.config.recipes import Model
from kd.problems.base import Split
from kd.problems.images import ImageProblem
from kd.problems.results import Results
from kd.problems.saliency.data import SaliencyDataset, open_fixations
from kd.problems.saliency.evaluation import SaliencyResults
from kd.problems.saliency.schema import SPEC
from kd.problems.saliency.task import SALIENCY, SECOND_MAP
from kd.problems.spec import ProblemSpec


class SaliencyProblem(ImageProblem[SaliencyDataset]):
    """Images with people's fixations."""

    spec: ClassVar[ProblemSpec] = SPEC
    results_type: ClassVar[type[Results]] = SaliencyResults
    teacher_output: ClassVar[str] = SALIENCY
    cached_splits: ClassVar[tuple[Split, ...]] = ("train", "val")
    resizes_maps: ClassVar[bool] = True

    open = staticmethod(open_fixations)

    def build_student(
        self, model: Model, data: SaliencyDataset, *, outputs: Collection[str] = (), **_: Any
    ) -> nn.Module:
        """Build a saliency student, with a second output map if a term reads it."""
        options = {**model.options, "branches": "b" if SECOND_MAP in outputs else "a"}
        return self.named_student(model.name, options)


PROBLEM = SaliencyProblem()
