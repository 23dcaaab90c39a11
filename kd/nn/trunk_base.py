"""The interface of feature trunks, and the first layers of a context teacher as a trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError


def wide(tensor: Tensor) -> Tensor:
    """Convert to float32, except for float64.

    Half precision is too coarse for many things: bfloat16 cannot resolve 0.1 pixels at 32, nor
    whole pixels at 512.
    """
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (N, C, h, w) bilinearly; maps that have the size are returned as they are."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


class Trunk(nn.Module):
    """A network from images to feature maps that consists of consecutive steps.

    Attributes:
        name: Name in messages.
        channels: Channels of the output.
        stride: Pixels per cell of the output.
        level_strides: Strides of the maps of `forward_levels`, finest first.
        level_channels: Channels of the maps of `forward_levels`.
    """

    name: str
    channels: int
    stride: int
    level_strides: tuple[int, ...]
    level_channels: tuple[int, ...]

    def steps(self) -> Iterator[tuple[str, nn.Module]]:
        """Consecutive modules with their paths."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, in, H, W) to features (N, channels, H/stride, W/stride)."""
        return self.forward_levels(images)[-1]

    def forward_levels(self, images: Tensor) -> list[Tensor]:
        """The last map at each of `level_strides`, finest first; the last of them is the output."""
        raise NotImplementedError

    def forward_at(self, images: Tensor, paths: Sequence[str]) -> list[Tensor]:
        """The maps (N, C, h, w) after the steps of these paths."""
        raise NotImplementedError

    def stages(self) -> list[tuple[str, int]]:
        """Path and channels of the last step at each stride, finest first.

        Strides are those of the network as published, even if some were removed by `stride`.
        """
        raise NotImplementedError

    def middle(self) -> tuple[str, int]:
        """Path and channels of the last stage but one, see `stages`."""
        found = self.stages()
        if len(found) < 2:
            raise UserError(f"{self.name} has feature maps of one stride only, two are needed")
        return found[-2]

    def last_step(self, stride: int) -> str:
        """Path of the last step at one of `level_strides`."""
        raise NotImplementedError

    def cut(self, until: str) -> None:
        """Drop all steps after the one of this path.

        Raises:
            UserError: The trunk has no such step.
        """
        raise NotImplementedError


class BlindTrunk(Trunk):
    """The first steps of a context teacher as a trunk for RGB images.

    The teacher's fourth input channel, the hidden region, is 0 everywhere: nothing is hidden.

    Args:
        name: Name in messages.
        steps: Each step with its channels and its stride in pixels, strides in ascending order.
        see: The teacher's preprocessing of its input (N, 4, H, W).
    """

    def __init__(
        self,
        name: str,
        steps: Iterable[tuple[nn.Module, int, int]],
        see: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        modules, channels, strides = zip(*steps, strict=True)
        self.name, self._see, self._step_strides = name, see, tuple(strides)
        self.path = nn.Sequential(*modules)
        last_of = dict(zip(strides, channels, strict=True))
        self.level_strides = tuple(sorted(last_of))
        self.level_channels = tuple(last_of[stride] for stride in self.level_strides)
        self.channels, self.stride = channels[-1], strides[-1]

    def steps(self) -> Iterator[tuple[str, nn.Module]]:
        for name, step in self.path.named_children():
            yield f"path.{name}", step

    def forward_levels(self, images: Tensor) -> list[Tensor]:
        count, _, height, width = images.shape
        maps = torch.cat([images, images.new_zeros(count, 1, height, width)], dim=1)
        if self._see is not None:
            maps = self._see(maps)
        last: dict[int, Tensor] = {}
        for (_, step), stride in zip(self.steps(), self._step_strides, strict=True):
            maps = step(maps)
            last[stride] = maps
        return [last[stride] for stride in self.level_strides]


def rgb_alone(images: Tensor) -> Tensor:
    """RGB of (N, 4, H, W), for teachers that do not use the fourth channel."""
    return images[:, :3]


LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's and torchvision's grey


def grey_and_region(images: Tensor) -> Tensor:
    """Luma and the region's channel, (K, 2, H, W), of normalised RGB and region, (K, 4, H, W).

    The hidden region, 0 in all three channels, stays 0. A trunk whose first convolution was summed
    over RGB gives the same features as for the grey image in three equal channels.
    """
    luma = images.new_tensor(LUMA).view(1, 3, 1, 1)
    return torch.cat([(images[:, :3] * luma).sum(dim=1, keepdim=True), images[:, 3:]], dim=1)
