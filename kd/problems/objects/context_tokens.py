"""The context task of teachers that read a scene as tokens: objects by class and box, images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kd.losses.supervised import masked_bce
from kd.nn.cooccurrence import Objects
from kd.problems.base import Batch, Mean, Output
from kd.problems.objects.batch import image_rows
from kd.problems.objects.context import Context, image_pixels, label_maps
from kd.transforms.hide import normalise

ImageInputs = Literal["none", "whole", "each"]


@dataclass(frozen=True, kw_only=True)
class SceneTokens(Context):
    """Classify each hidden object from the others' classes and boxes, from pixels, or both.

    Objects are hidden one by one: each is an input for the others, unless it is `also_hidden`.

    Args:
        image_inputs: Images that the model takes, one of its attributes.
    """

    image_inputs: ImageInputs = "none"

    def inputs(self, batch: Batch) -> tuple[Objects | Tensor, ...]:  # type: ignore[override]
        """Objects, indices of the hidden ones (K,), images, hidden regions (K, H, W).

        Images are normalised: `whole` (N, 3, H, W) for models that leave out hidden regions
        themselves, `each` (K, 3, H, W) with 0 in the region, or empty.
        """
        objects = scene_objects(batch)
        images = batch["images"]
        if self.image_inputs == "none":
            empty = images.new_zeros((0, 3, 1, 1), dtype=torch.float32)
            return objects, batch["hidden"], empty, empty[:, 0].bool()
        regions = self.regions(batch)
        images = normalise(images)
        if self.image_inputs == "each":
            images = images[image_rows(batch)].mul_(~regions[:, None])
        return objects, batch["hidden"], images, regions

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`cross_entropy` over the hidden objects with a label; `visible` of `dense` logits."""
        losses = super().losses({"logits": output["logits"]}, batch)
        if "dense" in output:
            losses["visible"] = self._all_boxes(output["dense"], batch)
        return losses

    def _all_boxes(self, logits: Tensor, batch: Batch) -> Mean:
        """Compare pixel logits (N, C, h, w) of whole images with all their boxes."""
        grid = (logits.shape[2], logits.shape[3])
        known = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        known[batch["image_of"][batch["labels"] >= 0]] = True
        valid = image_pixels(batch, grid) & known[:, None, None]
        targets, hidden = label_maps(batch, self.num_classes, grid), torch.zeros_like(valid)
        loss = masked_bce(logits, targets, hidden, valid=valid, hidden_weight=0.0)
        return Mean(loss, "images")


def scene_objects(batch: Batch) -> Objects:
    """The objects of a batch, boxes as fractions of their image."""
    rows = batch["image_of"]
    sides = batch["sizes"][rows].to(torch.float32)[:, [1, 0, 1, 0]]
    boxes = (batch["boxes"] / sides).clamp(0.0, 1.0)
    visible = batch["labels"] >= 0
    if "also_hidden" in batch:
        visible = visible & ~batch["also_hidden"]
    return Objects(batch["labels"], visible, boxes, sides[:, 0] / sides[:, 1], rows)
