"""A ResNet-18 on small grey pictures as a scene-context teacher: one class for each pixel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError, at_least
from kd.nn.trunk import build_trunk
from kd.nn.trunk_base import BlindTrunk, Trunk, grey_and_region


class PixelTrunk(nn.Module):
    """A trunk's feature, up-sampling, two dense (1x1) layers.

    Attributes:
        task: The kind of task that fits the output.
    """

    task = "context_map"

    def __init__(
        self, trunk: Trunk, num_classes: int, *, width: int, grid: int, dropout: float
    ) -> None:
        super().__init__()
        self.trunk, self.grid = trunk, grid
        self.feature = nn.Sequential(
            nn.Conv2d(trunk.channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(width, 1 + num_classes, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images with the hidden region's channel (K, 4, H, W) to (K, 1 + C, H, W) pixel logits."""
        feature = self.feature(self.trunk(grey_and_region(images)))  # (K, 128, H/8, W/8)
        height, width = images.shape[2:]
        logits: Tensor = self.head(
            _resized(feature, -(-height // self.grid), -(-width // self.grid))
        )
        return _resized(logits, height, width)

    def scene_trunk(self) -> BlindTrunk:
        """The trunk on the luma of pictures, as that of a student."""
        step = (self.trunk, self.trunk.channels, self.trunk.stride)
        return BlindTrunk("resnet_pixel", [step], see=grey_and_region)


def _resized(maps: Tensor, height: int, width: int) -> Tensor:
    if maps.shape[2:] == (height, width):
        return maps
    return F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)


def resnet_pixel(
    num_classes: int,
    *,
    name: str = "resnet18",
    weights: str | None = None,
    until: str | None = "layer2",
    stride: int | None = None,
    width: int = 128,
    grid: int = 2,
    dropout: float = 0.0,
) -> PixelTrunk:
    """BlindNet's pixel-wise ResNet-18: a softmax over background and the classes at each pixel.

    It sees luma and the hidden region, and is meant for pictures of 64 pixels (`data.size: 64`).

    Args:
        num_classes: C; the output has a channel more, background, first.
        name: Of the torchvision classifier.
        weights: "imagenet", a file of torchvision weights, or random ones where not given. The
            first convolution is summed over RGB, so that a grey picture keeps its response.
        until: Last step of the trunk: ResNet-18's second layer has 128 channels and a grid of 8 x 8
            for a picture of 64 pixels; null = all of it.
        stride: Keep the trunk's output at this stride at most.
        width: Channels of the feature and of the dense layer.
        grid: Pixels per place of the dense layers; their logits are up-sampled to the picture's.
        dropout: Before the last layer.

    Raises:
        UserError: An option out of range, or a trunk that cannot be built.
    """
    at_least("resnet_pixel", width=(width, 1), grid=(grid, 1))
    if not 0 <= dropout < 1:
        raise UserError(f"resnet_pixel: dropout must be in [0, 1), got {dropout}")
    trunk = build_trunk(name, weights=weights, in_channels=2, grey=True, stride=stride, until=until)
    return PixelTrunk(trunk, num_classes, width=width, grid=grid, dropout=dropout)
