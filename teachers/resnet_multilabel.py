"""A ResNet-18 on small grey images as a context teacher that predicts the classes in the scene."""

from __future__ import annotations

from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.trunk import build_trunk
from kd.nn.trunk_base import BlindTrunk, Trunk, grey_and_region


class SceneTrunk(nn.Module):
    """A trunk, global average pooling, one linear layer.

    Attributes:
        task: Name of the task that fits the output.
    """

    task = "context_scene"

    def __init__(self, trunk: Trunk, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(trunk.channels, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Images with the hidden region's channel (K, 4, H, W) to logits (K, C)."""
        logits: Tensor = self.head(self.trunk(grey_and_region(images)).mean(dim=(2, 3)))
        return logits

    def scene_trunk(self) -> BlindTrunk:
        """The trunk for a student; it reads luma."""
        step = (self.trunk, self.trunk.channels, self.trunk.stride)
        return BlindTrunk("resnet_multilabel", [step], see=grey_and_region)


def resnet_multilabel(
    num_classes: int,
    *,
    name: str = "resnet18",
    weights: str | None = None,
    stride: int | None = None,
    dropout: float = 0.2,
) -> SceneTrunk:
    """BlindNet's multi-label ResNet-18: logits for the presence of each class in the scene.

    The input is luma and the hidden region, for images of 64 pixels (`data.size: 64`).

    Args:
        num_classes: Length of the output.
        name: Name of the trunk: resnet18, timm/NAME, ...
        weights: The trunk's weights: "imagenet", a file, or null for random ones. The first
            convolution is summed over RGB, so that its response to grey images stays the same.
        stride: Largest stride of the trunk's output.
        dropout: Dropout before the linear layer.

    Raises:
        UserError: An option out of range, or a trunk that cannot be built.
    """
    if not 0 <= dropout < 1:
        raise UserError(f"resnet_multilabel: dropout must be in [0, 1), got {dropout}")
    trunk = build_trunk(name, weights=weights, in_channels=2, grey=True, stride=stride)
    return SceneTrunk(trunk, num_classes, dropout=dropout)
