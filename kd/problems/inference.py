"""Prepare single images for a trained model and read its predictions, without a dataset."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from kd.data.loader import Sample
from kd.errors import UserError
from kd.report.boxes import xywh
from kd.utils.images import file_size, read_image, resize


@dataclass(frozen=True, kw_only=True)
class Prediction(ABC):
    """A model's prediction for one image; boxes and maps are in the pixels of the image.

    Attributes:
        size: Height and width of the image.
        class_names: Names of the C classes.
    """

    size: tuple[int, int]
    class_names: tuple[str, ...]

    @abstractmethod
    def draw(self, image: Tensor) -> Figure:
        """Draw the prediction over the image, (3, H, W) uint8."""

    def annotations(self) -> list[dict[str, Any]]:
        """COCO annotations with a `score`, and with `category_id` counted from 0; without ids."""
        return []

    def map_image(self) -> NDArray[Any] | None:
        """The predicted map as 8-bit grey values, (H, W); None if the model predicts no map."""
        return None


@dataclass(frozen=True)
class InputImage:
    """An image at its own size and at the size that a model reads.

    Attributes:
        pixels: (3, h, w) uint8, decoded for the model.
        size: Height and width of the image itself.
        boxes: Objects to classify, (K, 4) xyxy in pixels of the image itself; None: not given.
    """

    pixels: Tensor
    size: tuple[int, int]
    boxes: Tensor | None = None


class ExportGraph(nn.Module, ABC):
    """The exported part of a model: normalisation of images, the network, and decoding.

    All inputs and outputs have the batch or the number of objects as first dimension, which stays
    variable.

    Attributes:
        inputs: Name of each input -> what it must be, for the metadata of the exported file.
        outputs: Name of each output -> what it is.
        images_of_any_size: Whether height and width of the images stay variable.
    """

    inputs: ClassVar[Mapping[str, str]]
    outputs: Mapping[str, str]
    images_of_any_size: ClassVar[bool] = False

    def __init__(self, model: nn.Module, task: Any) -> None:
        super().__init__()
        self.model, self.task = model, task

    @abstractmethod
    def feed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs for a batch of evaluation samples (docs/batch.md)."""

    @abstractmethod
    def decoded(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Return what `Task.decode` would return, from the outputs of an exported graph."""


class Inference(ABC):
    """Converts images to a model's samples, and decoded outputs to predictions.

    Args:
        class_names: Names of the C classes.

    Attributes:
        needs_boxes: Whether the model classifies given boxes.
        one_size: Whether all images of a batch must have the same size.
        long_side: Long side in pixels at which image files are decoded; None: their own size.
    """

    needs_boxes: ClassVar[bool] = False
    one_size: ClassVar[bool] = False
    long_side: int | None = None

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)

    @abstractmethod
    def samples(self, image: InputImage) -> list[Sample]:
        """Make the samples of an image, as in evaluation, with the entries of docs/batch.md.

        An image has several if one pass would need too much memory.
        """

    def rows(self, sample: Sample) -> int:
        """Number of rows of the decoded output that belong to a sample."""
        return 1

    def graph(self, model: nn.Module, task: Any) -> ExportGraph:
        """Return the part of a model that is exported."""
        raise UserError("export: models of this problem cannot be exported yet")

    @abstractmethod
    def prediction(self, decoded: Tensor, image: InputImage) -> Prediction:
        """Convert the decoded rows of an image's samples, on the CPU, to its prediction."""

    def check_boxes(self, boxes: Tensor | None, size: tuple[int, int], where: str) -> Tensor | None:
        """Return an image's boxes as (K, 4) float32.

        Raises:
            UserError: The model needs boxes and there are none, or takes no boxes and got some; or
                a box has no area inside the image.
        """
        if boxes is None and self.needs_boxes:
            raise UserError(
                f"{where}: this model classifies objects in given boxes; pass boxes=[[x1, y1, x2, "
                "y2], ...] in pixels (kd predict: --annotations COCO.json)"
            )
        if boxes is None:
            return None
        if not self.needs_boxes:
            raise UserError(f"{where}: this model takes no boxes")
        found = torch.as_tensor(boxes, dtype=torch.float32)
        if found.ndim != 2 or found.shape[1] != 4:
            raise UserError(f"{where}: boxes must be (K, 4), got {tuple(found.shape)}")
        height, width = size
        inside = found.clamp(min=0).minimum(found.new_tensor([width, height, width, height]))
        sound = found.isfinite().all(dim=1) & (inside[:, 2:] > inside[:, :2]).all(dim=1)
        if not sound.all():
            row = int((~sound).nonzero()[0])
            raise UserError(
                f"{where}: box {row} {found[row].tolist()} has no area inside the image of "
                f"{width} x {height} pixels; boxes are x1, y1, x2, y2"
            )
        return found


def read_input(path: Path, long_side: int | None) -> InputImage:
    """Read an image file, rotated as its EXIF orientation says, for a model.

    The pixels are those that evaluation reads from the same file.
    """
    pixels = read_image(path, long_side, upright=True)
    return InputImage(pixels, file_size(path, upright=True))


def whole_sample(image: InputImage, size: tuple[int, int]) -> Sample:
    """Sample of a whole image resized to this height and width, for a model that predicts maps."""
    return {
        "images": resize(image.pixels, size),
        "sizes": torch.tensor(size),
        "own_sizes": torch.tensor(image.size),
    }


def box_annotations(boxes: Tensor, labels: Tensor, scores: Tensor) -> list[dict[str, Any]]:
    """COCO annotations of boxes (K, 4) xyxy, with classes and scores (K,)."""
    rows = zip(xywh(boxes).tolist(), labels.tolist(), scores.tolist(), strict=True)
    return [{"bbox": box, "category_id": label, "score": score} for box, label, score in rows]
