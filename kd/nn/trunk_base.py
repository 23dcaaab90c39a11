"""The interface of feature trunks, and the first layers of a context teacher as a trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError


def wide(tensor: Tensor) -> Tensor:
    """Convert a tensor to float32, unless it is float64.

    Half precision is too coarse for coordinates: bfloat16 cannot resolve whole pixels at 512.
    """
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (N, C, h, w) bilinearly; maps that already have the size are returned as is."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


class Trunk(nn.Module):
    """Base class of networks of consecutive steps that map images to feature maps.

    Attributes:
        name: Name of the trunk in error messages.
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
        """Yield the path and the module of each step, in order."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, in, H, W) to features (N, channels, H/stride, W/stride)."""
        return self.forward_levels(images)[-1]

    def forward_levels(self, images: Tensor) -> list[Tensor]:
        """Compute the last map at each of `level_strides`, finest first, ending with the output."""
        raise NotImplementedError

    def forward_at(self, images: Tensor, paths: Sequence[str]) -> list[Tensor]:
        """Compute the maps (N, C, h, w) after the steps with the given paths."""
        raise NotImplementedError

    def stages(self) -> list[tuple[str, int]]:
        """Return path and channels of the last step at each stride, finest first.

        The strides are those of the published network, even if the option `stride` of `build_trunk`
        removed some of them.
        """
        raise NotImplementedError

    def middle(self) -> tuple[str, int]:
        """Return path and channels of the last stage but one, see `stages`."""
        found = self.stages()
        if len(found) < 2:
            raise UserError(f"{self.name} has feature maps of one stride only, two are needed")
        return found[-2]

    def last_step(self, stride: int) -> str:
        """Return the path of the last step at a stride, which must be one of `level_strides`."""
        raise NotImplementedError

    def cut(self, until: str) -> None:
        """Remove all steps after the step with the path `until`, in place."""
        raise NotImplementedError


class BlindTrunk(Trunk):
    """The first steps of a context teacher as a trunk for RGB images.

    The fourth input channel of the teacher, which marks the hidden region, is set to 0 everywhere,
    because nothing is hidden.

    Args:
        name: Name of the trunk in error messages.
        steps: For each step the module, its output channels and its stride in pixels. Strides must
            be in ascending order.
        see: Function by which the teacher preprocesses its input (N, 4, H, W); None for a teacher
            without preprocessing.
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
    """Select RGB from an input (N, 4, H, W), for teachers that do not use the fourth channel."""
    return images[:, :3]


LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights of grey in Pillow and torchvision


def grey_and_region(images: Tensor) -> Tensor:
    """Convert normalised RGB and region mask (K, 4, H, W) to grey and region mask (K, 2, H, W).

    Pixels of the hidden region are 0 in RGB and stay 0 in grey. A trunk whose first convolution was
    summed over RGB has the same features as for an RGB image with three equal channels of grey.
    """
    luma = images.new_tensor(LUMA).view(1, 3, 1, 1)
    return torch.cat([(images[:, :3] * luma).sum(dim=1, keepdim=True), images[:, 3:]], dim=1)
