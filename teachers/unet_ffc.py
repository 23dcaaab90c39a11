"""A U-Net of fast Fourier convolutions as a context teacher."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.ffc import FFCBlock, join_maps
from teachers.unet import UNet, check_options


class FourierKit:
    """Blocks of fast Fourier convolutions for a U-Net.

    Args:
        ratio: Fraction of the channels of each map that is global. All channels of the input image
            are local.
        local_unit: Whether spectral transforms have a local Fourier unit.
    """

    def __init__(self, ratio: float, *, local_unit: bool) -> None:
        self.ratio, self.local_unit = ratio, local_unit

    def stem(self, channels: int) -> nn.Module:
        """Build the first two convolutions, whose input has 4 channels."""
        return self._twice(4, channels, channels, ratio_in=0.0)

    def convolve(self, in_channels: int, out_channels: int, middle: int | None = None) -> nn.Module:
        """Build two convolutions with stride 1; the first has `middle` output channels."""
        return self._twice(in_channels, middle or out_channels, out_channels, ratio_in=self.ratio)

    def join(self, skip: Tensor, upper: Tensor) -> Tensor:
        """Concatenate two maps, with the local channels of both first."""
        return join_maps(skip, upper, self.ratio)

    def _twice(self, first: int, middle: int, last: int, *, ratio_in: float) -> nn.Module:
        ratio, local_unit = self.ratio, self.local_unit
        return nn.Sequential(
            FFCBlock(first, middle, ratio_in=ratio_in, ratio_out=ratio, local_unit=local_unit),
            FFCBlock(middle, last, ratio_in=ratio, ratio_out=ratio, local_unit=local_unit),
        )


def unet_ffc(
    num_classes: int,
    *,
    width: int = 64,
    depth: int = 4,
    up: Literal["transposed", "bilinear"] = "bilinear",
    ratio: float = 0.5,
    local_unit: bool = True,
    prior_probability: float = 0.01,
) -> UNet:
    """Build a U-Net of fast Fourier convolutions; the last channels of each map are global.

    Args:
        num_classes: Number of classes, C.
        width: Channels of the finest level; each coarser level has twice as many.
        depth: Number of times that the grid is halved.
        up: Up-sampling by transposed convolutions, which mix local and global channels, or by
            bilinear interpolation.
        ratio: Fraction of the channels that is global; with 0 this is a plain U-Net.
        local_unit: Whether spectral transforms also have a Fourier unit for the quarters of a map.
        prior_probability: Initial probability of each class at each pixel.

    Raises:
        UserError: An option is out of range.
    """
    check_options("unet_ffc", width=width, depth=depth, up=up, prior_probability=prior_probability)
    if not 0 <= ratio < 1 or not (width * ratio).is_integer():
        raise UserError(
            "unet_ffc: ratio must be in [0, 1) and ratio times width an integer, got ratio "
            f"{ratio} and width {width}"
        )
    return UNet(
        num_classes, width=width, depth=depth, transposed=up == "transposed",
        prior=prior_probability, kit=FourierKit(ratio, local_unit=local_unit),
    )  # fmt: skip
