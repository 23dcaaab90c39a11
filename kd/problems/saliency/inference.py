"""Saliency maps of images without a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from kd.data.loader import Sample
from kd.problems.inference import Inference, InputImage, Prediction
from kd.problems.saliency.data import input_size
from kd.problems.saliency.evaluation import heated
from kd.report.style import INK, image_panels
from kd.utils.images import resize


@dataclass(frozen=True, kw_only=True)
class SaliencyMap(Prediction):
    """The density of fixations.

    Attributes:
        density: (H, W) float32 of sum 1.
    """

    density: Tensor

    def draw(self, image: Tensor) -> Figure:
        """Draw a heat map over the image."""
        figure, panels = image_panels(2, image.shape[1] / image.shape[2], most=2, across=3.0)
        heat = heated(image, self.density, top=float(self.density.max()))
        drawn = {"image": image.permute(1, 2, 0).numpy(), "predicted": heat}
        for axes, (title, pixels) in zip(panels, drawn.items(), strict=False):
            axes.imshow(pixels)
            axes.set_title(title, fontsize=8.5, color=INK, pad=3)
        return figure

    def map_image(self) -> NDArray[Any]:
        """The density, scaled so that its maximum is 255."""
        scaled = self.density / self.density.max().clamp(min=1e-30)
        return (scaled * 255).round().numpy().astype(np.uint8)


class SaliencyInference(Inference):
    """Predicts saliency maps of images scaled to fit a frame.

    Args:
        class_names: The single name `saliency`.
        frame: Height and width of the frame, pixels.
    """

    one_size: ClassVar[bool] = True

    def __init__(self, class_names: Sequence[str], frame: tuple[int, int]) -> None:
        super().__init__(class_names)
        self.frame = frame

    def samples(self, image: InputImage) -> list[Sample]:
        """Make the sample of a whole image."""
        pixels = resize(image.pixels, input_size(image.size, self.frame))
        sizes = {"sizes": torch.tensor(pixels.shape[1:]), "own_sizes": torch.tensor(image.size)}
        return [{"images": pixels, **sizes}]

    def prediction(self, decoded: Tensor, image: InputImage) -> SaliencyMap:
        """Return the density of an image."""
        return SaliencyMap(size=image.size, class_names=self.class_names, density=decoded[0, 0])
