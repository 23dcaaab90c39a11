"""A ResNet-18 on small grey images as a context teacher that predicts the classes in the scene."""

from __future__ import annotations

from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.trunk import build_trunk
from kd.nn.trunk_base import BlindTrunk, Trunk, grey_and_region


class SceneTrunk(nn.Module):
    """A trunk, global average pooling, and one linear layer.

    Attributes:
        task: Name of the task that fits the output.
    """

    task = "context_scene"

    def __init__(self, trunk: Trunk, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(trunk.channels, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Map images with a channel for the hidden region, (K, 4, H, W), to class logits (K, C)."""
        logits: Tensor = self.head(self.trunk(grey_and_region(images)).mean(dim=(2, 3)))
        return logits

    def scene_trunk(self) -> BlindTrunk:
        """Return the trunk, which converts RGB to grey, for a student to start from."""
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
    """Build BlindNet's multi-label ResNet-18, which predicts the presence of each class in a scene.

    The input is a grey image of 64 pixels (`data.size: 64`) and the hidden region.

    Args:
        num_classes: Number of classes, C.
        name: Name of the trunk: resnet18, timm/NAME, ...
        weights: Weights of the trunk: "imagenet", a file, or null for random weights. The weights
            of the first convolution are summed over RGB, so that the response to grey images does
            not change.
        stride: Largest stride of the trunk's output, see `kd.nn.trunk.build_trunk`.
        dropout: Dropout probability before the linear layer.

    Raises:
        UserError: An option is out of range, or the trunk cannot be built.
    """
    if not 0 <= dropout < 1:
        raise UserError(f"resnet_multilabel: dropout must be in [0, 1), got {dropout}")
    trunk = build_trunk(name, weights=weights, in_channels=2, grey=True, stride=stride)
    return SceneTrunk(trunk, num_classes, dropout=dropout)
