"""Decoders from features to saliency logits (N, 1, H, W), for teachers and students.

Images are padded with 0, the mean colour after normalisation, at the right and bottom to multiples
of the trunk's stride. The logits are cropped to the image's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.nn.segmentation import block
from kd.nn.trunk_base import resized, wide

WIDTHS = (256, 128, 64, 32, 16)


def padded(images: Tensor, stride: int) -> Tensor:
    """Pad images (N, C, H, W) with 0 at the right and at the bottom to multiples of the stride."""
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % stride, 0, -height % stride))


def enlarged(maps: Tensor, scale: int) -> Tensor:
    """Resize maps (N, C, h, w) to (N, C, scale * h, scale * w) by bilinear interpolation."""
    if scale == 1:
        return maps
    return F.interpolate(maps, scale_factor=float(scale), mode="bilinear", align_corners=False)


class LogitMap(nn.Module):
    """Last layer: a 3x3 convolution to one channel, in full precision even under autocast.

    Half precision is too coarse for the loss, a softmax over all pixels of an image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, maps: Tensor, *, whole: torch.Size, size: torch.Size) -> Tensor:
        """Map features (N, C, h, w) to logits (N, 1, *size).

        The logits are resized to `whole`, height and width of the padded images, then cropped to
        `size`, height and width without padding.
        """
        with torch.autocast(maps.device.type, enabled=False):
            logits: Tensor = self.conv(wide(maps))
        # The logits are smaller than the image if the stride exceeds the decoder's up-sampling, or
        # if the trunk loses a border.
        return resized(logits, whole)[:, :, : size[0], : size[1]]


class NormedDecoder(nn.Sequential):
    """Five stages of 256, 128, 64, 32 and 16 channels, each of which up-samples by 2.

    For a trunk with a stride below 32 the first stages do not up-sample.
    """

    def __init__(self, channels: int, stride: int) -> None:
        doublings = min(len(WIDTHS), round(math.log2(stride)))
        first = len(WIDTHS) - doublings
        super().__init__(
            *(
                Stage(before, after, scale=1 if place < first else 2)
                for place, (before, after) in enumerate(
                    zip((channels, *WIDTHS[:-1]), WIDTHS, strict=True)
                )
            )
        )


class Stage(nn.Module):
    """Up-sampling by a factor, 3x3 convolution, batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, *, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.block = block(inputs, outputs, 3)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, inputs, h, w) to (N, outputs, scale * h, scale * w)."""
        result: Tensor = self.block(enlarged(maps, self.scale))
        return result


class PlainDecoder(nn.Module):
    """MSI-Net's decoder: three stages that up-sample by 2, halve the channels and apply a ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = max(1, channels // 8)  # of the output
        widths = (max(1, channels // 2), max(1, channels // 4), self.channels)
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1)
            for before, after in zip((channels, *widths[:-1]), widths, strict=True)
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, channels, h, w) to (N, channels / 8, 8 * h, 8 * w)."""
        for conv in self.stages:
            maps = conv(enlarged(maps, 2)).relu()
        return maps


class ContextPyramid(nn.Module):
    """Atrous spatial pyramid pooling without norms, as in MSI-Net, with `width` output channels.

    Chen et al., 2017, https://arxiv.org/abs/1706.05587; Kroner et al., 2020,
    https://arxiv.org/abs/1902.06634. Its parallel branches are a 1x1 convolution, a 3x3 convolution
    for each dilation, and a 1x1 convolution of the mean over the image.
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
        """Map (N, channels, h, w) to (N, width, h, w)."""
        near = [branch(maps).relu() for branch in (self.here, *self.around)]
        whole = self.whole(maps.mean(dim=(2, 3), keepdim=True)).relu()  # (N, width, 1, 1)
        everything = torch.cat([*near, whole.expand_as(near[0])], dim=1)
        joined: Tensor = self.join(everything).relu()
        return joined
