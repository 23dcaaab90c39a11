"""The problem of semantic segmentation: opens datasets and scores results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kd.config.recipes import TaskSection
from kd.problems.images import ImageProblem
from kd.problems.inference import Inference
from kd.problems.results import Results
from kd.problems.segmentation.data import SegmentationDataset, open_maps
from kd.problems.segmentation.evaluation import SegmentationResults
from kd.problems.segmentation.inference import SegmentationInference
from kd.problems.segmentation.schema import SPEC, SegmentationSection
from kd.problems.spec import ProblemSpec


class SegmentationProblem(ImageProblem[SegmentationDataset]):
    """Semantic segmentation: images with label maps."""

    spec: ClassVar[ProblemSpec] = SPEC
    results_type: ClassVar[type[Results]] = SegmentationResults

    open = staticmethod(open_maps)

    def class_fractions(
        self, section: TaskSection, data: SegmentationDataset,
        images: NDArray[np.int64] | None = None,
    ) -> dict[str, NDArray[np.float64]]:  # fmt: skip
        """Compute `pixel_fractions` for the task if its option `class_weights` is set."""
        return data.class_fractions() if section.options.get("class_weights") else {}

    def inference(
        self, task: str, section: SegmentationSection, class_names: Sequence[str]
    ) -> Inference:
        return SegmentationInference(class_names, section.size)


PROBLEM = SegmentationProblem()
