"""From features to maps of where people look: what the saliency teacher and students share.

A map is raw logits, (N, 1, H, W), at the picture's own size. Pictures whose sides a trunk's stride
does not divide are padded at the right and at the bottom with 0, the mean colour, as in a batch of
pictures of several sizes; what the network says of the padding is cut off again. So a place of the
map is always the place of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.nn.segmentation import block

WIDTHS = (256, 128, 64, 32, 16)


def padded(images: Tensor, stride: int) -> Tensor:
    """Images (N, C, H, W) with zeros at the right and at the bottom, up to multiples of stride."""
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % stride, 0, -height % stride))


def enlarged(maps: Tensor, scale: int) -> Tensor:
    """(N, C, h, w) to (N, C, scale h, scale w), bilinear."""
    if scale == 1:
        return maps
    return F.interpolate(maps, scale_factor=float(scale), mode="bilinear", align_corners=False)


class LogitMap(nn.Module):
    """The last layer: a 3x3 convolution to one channel, in full precision under autocast too.

    A softmax over all of a picture's places is over numbers whose small differences matter.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, maps: Tensor, *, whole: torch.Size, size: torch.Size) -> Tensor:
        """Logits of a picture.

        Args:
            maps: (N, channels, h, w), at or near the padded picture's size.
            whole: H and W of the padded picture.
            size: H and W of the picture.

        Returns:
            (N, 1, H, W).
        """
        wide = torch.float64 if maps.dtype == torch.float64 else torch.float32
        with torch.autocast(maps.device.type, enabled=False):
            logits: Tensor = self.conv(maps.to(wide))
        if logits.shape[2:] != whole:  # a coarser network, or a trunk that loses a border
            logits = F.interpolate(logits, whole, mode="bilinear", align_corners=False)
        return logits[:, :, : size[0], : size[1]]


class NormedDecoder(nn.Sequential):
    """Five stages of 256, 128, 64, 32 and 16 channels: twice the size, 3x3 conv, norm, ReLU.

    Of a trunk with a finer grid than 1/32 the first stages leave the size as it is.

    Args:
        channels: Of the trunk's output.
        stride: Of the same, pixels a place.
    """

    def __init__(self, channels: int, stride: int) -> None:
        doublings = min(len(WIDTHS), round(math.log2(stride)))
        kept = len(WIDTHS) - doublings
        super().__init__(
            *(
                Stage(before, after, scale=1 if place < kept else 2)
                for place, (before, after) in enumerate(
                    zip((channels, *WIDTHS[:-1]), WIDTHS, strict=True)
                )
            )
        )


class Stage(nn.Module):
    """Larger by a factor, then convolution, batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, *, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.block = block(inputs, outputs, 3)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, inputs, h, w) to (N, outputs, scale h, scale w)."""
        result: Tensor = self.block(enlarged(maps, self.scale))
        return result


class PlainDecoder(nn.Module):
    """MSI-Net's: three times twice the size and a 3x3 convolution, ReLU and no norm.

    Args:
        channels: Of the map; the stages have a half, a quarter and an eighth of them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = max(1, channels // 8)  # of the result
        widths = (max(1, channels // 2), max(1, channels // 4), self.channels)
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1)
            for before, after in zip((channels, *widths[:-1]), widths, strict=True)
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(N, channels, h, w) to (N, channels / 8, 8 h, 8 w)."""
        for conv in self.stages:
            maps = conv(enlarged(maps, 2)).relu()
        return maps


class ContextPyramid(nn.Module):
    """Atrous spatial pyramid pooling, without norms, as MSI-Net has it.

    Chen et al., 2017, https://arxiv.org/abs/1706.05587; Kroner et al., 2020,
    https://arxiv.org/abs/1902.06634. A convolution of one place, one of nine places for each
    dilation, and the picture's mean, each of `width` channels; joined and mixed to `width` again.

    Args:
        channels: Of the map.
        width: Of each branch and of the result.
        dilations: Of the branches that look around.
    """

    def __init__(
        self, channels: int, width: int = 256, *, dilations: Sequence[int] = (4, 8, 12)
    ) -> None:
        super().__init__()
        self.here = nn.Conv2d(channels, width, 1)
        self.around = nn.ModuleList(
            nn.Conv2d(channels, width, 3, padding=spread, dilation=spread) for spread in dilations
        )
        self.whole = nn.Conv2d(channels, width, 1)
        self.join = nn.Conv2d((2 + len(dilations)) * width, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, channels, h, w) to (N, width, h, w)."""
        near = [branch(maps).relu() for branch in (self.here, *self.around)]
        whole = self.whole(maps.mean(dim=(2, 3), keepdim=True)).relu()  # (N, width, 1, 1)
        everything = torch.cat([*near, whole.expand_as(near[0])], dim=1)
        joined: Tensor = self.join(everything).relu()
        return joined
