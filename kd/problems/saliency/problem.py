"""The problem of saliency prediction: opens datasets, builds students, and scores results."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

from torch import nn

from kd.config.recipes import Model
from kd.problems.base import Split
from kd.problems.images import ImageProblem
from kd.problems.inference import Inference
from kd.problems.results import Results
from kd.problems.saliency.data import SaliencyDataset, open_fixations
from kd.problems.saliency.evaluation import SaliencyResults
from kd.problems.saliency.inference import SaliencyInference
from kd.problems.saliency.schema import SPEC, SaliencySection
from kd.problems.saliency.task import SALIENCY, SECOND_MAP
from kd.problems.spec import ProblemSpec


class SaliencyProblem(ImageProblem[SaliencyDataset]):
    """Saliency prediction: images with people's fixations."""

    spec: ClassVar[ProblemSpec] = SPEC
    results_type: ClassVar[type[Results]] = SaliencyResults
    teacher_output: ClassVar[str] = SALIENCY
    cached_splits: ClassVar[tuple[Split, ...]] = ("train", "val")
    resizes_maps: ClassVar[bool] = True

    open = staticmethod(open_fixations)

    def build_student(
        self, model: Model, num_classes: int, *, prior: Sequence[float] | None = None,
        context: bool = True, outputs: Collection[str] = (),
    ) -> nn.Module:  # fmt: skip
        """Build a saliency student, with a second output map if a loss term reads one."""
        options = {**model.options, "branches": "b" if SECOND_MAP in outputs else "a"}
        return self.named_student(model.name, options)

    def inference(
        self, task: str, section: SaliencySection, class_names: Sequence[str]
    ) -> Inference:
        return SaliencyInference(class_names, section.size)


PROBLEM = SaliencyProblem()
