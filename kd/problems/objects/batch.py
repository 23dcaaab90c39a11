"""Access to the objects of a batch: M boxes and labels, and the indices of K `hidden` objects.

A context teacher gets one input per hidden object. A detector's batch hides no object, so all M are
targets. A batch without boxes contains only whole images.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kd.errors import UserError
from kd.nn.regions import coverage, expand_boxes
from kd.problems.base import (
    Batch,
    Classes,
    Evaluator,
    Mask,
    Output,
    Rows,
    Task,
    full_count,
    stride_of,
)
from kd.problems.objects.metric import TopN

RING_MARGIN = 0.5


def chosen(batch: Batch) -> Tensor:
    """Return the indices of the hidden objects, (K,), or of all objects if none is hidden."""
    if "hidden" in batch:
        return batch["hidden"]
    return torch.arange(batch["boxes"].shape[0], device=batch["boxes"].device)


def image_rows(batch: Batch) -> Tensor:
    """Return the batch index of the image of each object in `chosen`, (K,)."""
    return batch["image_of"][chosen(batch)]


def hidden_boxes(batch: Batch) -> Tensor:
    """Return boxes of the hidden objects, or of all if none is hidden, (K, 4) xyxy pixels."""
    return batch["boxes"][chosen(batch)]


def hidden_labels(batch: Batch) -> Tensor:
    """Return labels of the hidden objects, or of all if none is hidden, (K,); -1: unlabelled."""
    return batch["labels"][chosen(batch)]


def object_rows(batch: Batch) -> Rows:
    """Describe the output rows: hidden objects, or all boxes if none is hidden, or images."""
    if "hidden" not in batch and "boxes" not in batch:
        return Rows()
    which = chosen(batch)
    return Rows(
        unit="hidden" if "hidden" in batch else "boxes",
        images=batch["image_of"][which],
        labels=batch["labels"][which],
        ids=batch["object_ids"][which] if "object_ids" in batch else None,
        hidden="hidden" in batch,
    )


def object_counts(batch: Batch, units: Collection[str] = ()) -> dict[str, Tensor]:
    """Count objects, images, labelled ones of both, and additional `units`.

    Additional units are masks that terms average over. `ring` counts the area of all rings in
    pixels. In a detector's batch, images without boxes can be labelled.
    """
    hides = "hidden" in batch
    labelled = hidden_labels(batch) >= 0
    counts = {
        "hidden" if hides else "boxes": full_count(batch, "hidden" if hides else "boxes"),
        "images": full_count(batch, "images"),
        "labelled": labelled.sum().float(),
    }
    if hides:
        known = (batch["labels"] >= 0).float()
        images = known.new_zeros(len(batch["images"]))
        images = images.index_add(0, batch["image_of"], known)
        counts["labelled_images"] = (images > 0).sum().float()
    else:
        counts["labelled_images"] = batch["labelled"].sum().float()
    for unit in units:
        if unit == "ring":
            counts["ring"] = _areas(outer_boxes(batch)).sum() - _areas(hidden_boxes(batch)).sum()
        elif unit not in (*counts, "frame", "valid"):
            raise UserError(f"losses: this task has no mask {unit!r}, only 'ring'")
    return counts


@dataclass(frozen=True, kw_only=True)
class ObjectTask(Task):
    """Base class of tasks whose batches contain objects."""

    class_scores: ClassVar[Collection[str]] = ("logits", "context", "appearance")
    mask_names: ClassVar[Collection[str]] = ("ring",)

    num_classes: int

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """Return the mask `ring`, (K, h, w): each cell's fraction in the ring around the object."""
        return {"ring": ring_mask(batch)}

    def rows(self, batch: Batch) -> Rows:
        return object_rows(batch)

    def counts(
        self, batch: Batch, units: Collection[str] = (), masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        return object_counts(batch, units)

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Return log-probabilities of the objects' classes, (K, C)."""
        return output["logits"].float().log_softmax(dim=1)

    def metric(self, classes: Classes) -> Evaluator:
        """Build the metric: top-n accuracy and negative log-likelihood."""
        return TopN(
            len(classes.names), prior=classes.prior, confusable=classes.confusable,
            visible=classes.visible, where=classes.where,
        )  # fmt: skip


def ring_mask(batch: Batch) -> Mask:
    """Mask the ring around each object, (K, h, w), in fractions of cells inside the image.

    The ring is half as wide as the object.
    """

    def on_grid(grid: tuple[int, int]) -> Tensor:
        stride = stride_of(batch["images"].shape[-2], grid[0])
        boxes = hidden_boxes(batch)
        ring = coverage(outer_boxes(batch), grid, stride) - coverage(boxes, grid, stride)
        return ring.clamp(min=0.0)

    return on_grid


def outer_boxes(batch: Batch) -> Tensor:
    """Return the outer boxes of the rings, (K, 4), clipped to the unpadded image."""
    outer = expand_boxes(hidden_boxes(batch), RING_MARGIN)
    sizes = batch["sizes"][image_rows(batch)].to(outer.dtype)
    return outer.clamp(min=0.0).minimum(sizes[:, [1, 0, 1, 0]])


def _areas(boxes: Tensor) -> Tensor:
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0.0)
    return sides[:, 0] * sides[:, 1]
