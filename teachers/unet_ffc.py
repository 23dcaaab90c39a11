"""A U-Net of fast Fourier convolutions as a context teacher."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.ffc import FFCBlock, join_maps
from teachers.unet import UNet, check_options


class FourierKit:
    """Fast Fourier convolutions for a U-Net.

    Args:
        ratio: Fraction of the channels of each map that is global; all channels of the image are
            local.
        local_unit: Whether spectral transforms have a local Fourier unit.
    """

    def __init__(self, ratio: float, *, local_unit: bool) -> None:
        self.ratio, self.local_unit = ratio, local_unit

    def stem(self, channels: int) -> nn.Module:
        """The first two convolutions, from 4 channels."""
        return self._twice(4, channels, channels, ratio_in=0.0)

    def convolve(self, in_channels: int, out_channels: int, middle: int | None = None) -> nn.Module:
        """Two convolutions on the same grid."""
        return self._twice(in_channels, middle or out_channels, out_channels, ratio_in=self.ratio)

    def join(self, skip: Tensor, upper: Tensor) -> Tensor:
        """Concatenate two maps, local channels first."""
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
    """A U-Net of fast Fourier convolutions; the last channels of each map are global.

    Args:
        num_classes: Channels of the output.
        width: Channels of the finest level; doubled with each level.
        depth: Number of halvings of the grid.
        up: Up-sampling by transposed convolutions, which mix local and global channels, or bilinear
            interpolation.
        ratio: Fraction of global channels; 0 gives a plain U-Net.
        local_unit: Whether spectral transforms also have a unit for the quarters of the map.
        prior_probability: Initial probability of each class at each pixel.

    Raises:
        UserError: An option out of range.
    """
    check_options("unet_ffc", width=width, depth=depth, up=up, prior_probability=prior_probability)
    if not 0 <= ratio < 1 or not (width * ratio).is_integer():
        raise UserError(
            "unet_ffc: ratio must be in [0, 1) and ratio times width whole, got "
            f"{ratio} and {width}"
        )
    return UNet(
        num_classes, width=width, depth=depth, transposed=up == "transposed",
        prior=prior_probability, kit=FourierKit(ratio, local_unit=local_unit),
    )  # fmt: skip
