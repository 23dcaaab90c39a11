"""What a batch says of objects: boxes (M, 4) xyxy pixels, labels (M,), and the K hidden ones.

A batch with `hidden` is about those objects, each hidden from the teacher in an input of its own.
In a detector's batch none is hidden: all M are found. A batch without boxes has whole images alone.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from kd.errors import UserError
from kd.nn.regions import coverage, expand_boxes
from kd.problems.base import Batch, Classes, Mask, Rows, full_count, stride_of
from kd.problems.objects.metric import TopN

RING_MARGIN = 0.5


def chosen(batch: Batch) -> Tensor:
    """The objects that a batch is about, (K,) indices into all M: the hidden ones, or every one."""
    if "hidden" in batch:
        return batch["hidden"]
    return torch.arange(len(batch["boxes"]), device=batch["boxes"].device)


def image_rows(batch: Batch) -> Tensor:
    """The image of each object, (K,)."""
    return batch["image_of"][chosen(batch)]


def hidden_boxes(batch: Batch) -> Tensor:
    """Boxes of the objects, (K, 4)."""
    return batch["boxes"][chosen(batch)]


def hidden_labels(batch: Batch) -> Tensor:
    """Labels of the objects, (K,); -1 where unlabelled."""
    return batch["labels"][chosen(batch)]


def object_rows(batch: Batch) -> Rows:
    """A row of output for each hidden object, each box of a detector's batch, or each image."""
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
    """How many objects and images a batch holds, with labels and without.

    In a detector's batch `labelled_images` are those whose labels are known, also ones without a
    box. `ring` is the area of all rings in pixels: only counts of one unit are ever compared.

    Args:
        batch: Hidden objects or a detector's boxes.
        units: Further units: masks that terms are means over.

    Raises:
        UserError: A mask that there is none of.
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
            area = _areas(outer_boxes(batch)).sum() - _areas(hidden_boxes(batch)).sum()
            counts["ring"] = area
        elif unit not in (*counts, "frame", "valid"):
            raise UserError(f"losses: objects have no mask {unit!r}; there is: ring")
    return counts


def top_n(classes: Classes) -> TopN:
    """The metric of tasks that predict the class of each object."""
    return TopN(
        len(classes.names),
        prior=classes.prior,
        confusable=classes.confusable,
        visible=classes.visible,
        where=classes.where,
    )


def ring_mask(batch: Batch) -> Mask:
    """The surroundings of each hidden object: a ring of half its size, within the image."""

    def on_grid(grid: tuple[int, int]) -> Tensor:
        stride = stride_of(batch["images"].shape[-2], grid[0])
        boxes = hidden_boxes(batch)
        ring = coverage(outer_boxes(batch), grid, stride) - coverage(boxes, grid, stride)
        return ring.clamp(min=0.0)

    return on_grid


def outer_boxes(batch: Batch) -> Tensor:
    """Outer edges of the rings, (K, 4), cut at the image: padding is no surroundings."""
    outer = expand_boxes(hidden_boxes(batch), RING_MARGIN)
    sizes = batch["sizes"][image_rows(batch)].to(outer.dtype)
    return outer.clamp(min=0.0).minimum(sizes[:, [1, 0, 1, 0]])


def _areas(boxes: Tensor) -> Tensor:
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0.0)
    return sides[:, 0] * sides[:, 1]
