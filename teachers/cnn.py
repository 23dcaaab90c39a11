"""A plain CNN as a context teacher, which predicts one class distribution per hidden region."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError, at_least
from kd.nn.trunk_base import BlindTrunk


class ContextCNN(nn.Module):
    """The encoder of a U-Net, average pooling to a small grid, and two dense layers.

    By option, further inputs of the dense layers are the mean features of each level over the
    hidden region.

    Attributes:
        task: Name of the task that fits the output.
    """

    task = "context"

    def __init__(
        self,
        num_classes: int,
        *,
        width: int,
        downs: int,
        max_width: int,
        patch: int,
        grid: int,
        region: bool,
        dense: bool,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        channels = [min(width * 2**level, max_width) for level in range(downs + 1)]
        levels: list[nn.Module] = [_double_conv(4, channels[0])]
        if patch > 1:
            stem = nn.Conv2d(4, channels[0], patch, stride=patch, bias=False)
            first = _double_conv(channels[0], channels[0])
            levels = [nn.Sequential(stem, nn.BatchNorm2d(channels[0]), nn.ReLU(), first)]
        for fine, coarse in pairwise(channels):
            levels.append(nn.Sequential(_Halve(), _double_conv(fine, coarse)))
        self.features = nn.Sequential(*levels)  # (K, C, H/2^downs, W/2^downs)
        self._grids = [(wide, patch * 2**level) for level, wide in enumerate(channels)]
        # Pooling to a grid instead of one mean, since positions are informative.
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.region = region
        # Predicts the classes of visible objects at the first level, for the loss `visible`.
        self.dense = nn.Conv2d(channels[0], num_classes, 1) if dense else None
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(channels[-1] * grid**2 + region * sum(channels), hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """Map images with a channel for the hidden region, (K, 4, H, W), to class logits.

        Returns:
            Logits (K, C); with `dense` a dict of `logits` and `dense` (K, C, h, w), pixel logits on
            the grid of the first level.
        """
        read, levels, maps = [], [], images
        for level in self.features:
            maps = level(maps)
            levels.append(maps)
            if self.region:
                read.append(_mean_inside(maps, images[:, 3:]))
        read.append(self.pool(maps).flatten(1))
        logits: Tensor = self.head(torch.cat(read, dim=1))
        return logits if self.dense is None else {"logits": logits, "dense": self.dense(levels[0])}

    def scene_trunk(self) -> BlindTrunk:
        """Return all levels as a trunk, from which a student can start."""
        levels = zip(self.features, self._grids, strict=True)
        return BlindTrunk("cnn", [(level, *grid) for level, grid in levels])


def _mean_inside(maps: Tensor, mask: Tensor) -> Tensor:
    """Average features (K, C, h, w) over a mask (K, 1, H, W), weighted by coverage: (K, C)."""
    weights = F.adaptive_avg_pool2d(mask, (maps.shape[2], maps.shape[3]))
    return (maps * weights).sum(dim=(2, 3)) / weights.sum(dim=(2, 3)).clamp(min=1e-6)


class _Halve(nn.MaxPool2d):
    """2x2 max pooling that includes partial windows at the edge, so that any size works."""

    def __init__(self) -> None:
        super().__init__(2, ceil_mode=True)


def _double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def cnn(
    num_classes: int,
    *,
    width: int = 64,
    downs: int = 6,
    max_width: int = 512,
    patch: int = 1,
    grid: int = 3,
    region: bool = False,
    dense: bool = False,
    hidden: int = 512,
    dropout: float = 0.5,
) -> ContextCNN:
    """Build a CNN whose input is RGB and the hidden region, for images of any size.

    Args:
        num_classes: Number of classes, C.
        width: Channels of the first level; each further level has twice as many, up to `max_width`.
        downs: Number of times that the grid is halved.
        max_width: Largest number of channels of a level.
        patch: Side in pixels of the patches into which the image is first divided; 1 for no
            patches. With a side of 4 the network takes 1/16 of the time.
        grid: Side of the grid to which the last level is pooled for the dense layers.
        region: Whether the mean features of each level over the hidden region are inputs of the
            dense layers, too.
        dense: Whether to add pixel logits for the classes of visible objects; the task `context`
            then has a loss `visible`.
        hidden: Width of the first dense layer.
        dropout: Dropout probability before each dense layer.

    Raises:
        UserError: An option is out of range.
    """
    sizes = {"width": width, "downs": downs, "patch": patch, "grid": grid, "hidden": hidden}
    at_least("cnn", **{name: (value, 1) for name, value in sizes.items()})
    if not 0 <= dropout < 1:
        raise UserError(f"cnn: dropout must be in [0, 1), got {dropout}")
    return ContextCNN(
        num_classes, width=width, downs=downs, max_width=max_width, patch=patch, grid=grid,
        region=region, dense=dense, hidden=hidden, dropout=dropout,
    )  # fmt: skip
