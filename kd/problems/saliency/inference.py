"""Predict saliency maps of single images, outside a dataset."""

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
from kd.problems.saliency.data import input_size
from kd.problems.saliency.evaluation import heated
from kd.problems.saliency.task import SALIENCY, density_of
from kd.problems.segmentation.task import on_grid
from kd.report.style import INK, image_panels
from kd.transforms.hide import normalise


@dataclass(frozen=True, kw_only=True)
class SaliencyMap(Prediction):
    """The predicted density of fixations, (H, W) float32 with sum 1."""

    density: Tensor

    def draw(self, image: Tensor) -> Figure:
        figure, panels = image_panels(2, image.shape[1] / image.shape[2], most=2, across=3.0)
        heat = heated(image, self.density, top=float(self.density.max()))
        drawn = {"image": image.permute(1, 2, 0).numpy(), "predicted": heat}
        for axes, (title, pixels) in zip(panels, drawn.items(), strict=False):
            axes.imshow(pixels)
            axes.set_title(title, fontsize=8.5, color=INK, pad=3)
        return figure

    def map_image(self) -> NDArray[Any]:
        """The density as (H, W) uint8, scaled so that its maximum is 255."""
        scaled = self.density / self.density.max().clamp(min=1e-30)
        return (scaled * 255).round().numpy().astype(np.uint8)


class SaliencyGraph(ExportGraph):
    """Saliency model for export, with normalisation; takes images of any size."""

    inputs: ClassVar[Mapping[str, str]] = {
        "images": "uint8 RGB (N, 3, H, W); height and width are multiples of 8"
    }
    outputs: Mapping[str, str] = {
        "density": "float32 (N, 1, H, W) of sum 1",
        "logits": "float32 (N, 1, h, w), on the network's grid",
    }
    images_of_any_size: ClassVar[bool] = True

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = named(self.model(normalise(images)))[SALIENCY].float()
        full = on_grid(logits, (images.shape[2], images.shape[3]))
        return density_of(full, published=self.task.published), logits

    def feed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"images": batch["images"]}

    def decoded(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        decoded: Tensor = self.task.decode({SALIENCY: outputs["logits"]}, batch)
        return decoded


class SaliencyInference(Inference):
    """Predicts saliency maps of images scaled to fit a frame of (height, width) pixels."""

    one_size: ClassVar[bool] = True

    def __init__(self, class_names: Sequence[str], frame: tuple[int, int]) -> None:
        super().__init__(class_names)
        self.frame = frame

    def samples(self, image: InputImage) -> list[Sample]:
        return [whole_sample(image, input_size(image.size, self.frame))]

    def graph(self, model: nn.Module, task: Any) -> ExportGraph:
        return SaliencyGraph(model, task)

    def prediction(self, decoded: Tensor, image: InputImage) -> SaliencyMap:
        return SaliencyMap(size=image.size, class_names=self.class_names, density=decoded[0, 0])
