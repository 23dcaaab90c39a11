"""A context teacher on any trunk, pretrained or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.errors import UserError, at_least
from kd.nn.multi_stride_trunk import LevelledTrunk, levelled
from kd.nn.regions import Surroundings, image_extents, mask_boxes
from kd.nn.trunk import build_trunk
from kd.nn.trunk_base import Trunk


class ContextTrunk(nn.Module):
    """A trunk, pooling around and inside the hidden region (`Surroundings`), and a small head.

    The input of the trunk is RGB, as its weights require. The fourth channel is only used to find
    the hidden region.

    Attributes:
        task: Name of the task that fits the output.
    """

    task = "context"

    def __init__(
        self,
        trunk: LevelledTrunk,
        around: Surroundings,
        num_classes: int,
        *,
        hidden: int,
        dropout: float,
        dense: bool,
    ) -> None:
        super().__init__()
        self.trunk, self.around = trunk, around
        # Predicts the classes of visible objects on the finest map, for the loss `visible`.
        self.dense = nn.Conv2d(around.channels[0], num_classes, 1) if dense else None
        layers: list[nn.Module] = [nn.Dropout(dropout)]
        if hidden:
            layers += [nn.Linear(around.width, hidden), nn.ReLU(), nn.Dropout(dropout)]
        last = nn.Linear(hidden or around.width, num_classes)
        nn.init.normal_(last.weight, std=1e-3)
        self.head = nn.Sequential(*layers, last)

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """Map images with a channel for the hidden region, (K, 4, H, W), to class logits.

        Returns:
            Logits (K, C); with `dense` a dict of `logits` and `dense` (K, C, h, w), pixel logits on
            the grid of the finest map.
        """
        rgb, boxes = images[:, :3].contiguous(), mask_boxes(images[:, 3])
        maps = self.trunk(rgb)
        rows = torch.arange(len(images), device=images.device)
        logits: Tensor = self.head(self.around(maps, boxes, rows, image_extents(rgb)))
        return logits if self.dense is None else {"logits": logits, "dense": self.dense(maps[0])}

    def scene_trunk(self) -> Trunk:
        """Return the trunk, for a student to start from."""
        return self.trunk.trunk


def trunk(
    num_classes: int,
    *,
    name: str = "mobilenet_v2",
    weights: str | None = None,
    levels: int = 1,
    margins: Sequence[float] = (0.5,),
    min_ring: float = 16.0,
    scene: bool = True,
    inside: bool = True,
    geometry: bool = True,
    hidden: int = 0,
    dropout: float = 0.5,
    dense: bool = False,
    frozen: str | None = None,
    batch_norm_frozen: bool = False,
    remember: bool = False,
    stride: int | None = None,
) -> ContextTrunk:
    """Build a context teacher that pools the features of any trunk around the hidden region.

    Args:
        num_classes: Number of classes, C.
        name: Name of the trunk: mobilenet_v2, timm/NAME, ...
        weights: Weights of the trunk: "imagenet", a file, or null for random weights.
        levels: Number of strides of the trunk whose maps are pooled, counted from the coarsest.
        margins: Thickness of each pooled ring around the region's box, as a fraction of the box's
            width and height.
        min_ring: Smallest thickness of a ring, pixels.
        scene: Whether to pool the whole image outside the region, too.
        inside: Whether to pool the features inside the region, too.
        geometry: Whether the position and size of the region are inputs of the head.
        hidden: Width of a hidden layer in the head; 0 for a linear head.
        dropout: Dropout probability before each layer of the head.
        dense: Whether to add pixel logits for the classes of visible objects; the task `context`
            then has a loss `visible`.
        frozen: "all", or the path of the last step of the trunk to freeze.
        batch_norm_frozen: Whether to freeze all batch norms of the trunk.
        remember: Whether to cache a frozen trunk's outputs in memory; not with augmentation.
        stride: Largest stride of the trunk's output, see `kd.nn.trunk.build_trunk`.

    Raises:
        UserError: An option is out of range, or the trunk cannot be built.
    """
    if any(margin <= 0 for margin in margins):
        raise UserError(f"trunk: margins must be above 0, got {list(margins)}")
    if not margins and not scene:
        raise UserError("trunk: set at least one of margins, or scene to true")
    at_least("trunk", hidden=(hidden, 0), min_ring=(min_ring, 0))
    if not 0 <= dropout < 1:
        raise UserError(f"trunk: dropout must be in [0, 1), got {dropout}")
    features = levelled(
        build_trunk(name, weights=weights, stride=stride), levels=levels, frozen=frozen,
        batch_norm_frozen=batch_norm_frozen, remember=remember,
    )  # fmt: skip
    around = Surroundings(
        features.level_channels, features.level_strides, margins=margins, min_ring=min_ring,
        scene=scene, inside=inside, geometry=geometry,
    )  # fmt: skip
    return ContextTrunk(features, around, num_classes, hidden=hidden, dropout=dropout, dense=dense)
