"""The context task for teachers that read a scene as tokens: objects by class and box, pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kd.losses.supervised import masked_bce
from kd.nn.cooccurrence import Objects
from kd.problems.base import Batch, Mean, Output
from kd.problems.objects.batch import image_rows
from kd.problems.objects.context import Context, label_maps, picture_pixels
from kd.transforms.hide import normalise

Pictures = Literal["none", "whole", "each"]


@dataclass(frozen=True, kw_only=True)
class SceneTokens(Context):
    """What class is each hidden object, given the others' classes and boxes, pixels, or both?

    Each is hidden by itself: the others' answers know it, unless the batch has it `withheld`.

    Args:
        pictures: What the model is shown; it says so itself.
    """

    pictures: Pictures = "none"

    def inputs(self, batch: Batch) -> tuple[Objects | Tensor, ...]:  # type: ignore[override]
        """Objects, indices of the hidden ones (K,), pictures, hidden regions (K, H, W).

        Pictures are normalised: (N, 3, H, W) as they are where the model leaves out what is hidden
        (`whole`), (K, 3, H, W) with 0 in the region (`each`), or empty.
        """
        objects = scene_objects(batch)
        images = batch["images"]
        if self.pictures == "none":
            empty = images.new_zeros((0, 3, 1, 1), dtype=torch.float32)
            return objects, batch["hidden"], empty, empty[:, 0].bool()
        regions = self.regions(batch)
        pictures = normalise(images)
        if self.pictures == "each":
            pictures = pictures[image_rows(batch)].mul_(~regions[:, None])
        return objects, batch["hidden"], pictures, regions

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`cross_entropy` over the hidden objects with a label; `visible` of `dense` logits."""
        losses = super().losses({"logits": output["logits"]}, batch)
        if "dense" in output:
            losses["visible"] = self._seen(output["dense"], batch)
        return losses

    def _seen(self, logits: Tensor, batch: Batch) -> Mean:
        """Pixel logits (N, C, h, w) of whole pictures against all their boxes."""
        grid = (logits.shape[2], logits.shape[3])
        known = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        known[batch["image_of"][batch["labels"] >= 0]] = True
        valid = picture_pixels(batch, grid) & known[:, None, None]
        loss = masked_bce(
            logits,
            label_maps(batch, self.num_classes, grid),
            torch.zeros_like(valid),
            valid=valid,
            hidden_weight=0.0,
        )
        return Mean(loss, "images")


def scene_objects(batch: Batch) -> Objects:
    """The objects of a batch, boxes as shares of their picture."""
    rows = batch["image_of"]
    sides = batch["sizes"][rows].to(torch.float32)[:, [1, 0, 1, 0]]
    boxes = (batch["boxes"] / sides).clamp(0.0, 1.0)
    visible = batch["labels"] >= 0
    if "withheld" in batch:
        visible = visible & ~batch["withheld"]
    return Objects(batch["labels"], visible, boxes, sides[:, 0] / sides[:, 1], rows)
