"""A saliency student on any trunk, with a decoder to the size of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.saliency import WIDTHS, LogitMap, NormedDecoder, padded
from kd.nn.trunk import NetworkOptions
from kd.nn.trunk_base import Trunk
from kd.nn.weights import load_network
from kd.registry import with_options

BRANCHES = ("a", "b")


class SaliencyStudent(nn.Module):
    """A trunk, a decoder of five stages, and one or two saliency maps.

    Attributes:
        task: Name of the task that fits the output.
        stride: Pixels per cell of the trunk's map; images are padded to multiples of this stride.
    """

    task = "saliency"

    def __init__(self, trunk: Trunk, *, second: bool) -> None:
        super().__init__()
        self.trunk, self.stride = trunk, trunk.stride
        self.decoder = NormedDecoder(trunk.channels, trunk.stride)
        self.saliency = LogitMap(WIDTHS[-1])
        # The second map is built last, so that with the same seed students A and B have the same
        # initial weights.
        self.teacher_saliency = LogitMap(WIDTHS[-1]) if second else None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalised images (N, 3, H, W) of any size to logits.

        Returns:
            `saliency` (N, 1, H, W). For student B also `teacher_saliency` (N, 1, H, W), which is
            trained to match the teacher's map.
        """
        whole = padded(images, self.stride)
        maps = self.decoder(self.trunk(whole))  # (N, 16, H, W)
        sizes = {"whole": whole.shape[2:], "size": images.shape[2:]}
        output = {"saliency": self.saliency(maps, **sizes)}
        if self.teacher_saliency is not None:
            output["teacher_saliency"] = self.teacher_saliency(maps, **sizes)
        return output


@dataclass(frozen=True, kw_only=True)
class SaliencyOptions(NetworkOptions):
    """Options of `saliency`.

    Attributes:
        branches: "a" for one map (student A), or "b" for a second map, which is trained to match
            the teacher's map (student B).
    """

    branches: Literal["a", "b"] = "b"


@with_options(SaliencyOptions)
def saliency(options: SaliencyOptions) -> SaliencyStudent:
    """Build student A or B on any trunk; with resnet18 it has 12.75 M parameters.

    Raises:
        UserError: `branches` is unknown, the trunk cannot be built, or the file does not fit the
            network.
    """
    if options.branches not in BRANCHES:
        raise UserError(f"saliency: branches must be 'a' or 'b', got {options.branches!r}")
    network = SaliencyStudent(options.build(), second=options.branches == "b")
    load_network(network, options.file, what=f"saliency student on {options.trunk}")
    return network
