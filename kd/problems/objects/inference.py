"""Classes of objects in given boxes, and of whole scenes, without a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from kd.data.loader import Sample
from kd.problems.base import named
from kd.problems.inference import (
    ExportGraph,
    Inference,
    InputImage,
    Prediction,
    box_annotations,
)
from kd.problems.objects.batch import hidden_boxes, image_rows
from kd.report.boxes import RIGHT, Marked, boxes_figure, xywh
from kd.report.style import INK, image_panels
from kd.transforms.augment import pad
from kd.utils.images import resize, scaled_size

MOST_BOXES = 64  # that one pass classifies: a context teacher gets an image for each


@dataclass(frozen=True, kw_only=True)
class ObjectClasses(Prediction):
    """The class of the object in each given box.

    Attributes:
        boxes: The given boxes, (K, 4) xyxy pixels.
        log_probs: (K, C).
    """

    boxes: Tensor
    log_probs: Tensor

    @property
    def labels(self) -> Tensor:
        """The most probable class of each object, (K,) int64."""
        return self.log_probs.argmax(dim=1)

    @property
    def scores(self) -> Tensor:
        """The probability of that class, (K,)."""
        return self.log_probs.amax(dim=1).exp()

    @property
    def names(self) -> list[str]:
        """The name of that class for each object."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def annotations(self) -> list[dict[str, Any]]:
        """A COCO annotation for each box."""
        return box_annotations(self.boxes, self.labels, self.scores)

    def draw(self, image: Tensor) -> Figure:
        """Draw the boxes with their classes."""
        marked = Marked(
            xywh(self.boxes).numpy(), self.labels.numpy(),
            np.full(len(self.boxes), RIGHT), self.scores.numpy(),
        )  # fmt: skip
        return boxes_figure(image, {"predicted": marked}, self.class_names)


