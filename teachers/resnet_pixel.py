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
        """Map images with a channel for the hidden region, (K, 4, H, W), to pixel logits.

        Returns:
            (K, 1 + C, H, W), background first.
        """
        feature = self.feature(self.trunk(grey_and_region(images)))  # (K, 128, H/8, W/8)
        height, width = images.shape[2:]
        grid = (-(-height // self.grid), -(-width // self.grid))
        return resized(self.head(resized(feature, grid)), (height, width))

    def scene_trunk(self) -> BlindTrunk:
        """Return the trunk, which converts RGB to grey, for a student to start from."""
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
    """Build BlindNet's pixel-wise ResNet-18, which predicts background or a class at each pixel.

    The input is a grey image of 64 pixels (`data.size: 64`) and the hidden region.

    Args:
        num_classes: Number of classes, C. The output has one more channel, background, which comes
            first.
        name: Name of the trunk: resnet18, timm/NAME, ...
        weights: Weights of the trunk: "imagenet", a file, or null for random weights. The weights
            of the first convolution are summed over RGB, so that the response to grey images does
            not change.
        until: Path of the last step of the trunk to use; null for all steps. "layer2" of ResNet-18
            has 128 channels and a grid of 8 x 8 for an image of 64 pixels.
        stride: Largest stride of the trunk's output, see `kd.nn.trunk.build_trunk`.
        width: Number of input channels of both dense (1x1) layers.
        grid: Pixels per cell of the grid on which the dense layers are computed. The logits are
            then up-sampled to the image's size.
        dropout: Dropout probability before the last layer.

    Raises:
        UserError: An option is out of range, or the trunk cannot be built.
    """
    at_least("resnet_pixel", width=(width, 1), grid=(grid, 1))
    if not 0 <= dropout < 1:
        raise UserError(f"resnet_pixel: dropout must be in [0, 1), got {dropout}")
    trunk = build_trunk(name, weights=weights, in_channels=2, grey=True, stride=stride, until=until)
    return PixelTrunk(trunk, num_classes, width=width, grid=grid, dropout=dropout)
