"""A student of where people look: any torchvision trunk and a decoder to the picture's size."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.saliency import WIDTHS, LogitMap, NormedDecoder, padded
from kd.nn.trunk import build_trunk
from kd.nn.trunk_base import Trunk
from kd.nn.weights import load_network

BRANCHES = ("a", "b")


class SaliencyStudent(nn.Module):
    """A trunk, five stages, and one or two maps from the last of them.

    Attributes:
        task: The kind of task that fits the output.
        stride: Pixels a place of the trunk's map; pictures are padded to multiples of it.
    """

    task = "saliency"

    def __init__(self, trunk: Trunk, *, second: bool) -> None:
        super().__init__()
        self.trunk, self.stride = trunk, trunk.stride
        self.decoder = NormedDecoder(trunk.channels, trunk.stride)
        self.saliency = LogitMap(WIDTHS[-1])
        # Last, so that A and B of one seed start from the same weights.
        self.teacher_saliency = LogitMap(WIDTHS[-1]) if second else None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (N, 3, H, W) of any size to logits.

        Returns:
            `saliency` (N, 1, H, W), and of B `teacher_saliency`, the same: what its teacher would
            say. `kd.nn.saliency` says what becomes of sizes that the stride does not divide.
        """
        whole = padded(images, self.stride)
        maps = self.decoder(self.trunk(whole))  # (N, 16, H, W)
        sizes = {"whole": whole.shape[2:], "size": images.shape[2:]}
        output = {"saliency": self.saliency(maps, **sizes)}
        if self.teacher_saliency is not None:
            output["teacher_saliency"] = self.teacher_saliency(maps, **sizes)
        return output


def saliency(
    *,
    trunk: str = "resnet18",
    weights: str | None = None,
    branches: Literal["a", "b"] = "b",
    width: float = 1.0,
    file: str | None = None,
) -> SaliencyStudent:
    """Student A or B; on resnet18 12.75 M parameters.

    Args:
        trunk: Name of the torchvision classifier.
        weights: Of the trunk: "imagenet", a file, or random ones.
        branches: "a" for one map; "b" for a second one that is matched to the teacher's.
        width: Share of the trunk's channels, for a smaller one from random weights.
        file: Weights of the whole network, see `kd.nn.weights.load_network`; those of the trunk
            alone are then left aside.

    Raises:
        UserError: Unknown branches, a trunk that cannot be built, or a file that does not fit.
    """
    if branches not in BRANCHES:
        raise UserError(f"saliency: branches must be 'a' or 'b', got {branches!r}")
    seen = build_trunk(trunk, weights=weights if file is None else None, width=width)
    network = SaliencyStudent(seen, second=branches == "b")
    load_network(network, file, what=f"saliency student on {trunk}")
    return network