@dataclass(frozen=True, kw_only=True)
class SceneClasses(Prediction):
    """The classes of objects that an image contains.

    Attributes:
        log_probs: Log-probability that the image contains each class, (C,).
    """

    log_probs: Tensor

    def annotations(self) -> list[dict[str, Any]]:
        """An annotation without box for each class of probability 0.5 or above."""
        found = enumerate(self.log_probs.exp().tolist())
        return [{"category_id": label, "score": score} for label, score in found if score >= 0.5]

    def draw(self, image: Tensor) -> Figure:
        """Show the image with its five most probable classes as title."""
        figure, panels = image_panels(1, image.shape[1] / image.shape[2], most=1, across=4.0)
        best = self.log_probs.exp().topk(min(5, len(self.class_names)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        text = ", ".join(f"{self.class_names[label]} {score:.2f}" for score, label in pairs)
        panels[0].imshow(image.permute(1, 2, 0).numpy())
        panels[0].set_title(text, fontsize=7, color=INK, pad=3)
        return figure


class ObjectGraph(ExportGraph):
    """Log-probabilities of the classes of objects in given boxes."""

    inputs: ClassVar[Mapping[str, str]] = {
        "images": "uint8 RGB (N, 3, S, S); scaled to a long side of S, 0 below and on the right",
        "boxes": "float32 (K, 4), x1, y1, x2, y2 in pixels of the scaled images",
        "image_of": "int64 (K,), index of each box's image",
    }
    outputs: Mapping[str, str] = {"log_probs": "float32 (K, C)"}

    def forward(self, images: Tensor, boxes: Tensor, image_of: Tensor) -> Tensor:
        """Compute the log-probabilities."""
        hidden = torch.arange(boxes.shape[0], device=boxes.device)
        batch = {
            "images": images, "boxes": boxes, "image_of": image_of, "hidden": hidden,
            "hide_fraction": torch.ones_like(boxes[:, 0]),
        }  # fmt: skip
        output = named(self.model(*self.task.inputs(batch)))
        log_probs: Tensor = self.task.decode(output, batch)
        return log_probs

    def feed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch's images and the boxes of its hidden objects."""
        boxes, image_of = hidden_boxes(batch), image_rows(batch)
        return {"images": batch["images"], "boxes": boxes, "image_of": image_of}

    def decoded(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the log-probabilities."""
        return outputs["log_probs"]


class SceneGraph(ExportGraph):
    """Log-probabilities that an image contains each class."""

    inputs: ClassVar[Mapping[str, str]] = {
        "images": ObjectGraph.inputs["images"],
        "sizes": "int64 (N, 2), height and width of the scaled images without padding",
    }
    outputs: Mapping[str, str] = {"log_probs": "float32 (N, C)"}

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Compute the log-probabilities."""
        batch = {"images": images, "sizes": sizes}
        output = named(self.model(*self.task.inputs(batch)))
        log_probs: Tensor = self.task.decode(output, batch)
        return log_probs

    def feed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch's images and their sizes."""
        return {"images": batch["images"], "sizes": batch["sizes"]}

    def decoded(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the log-probabilities."""
        return outputs["log_probs"]


class ObjectInference(Inference):
    """Classifies objects in given boxes; context teachers hide each box in turn.

    Args:
        class_names: Names of the C classes.
        size: Long side of the model's images, which are padded to a square, pixels.
    """

    needs_boxes: ClassVar[bool] = True

    def __init__(self, class_names: Sequence[str], size: int) -> None:
        super().__init__(class_names)
        self.long_side: int = size

    def samples(self, image: InputImage) -> list[Sample]:
        """Make samples of a scene in which at most `MOST_BOXES` boxes are classified."""
        assert image.boxes is not None
        count = len(image.boxes)
        sample = scene_sample(image, torch.full((count,), -1), torch.arange(count), self.long_side)
        names = ("hidden", "hide_fraction")
        parts = zip(*(sample[name].split(MOST_BOXES) for name in names), strict=True)
        return [{**sample, **dict(zip(names, part, strict=True))} for part in parts]

    def rows(self, sample: Sample) -> int:
        """Number of classified objects."""
        return len(sample["hidden"])

    def graph(self, model: nn.Module, task: Any) -> ExportGraph:
        """Return the network with normalisation and log-probabilities."""
        return ObjectGraph(model, task)

    def prediction(self, decoded: Tensor, image: InputImage) -> Prediction:
        """Return the log-probabilities of the image's boxes."""
        assert image.boxes is not None
        return ObjectClasses(
            size=image.size, class_names=self.class_names, boxes=image.boxes, log_probs=decoded
        )


class SceneInference(Inference):
    """Predicts which classes of objects an image contains.

    Args:
        class_names: Names of the C classes.
        size: Long side of the model's images, which are padded to a square, pixels.
    """

    def __init__(self, class_names: Sequence[str], size: int) -> None:
        super().__init__(class_names)
        self.long_side: int = size

    def samples(self, image: InputImage) -> list[Sample]:
        """Make the sample of a whole image."""
        none = torch.empty(0, dtype=torch.int64)
        whole = replace(image, boxes=torch.empty(0, 4))
        return [scene_sample(whole, none, none, self.long_side)]

    def graph(self, model: nn.Module, task: Any) -> ExportGraph:
        """Return the network with normalisation and log-probabilities."""
        return SceneGraph(model, task)

    def prediction(self, decoded: Tensor, image: InputImage) -> Prediction:
        """Return the log-probability of each class in the image."""
        return SceneClasses(size=image.size, class_names=self.class_names, log_probs=decoded[0])


def scene_sample(image: InputImage, labels: Tensor, hidden: Tensor, size: int) -> Sample:
    """Scale and pad an image with objects of which some are hidden in turn.

    Args:
        image: The image, with the boxes of M objects.
        labels: (M,) int64, -1 for objects of unknown class.
        hidden: Indices of the hidden objects, (K,) int64.
        size: Long side of the result and side of its square frame, pixels.
    """
    assert image.boxes is not None
    height, width = image.size
    scaled, stored = scaled_size(height, width, size), image.boxes.float()
    usable = torch.zeros(len(stored), dtype=torch.bool)
    usable[hidden] = True
    return {
        "images": pad(resize(image.pixels, scaled), size),
        "sizes": torch.tensor(scaled),
        "image_ids": torch.tensor(0),
        "boxes": stored * torch.tensor([scaled[1] / width, scaled[0] / height]).repeat(2),
        "labels": labels.long(),
        "object_ids": torch.arange(len(stored)),
        "area_fractions": (stored[:, 2:] - stored[:, :2]).prod(dim=1) / (height * width),
        "usable": usable,
        "hidden": hidden,
        "hide_fraction": torch.ones(len(hidden)),
    }
