"""U-Net as a context teacher, which predicts class logits of the hidden object at each pixel."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.trunk_base import BlindTrunk


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions with stride 1, each followed by batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, middle: int | None = None) -> None:
        middle = middle or out_channels
        super().__init__(
            nn.Conv2d(in_channels, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class Kit(Protocol):
    """Functions that build the blocks of a U-Net, for plain or fast Fourier convolutions."""

    def stem(self, channels: int) -> nn.Module:
        """Build the first two convolutions, whose input has 4 channels."""
        ...

    def convolve(self, in_channels: int, out_channels: int, middle: int | None = None) -> nn.Module:
        """Build two convolutions with stride 1; the first has `middle` output channels."""
        ...

    def join(self, skip: Tensor, upper: Tensor) -> Tensor:
        """Concatenate the maps of a skip connection and of the level above."""
        ...


class PlainKit:
    """Blocks of plain convolutions for a U-Net."""

    def stem(self, channels: int) -> nn.Module:
        """Build the first two convolutions, whose input has 4 channels."""
        return DoubleConv(4, channels)

    def convolve(self, in_channels: int, out_channels: int, middle: int | None = None) -> nn.Module:
        """Build two convolutions with stride 1; the first has `middle` output channels."""
        return DoubleConv(in_channels, out_channels, middle)

    def join(self, skip: Tensor, upper: Tensor) -> Tensor:
        """Concatenate two maps."""
        return torch.cat([skip, upper], dim=1)


class Up(nn.Module):
    """Step of the decoder: up-sample by 2, concatenate the skip connection, and convolve."""

    def __init__(self, in_channels: int, out_channels: int, *, transposed: bool, kit: Kit) -> None:
        super().__init__()
        self.join = kit.join
        self.up: nn.Module
        if transposed:
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, 2, stride=2)
            self.convolve = kit.convolve(in_channels, out_channels)
        else:  # the coarse map and the skip connection each have half of in_channels
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
            self.convolve = kit.convolve(in_channels, out_channels, in_channels // 2)

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        """Map coarse maps (K, C, h, w) and a skip connection (K, C', 2h, 2w) to (K, D, 2h, 2w)."""
        convolved: Tensor = self.convolve(self.join(skip, self.up(coarse)))
        return convolved


class UNet(nn.Module):
    """U-Net with padding and batch norm.

    Ronneberger et al., 2015, https://arxiv.org/abs/1505.04597.

    Attributes:
        task: Name of the task that fits the output.
    """

    task = "context_pixels"

    def __init__(
        self,
        num_classes: int,
        *,
        width: int,
        depth: int,
        transposed: bool,
        prior: float,
        kit: Kit | None = None,
    ) -> None:
        super().__init__()
        kit = kit or PlainKit()
        self.multiple = 2**depth
        widths = [width * 2**level for level in range(depth + 1)]
        if not transposed:
            # Bilinear up-sampling does not halve the channels, so the coarsest level has half.
            widths[-1] //= 2
        self.stem = kit.stem(width)
        self._widths = widths
        self.downs = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), kit.convolve(fine, coarse))
            for fine, coarse in pairwise(widths)
        )
        # A layer path for distillation terms that does not depend on the depth.
        self.bottleneck = nn.Identity()
        self.ups = nn.ModuleList()
        for level in reversed(range(depth)):
            halved = not transposed and level > 0
            out_channels = width * 2**level // (2 if halved else 1)
            in_channels = width * 2 ** (level + 1)
            self.ups.append(Up(in_channels, out_channels, transposed=transposed, kit=kit))
        self.head = nn.Conv2d(width, num_classes, 1)
        # The initial probabilities are low, because most classes are absent at each pixel.
        nn.init.constant_(self.head.bias, math.log(prior / (1 - prior)))  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Map images with a channel for the hidden region, (K, 4, H, W), to logits (K, C, H, W)."""
        height, width = images.shape[2:]
        below, right = -height % self.multiple, -width % self.multiple
        features = self.stem(F.pad(images, (0, right, 0, below)))
        skips = []
        for down in self.downs:
            skips.append(features)
            features = down(features)
        features = self.bottleneck(features)  # (K, 16 * width, H/16, W/16) at depth 4
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            features = up(features, skip)
        logits: Tensor = self.head(features)
        return logits[:, :, :height, :width]

    def scene_trunk(self) -> BlindTrunk:
        """Return the encoder as a trunk, from which a student can start."""
        levels = zip([self.stem, *self.downs], self._widths, strict=True)
        return BlindTrunk(
            "unet", [(step, wide, 2**level) for level, (step, wide) in enumerate(levels)]
        )


def unet(
    num_classes: int,
    *,
    width: int = 64,
    depth: int = 4,
    up: Literal["transposed", "bilinear"] = "transposed",
    prior_probability: float = 0.01,
) -> UNet:
    """Build a U-Net whose input is RGB and the hidden region.

    It has 31.0 M parameters, or 17.3 M with bilinear up-sampling.

    Args:
        num_classes: Number of classes, C.
        width: Channels of the finest level; each coarser level has twice as many.
        depth: Number of times that the grid is halved.
        up: Up-sampling by transposed convolutions or by bilinear interpolation.
        prior_probability: Initial probability of each class at each pixel.

    Raises:
        UserError: An option is out of range.
    """
    check_options("unet", width=width, depth=depth, up=up, prior_probability=prior_probability)
    transposed = up == "transposed"
    return UNet(
        num_classes, width=width, depth=depth, transposed=transposed, prior=prior_probability
    )


def check_options(name: str, *, width: int, depth: int, up: str, prior_probability: float) -> None:
    """Check the options of a U-Net, whose `name` is the prefix of error messages."""
    if up not in ("transposed", "bilinear"):
        raise UserError(f"{name}: up must be 'transposed' or 'bilinear', got {up!r}")
    if width < 2 or width % 2 or depth < 1:
        raise UserError(
            f"{name}: width must be even and depth at least 1, got width {width} and depth {depth}"
        )
    if not 0 < prior_probability < 1:
        raise UserError(
            f"{name}: prior_probability must be between 0 and 1, got {prior_probability}"
        )
