"""Predict label maps of single images, outside a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from kd.data.loader import Sample
from kd.problems.base import named
from kd.problems.inference import ExportGraph, Inference, InputImage, Prediction
from kd.problems.segmentation.data import input_size
from kd.problems.segmentation.task import on_grid
from kd.report.overlay import overlay_figure
from kd.utils.images import resize


@dataclass(frozen=True, kw_only=True)
class LabelMap(Prediction):
    """The predicted class of each pixel, (H, W) int64 in 0..C-1."""

    labels: Tensor

    def draw(self, image: Tensor) -> Figure:
        """Draw the classes as colours over the image."""
        return overlay_figure(image, {"predicted": self.labels}, self.class_names)

    def map_image(self) -> NDArray[Any]:
        """The class index of each pixel, (H, W) uint8."""
        return self.labels.numpy().astype(np.uint8)


class SegmentationGraph(ExportGraph):
    """A segmentation model for export: returns pixel classes and logits of images of any size."""

    inputs: ClassVar[Mapping[str, str]] = {
        "images": "uint8 RGB (N, 3, H, W); height and width are multiples of 16"
    }
    outputs: Mapping[str, str] = {
        "labels": "int64 (N, H, W), class of each pixel",
        "logits": "float32 (N, C, h, w), class logits on the network's grid",
    }
    images_of_any_size: ClassVar[bool] = True

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixel classes, (N, H, W), and the logits, (N, C, h, w)."""
        logits = named(self.model(*self.task.inputs({"images": images})))["logits"].float()
        return on_grid(logits, (images.shape[2], images.shape[3])).argmax(dim=1), logits

    def feed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch's images."""
        return {"images": batch["images"]}

    def decoded(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the class of each pixel at the size of the image files."""
        decoded: Tensor = self.task.decode({"logits": outputs["logits"]}, batch)
        return decoded


class SegmentationInference(Inference):
    """Predicts label maps of whole images.

    Args:
        class_names: Names of the C classes.
        size: Long side to which images are scaled, pixels; None: images keep their size.
    """

    one_size: ClassVar[bool] = True

    def __init__(self, class_names: Sequence[str], size: int | None) -> None:
        super().__init__(class_names)
        self.size = size

    def samples(self, image: InputImage) -> list[Sample]:
        """Make a single sample from the whole image."""
        pixels = resize(image.pixels, input_size(image.size, self.size))
        sizes = {"sizes": torch.tensor(pixels.shape[1:]), "own_sizes": torch.tensor(image.size)}
        return [{"images": pixels, **sizes}]

    def graph(self, model: nn.Module, task: Any) -> ExportGraph:
        """Build the export graph, which includes normalisation and the argmax over classes."""
        return SegmentationGraph(model, task)

    def prediction(self, decoded: Tensor, image: InputImage) -> LabelMap:
        """Wrap the label map (1, H, W) as the image's prediction."""
        return LabelMap(size=image.size, class_names=self.class_names, labels=decoded[0])
