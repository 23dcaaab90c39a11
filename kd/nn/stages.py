"""The last three stages of a torchvision trunk on one grid, side by side."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.trunk import Trunk, build_trunk

COUNT = 3


class StepPool(nn.Module):
    """Max pooling of 2 x 2 windows, one place apart: the map keeps its size.

    The windows at the right and at the bottom reach over the edge, where there is nothing.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, h, w) to the same."""
        return F.max_pool2d(F.pad(maps, (0, 1, 0, 1), value=-torch.inf), 2, stride=1)


class JoinedStages(nn.Module):
    """A trunk and the joined output of its last three stages.

    Attributes:
        trunk: Steps under torchvision's names.
        channels: Of the joined map.
        stride: Of the same, pixels a place.
    """

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk, self.stride = trunk, trunk.stride
        # VGG's stages end in the pooling that begins the next grid.
        found = trunk.stages(first=trunk.name.startswith("vgg"))[-COUNT:]
        if len(found) < COUNT:
            raise UserError(f"{trunk.name} has {len(found)} grids, where {COUNT} are joined")
        self.paths = tuple(path for path, _ in found)
        self.channels = sum(channels for _, channels in found)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to (N, channels, H/stride, W/stride).

        A stage on a finer grid, where the stride is 16, is brought to the last one's by means.
        """
        maps = self.trunk.forward_at(images, self.paths)
        height, width = maps[-1].shape[2:]
        same = [
            one if one.shape[2:] == (height, width) else F.adaptive_avg_pool2d(one, (height, width))
            for one in maps
        ]
        return torch.cat(same, dim=1)


def joined_stages(
    name: str, *, weights: str | None = None, stride: int = 8, until: str | None = None
) -> JoinedStages:
    """The last three stages of a torchvision classifier.

    Args:
        name: As in `build_trunk`; transformers with one grid will not do.
        weights: None, "imagenet" or a file, see there.
        stride: Pixels a place. Later steps are dilated; the poolings of a VGG stay, one place
            apart.
        until: Path of the last step that is kept.

    Raises:
        UserError: What `build_trunk` raises, or a trunk with fewer than three grids.
    """
    if not name.startswith("vgg"):
        trunk = build_trunk(name, weights=weights, stride=stride, dilate=True, until=until)
        return JoinedStages(trunk)
    trunk = build_trunk(name, weights=weights, until=until)
    if stride not in trunk.level_strides:
        known = ", ".join(map(str, trunk.level_strides))
        raise UserError(f"{name}: stride must be one of {known}, got {stride}")
    _keep_pools(trunk, stride)
    return JoinedStages(trunk)


def _keep_pools(trunk: Trunk, stride: int) -> None:
    """Poolings of a VGG beyond a stride take steps of 1; convolutions after them are dilated."""
    dilation = 1
    for (path, step), own in list(zip(trunk.steps(), trunk.step_strides, strict=True)):
        if isinstance(step, nn.MaxPool2d) and own > stride:
            parent, _, child = path.rpartition(".")
            setattr(trunk.get_submodule(parent), child, StepPool())
            dilation *= 2
        elif isinstance(step, nn.Conv2d):
            step.dilation = step.padding = (dilation, dilation)
    trunk.measure()
