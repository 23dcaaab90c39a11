"""A torchvision trunk, ImageNet weights and all, as a scene-context teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.freeze import freeze, freeze_batch_norm
from kd.nn.regions import (
    box_geometry,
    coverage,
    expand_boxes,
    mask_boxes,
    mask_coverage,
    masked_pool,
)
from kd.nn.trunk import Trunk, build_trunk


class ContextTrunk(nn.Module):
    """Features around the hidden region: rings, the whole scene without it, and its geometry.

    The trunk sees three channels, as its weights expect; the fourth says where to look.

    Attributes:
        task: The kind of task that fits the output.
    """

    task = "context"

    def __init__(
        self,
        trunk: Trunk,
        num_classes: int,
        *,
        margins: Sequence[float],
        scene: bool,
        geometry: bool,
        hidden: int,
        dropout: float,
        upscale: int,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.margins, self.scene, self.geometry = tuple(margins), scene, geometry
        self.upscale = upscale
        pooled = trunk.channels * (len(self.margins) + scene)
        # Trunks differ in the scale of their features by orders of magnitude.
        self.norm = nn.LayerNorm(pooled)
        width = pooled + (8 if geometry else 0)
        layers: list[nn.Module] = [nn.Dropout(dropout)]
        if hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout)]
        self.head = nn.Sequential(*layers, nn.Linear(hidden or width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Images with the hidden region's channel (K, 4, H, W) to logits (K, C)."""
        mask, boxes = images[:, 3], mask_boxes(images[:, 3])
        picture = images[:, :3]
        if self.upscale > 1:
            picture = F.interpolate(picture, scale_factor=self.upscale, mode="bilinear")
        features = self.trunk(picture)  # (K, C, h, w)
        count, grid = len(images), (features.shape[2], features.shape[3])
        stride = self.trunk.stride
        mask = mask.repeat_interleave(self.upscale, 1).repeat_interleave(self.upscale, 2)
        hidden = mask_coverage(mask, grid, stride)  # (K, h, w)
        around = [
            (coverage(expand_boxes(boxes * self.upscale, margin), grid, stride) - hidden).clamp(0)
            for margin in self.margins
        ]
        if self.scene:
            around.append(1 - hidden)
        # One bag of places for all regions: (regions * K, h, w).
        image_of = torch.arange(count, device=images.device).repeat(len(around))
        pooled = masked_pool(features, torch.cat(around), image_of)
        pooled = self.norm(
            pooled.reshape(len(around), count, features.shape[1]).transpose(0, 1).flatten(1)
        )
        if self.geometry:
            height, width = images.shape[2:]
            shape = box_geometry(boxes, (height, width)).to(pooled.dtype)
            pooled = torch.cat([pooled, shape], dim=1)
        logits: Tensor = self.head(pooled)
        return logits


def trunk(
    num_classes: int,
    *,
    name: str = "mobilenet_v2",
    weights: str | None = None,
    margins: Sequence[float] = (0.5, 1.5),
    scene: bool = True,
    geometry: bool = True,
    hidden: int = 0,
    dropout: float = 0.5,
    frozen: str | None = None,
    batch_norm_frozen: bool = False,
    stride: int | None = None,
    upscale: int = 1,
) -> ContextTrunk:
    """Any torchvision classifier's features around the hidden region, and a small head.

    Args:
        num_classes: Length of the output.
        name: Of the torchvision classifier.
        weights: "imagenet", a file of torchvision weights, or random ones where not given.
        margins: Thickness of each ring around the region's box, as a share of the box.
        scene: Whether the whole scene outside the region is read too.
        geometry: Whether the region's place and size are read too.
        hidden: Width of a hidden layer in the head; 0 for a linear head.
        dropout: Before each layer of the head.
        frozen: "all", or the path of the last step of the trunk that does not learn.
        batch_norm_frozen: Keep all the trunk's batch norms at their stored statistics.
        stride: Keep the trunk's output at this stride at most.
        upscale: Enlarge images by this factor first, for finer grids on small images.

    Raises:
        UserError: An option out of range, or a trunk that cannot be built.
    """
    if any(margin <= 0 for margin in margins):
        raise UserError(f"trunk: margins must be above 0, got {list(margins)}")
    if not margins and not scene:
        raise UserError("trunk: give at least one margin, or the scene")
    if not 0 <= dropout < 1 or hidden < 0 or upscale < 1:
        raise UserError(
            f"trunk: dropout must be in [0, 1), hidden 0 or above and upscale at least 1, got "
            f"{dropout}, {hidden} and {upscale}"
        )
    features = build_trunk(name, weights=weights, stride=stride)
    if frozen is not None:
        freeze(features, None if frozen == "all" else frozen)
    if batch_norm_frozen:
        freeze_batch_norm(features)
    return ContextTrunk(
        features,
        num_classes,
        margins=margins,
        scene=scene,
        geometry=geometry,
        hidden=hidden,
        dropout=dropout,
        upscale=upscale,
    )
