"""A context teacher's own trunk as a student's: for pictures in which nothing is hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from kd.nn.trunk import Trunk


class BlindTrunk(nn.Module):
    """Steps of a context teacher that run one after the other, each on a grid as fine or coarser.

    The teacher's input has a fourth channel, 1 where an object is hidden; here it is 0 everywhere.

    Args:
        name: What messages call it.
        steps: Each step with its channels and its stride, pixels per place of the picture.
        see: What the teacher does to its input (N, 4, H, W) before the first step.

    Attributes:
        channels: Of the output.
        stride: Of the output.
        level_strides: Strides of what `forward_levels` returns, finest first.
        level_channels: Channels of the same.
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
        self.level_strides: tuple[int, ...] = tuple(sorted(last_of))
        self.level_channels = tuple(last_of[stride] for stride in self.level_strides)
        self.channels, self.stride = channels[-1], strides[-1]

    def steps(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that run one after the other, with their paths."""
        for name, step in self.path.named_children():
            yield f"path.{name}", step

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to features (N, channels, H/stride, W/stride)."""
        return self.forward_levels(images)[-1]

    def forward_levels(self, images: Tensor) -> list[Tensor]:
        """The last map at each of `level_strides`, finest first."""
        count, _, height, width = images.shape
        maps = torch.cat([images, images.new_zeros(count, 1, height, width)], dim=1)
        if self._see is not None:
            maps = self._see(maps)
        kept: dict[int, Tensor] = {}
        for (_, step), stride in zip(self.steps(), self._step_strides, strict=True):
            maps = step(maps)
            kept[stride] = maps
        return [kept[stride] for stride in self.level_strides]


def picture_alone(images: Tensor) -> Tensor:
    """RGB of (N, 4, H, W): for `see`, where a teacher has no use for the fourth channel."""
    return images[:, :3]


AnyTrunk = Trunk | BlindTrunk


LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's and torchvision's grey


def grey_and_region(images: Tensor) -> Tensor:
    """Luma of normalised RGB beside the region's channel.

    What is 0 in all three channels, the hidden region, stays 0. A trunk whose first convolution
    was summed over RGB answers as it did to the grey picture in three equal channels.

    Args:
        images: Normalised RGB and the region, (K, 4, H, W).

    Returns:
        (K, 2, H, W).
    """
    luma = images.new_tensor(LUMA).view(1, 3, 1, 1)
    return torch.cat([(images[:, :3] * luma).sum(dim=1, keepdim=True), images[:, 3:]], dim=1)
