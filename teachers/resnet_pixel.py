"""A ResNet-18 on small grey images as a context teacher that predicts a class for each pixel."""

from __future__ import annotations

from torch import Tensor, nn

from kd.errors import UserError, at_least
from kd.nn.trunk import build_trunk
from kd.nn.trunk_base import BlindTrunk, Trunk, grey_and_region, resized


class PixelTrunk(nn.Module):
    """A trunk, up-sampling, and two dense (1x1) layers.

    Attributes:
        task: Name of the task that fits the output.
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
        grid = (-(-height // self.grid), -(-width // self.grid))
        return resized(self.head(resized(feature, grid)), (height, width))

    def scene_trunk(self) -> BlindTrunk:
        """The trunk for a student; it reads luma."""
        step = (self.trunk, self.trunk.channels, self.trunk.stride)
        return BlindTrunk("resnet_pixel", [step], see=grey_and_region)


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

    The input is luma and the hidden region, for images of 64 pixels (`data.size: 64`).

    Args:
        num_classes: C; the output has one more channel, background, which comes first.
        name: Name of the trunk: resnet18, timm/NAME, ...
        weights: The trunk's weights: "imagenet", a file, or null for random ones. The first
            convolution is summed over RGB, so that its response to grey images stays the same.
        until: Last step of the trunk to use; null for all. "layer2" of ResNet-18 has 128 channels
            and a grid of 8 x 8 for an image of 64 pixels.
        stride: Largest stride of the trunk's output.
        width: Channels of both dense layers' inputs.
        grid: Pixels per cell of the dense layers; their logits are up-sampled to the image's size.
        dropout: Dropout before the last layer.

    Raises:
        UserError: An option out of range, or a trunk that cannot be built.
    """
    at_least("resnet_pixel", width=(width, 1), grid=(grid, 1))
    if not 0 <= dropout < 1:
        raise UserError(f"resnet_pixel: dropout must be in [0, 1), got {dropout}")
    trunk = build_trunk(name, weights=weights, in_channels=2, grey=True, stride=stride, until=until)
    return PixelTrunk(trunk, num_classes, width=width, grid=grid, dropout=dropout)
