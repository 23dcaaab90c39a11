"""Detect objects in single images, outside a dataset."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from kd.data.loader import Sample
from kd.errors import UserError
from kd.nn.detectors.contract import Detector
from kd.problems.inference import (
    ExportGraph,
    Inference,
    InputImage,
    Prediction,
    box_annotations,
)
from kd.report.boxes import LEAST_SCORE, RIGHT, Marked, boxes_figure, xywh
from kd.transforms.augment import pad
from kd.transforms.hide import normalise, valid_pixels
from kd.utils.images import resize, scaled_size


@dataclass(frozen=True, kw_only=True)
class Detections(Prediction):
    """Detected objects, highest score first.

    `boxes` (K, 4) are xyxy pixels, `scores` (K,) in 0..1, `labels` (K,) int64 in 0..C-1.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    @property
    def names(self) -> list[str]:
        return [self.class_names[label] for label in self.labels.tolist()]

    def above(self, score: float) -> Detections:
        """Return the detections with at least this score."""
        keep = self.scores >= score
        return Detections(
            size=self.size, class_names=self.class_names, boxes=self.boxes[keep],
            scores=self.scores[keep], labels=self.labels[keep],
        )  # fmt: skip

    def annotations(self) -> list[dict[str, Any]]:
        return box_annotations(self.boxes, self.labels, self.scores)

    def draw(self, image: Tensor) -> Figure:
        best = self.above(LEAST_SCORE)
        order = best.scores.argsort()  # the highest score is drawn last, on top
        marked = Marked(
            xywh(best.boxes[order]).numpy(), best.labels[order].numpy(),
            np.full(len(order), RIGHT), best.scores[order].numpy(),
        )  # fmt: skip
        return boxes_figure(image, {"predicted": marked}, self.class_names, least=LEAST_SCORE)


RAW = ("class_maps", "box_maps", "centre_maps")  # outputs of a detector before suppression


class DetectionGraph(ExportGraph):
    """Detector for export, with normalisation and NMS, on square images of side `size` pixels."""

    inputs: ClassVar[Mapping[str, str]] = {
        "images": "uint8 RGB (N, 3, S, S); scaled to a long side of S, 0 below and on the right",
        "sizes": "int64 (N, 2), height and width of the scaled images without padding",
    }

    def __init__(self, model: nn.Module, task: Any, size: int) -> None:
        detector = copy.deepcopy(model)
        super().__init__(detector, task)
        if not isinstance(detector, Detector):
            raise UserError(
                f"export: {type(model).__name__} is not one of kd's detectors, whose suppression "
                "can be exported; export its network with torch.onnx"
            )
        detector.exported = True
        with torch.no_grad():
            frame = torch.zeros(1, 3, size, size, device=next(model.parameters()).device)
            found = self.model(frame, torch.full((1, 2), size, device=frame.device))
        self.maps = [name for name in found if name.split(".")[0] in RAW]
        self.outputs = {
            "detections": "float32 (N, K, 6): x1, y1, x2, y2 in pixels of the scaled image, score, "
            "class; best first, then rows of zeros",
            **dict.fromkeys(self.maps, "float32, before suppression"),
        }

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        frame = (images.shape[2], images.shape[3])
        pixels = normalise(images) * valid_pixels(sizes, frame)[:, None]
        output = self.model(pixels, sizes)
        return (output["detections"], *(output[name].float() for name in self.maps))

    def feed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"images": batch["images"], "sizes": batch["sizes"]}

    def decoded(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return outputs["detections"]


class DetectionInference(Inference):
    """Detects objects in images scaled to a long side of `size` pixels and padded to a square."""

    def __init__(self, class_names: Sequence[str], size: int) -> None:
        super().__init__(class_names)
        self.long_side: int = size

    def samples(self, image: InputImage) -> list[Sample]:
        scaled = scaled_size(*image.size, self.long_side)
        return [{
            "images": pad(resize(image.pixels, scaled), self.long_side),
            "sizes": torch.tensor(scaled),
            "own_sizes": torch.tensor(image.size),
            "image_ids": torch.tensor(0),
            "boxes": torch.empty(0, 4),
            "labels": torch.empty(0, dtype=torch.int64),
        }]  # fmt: skip

    def graph(self, model: nn.Module, task: Any) -> ExportGraph:
        return DetectionGraph(model, task, self.long_side)

    def prediction(self, decoded: Tensor, image: InputImage) -> Detections:
        """Scale detections (1, K, 6) to pixels of the input image; drop padding rows (score 0)."""
        rows, (height, width) = decoded[0], image.size
        scaled = scaled_size(height, width, self.long_side)
        scale = rows.new_tensor([width / scaled[1], height / scaled[0]]).repeat(2)
        rows = rows[rows[:, 4] > 0]
        return Detections(
            size=image.size, class_names=self.class_names, boxes=rows[:, :4] * scale,
            scores=rows[:, 4], labels=rows[:, 5].long(),
        )  # fmt: skip
