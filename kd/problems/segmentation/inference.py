"""Predict label maps of single images, outside a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from kd.data.loader import Sample
from kd.problems.base import named
from kd.problems.inference import (
    ExportGraph,
    Inference,
    InputImage,
    Prediction,
    whole_sample,
)
from kd.problems.segmentation.data import input_size
from kd.problems.segmentation.task import on_grid
from kd.report.overlay import overlay_figure


@dataclass(frozen=True, kw_only=True)
class LabelMap(Prediction):
    """The predicted class of each pixel, (H, W) int64 in 0..C-1."""

    labels: Tensor

    def draw(self, image: Tensor) -> Figure:
        return overlay_figure(image, {"predicted": self.labels}, self.class_names)

    def map_image(self) -> NDArray[Any]:
        return self.labels.numpy().astype(np.uint8)


class SegmentationGraph(ExportGraph):
    """Segmentation model for export, with normalisation and argmax; takes images of any size."""

    inputs: ClassVar[Mapping[str, str]] = {
        "images": "uint8 RGB (N, 3, H, W); height and width are multiples of 16"
    }
    outputs: Mapping[str, str] = {
        "labels": "int64 (N, H, W), class of each pixel",
        "logits": "float32 (N, C, h, w), class logits on the network's grid",
    }
    images_of_any_size: ClassVar[bool] = True

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = named(self.model(*self.task.inputs({"images": images})))["logits"].float()
        return on_grid(logits, (images.shape[2], images.shape[3])).argmax(dim=1), logits

    def feed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"images": batch["images"]}

    def decoded(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        decoded: Tensor = self.task.decode({"logits": outputs["logits"]}, batch)
        return decoded


class SegmentationInference(Inference):
    """Predicts label maps of whole images.

    Images are scaled to a long side of `size` pixels; if None, they keep their size.
    """

    one_size: ClassVar[bool] = True

    def __init__(self, class_names: Sequence[str], size: int | None) -> None:
        super().__init__(class_names)
        self.size = size

    def samples(self, image: InputImage) -> list[Sample]:
        return [whole_sample(image, input_size(image.size, self.size))]

    def graph(self, model: nn.Module, task: Any) -> ExportGraph:
        return SegmentationGraph(model, task)

    def prediction(self, decoded: Tensor, image: InputImage) -> LabelMap:
        return LabelMap(size=image.size, class_names=self.class_names, labels=decoded[0])
