"""Fast Fourier convolution, in which some channels have a global receptive field in each layer.

Chi et al., 2020, https://proceedings.neurips.cc/paper/2020/hash/2fd5d41ec6cfab47e32164d5624269b1,
with the ratios and layer order of LaMa (Suvorov et al., 2021, https://arxiv.org/abs/2109.07161).
The first channels of a map are local (3x3 convolutions), the others global (convolutions of the
spectrum).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.trunk_base import wide


class FourierUnit(nn.Module):
    """A 1x1 convolution of a map's spectrum, with real and imaginary parts as channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.convolve = nn.Sequential(
            nn.Conv2d(2 * in_channels, 2 * out_channels, 1, bias=False),
            nn.BatchNorm2d(2 * out_channels),
            nn.ReLU(),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, in, H, W) of any size to (N, out, H, W) of the same dtype."""
        if not len(maps):  # because torch's FFT raises an error for an empty batch
            return maps.new_zeros(0, self.out_channels, *maps.shape[2:])
        # In float32, because FFTs in half precision are inexact, and not implemented on CPUs.
        exact = wide(maps)
        spectrum = torch.fft.rfft2(exact.contiguous(), norm="ortho")  # (N, in, H, W/2 + 1)
        mixed = self.convolve(torch.cat([spectrum.real, spectrum.imag], dim=1))
        real, imaginary = mixed.to(exact.dtype).chunk(2, dim=1)
        spectrum = torch.complex(real.contiguous(), imaginary.contiguous())
        size = (maps.shape[2], maps.shape[3])
        back: Tensor = torch.fft.irfft2(spectrum, s=size, norm="ortho")
        return back.to(maps.dtype)


class LocalFourierUnit(nn.Module):
    """A Fourier unit applied to the four spatial quarters of a map, stacked as channels.

    It uses only the first quarter of the channels. The output, of half the height and width, is
    tiled 2 x 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.taken = channels // 4
        self.unit = FourierUnit(4 * self.taken, channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, C, H, W) of any size to the same shape."""
        height, width = maps.shape[2:]
        part = F.pad(maps[:, : self.taken], (0, width % 2, 0, height % 2))
        upper, lower = part.chunk(2, dim=2)
        quarters = [piece for half in (upper, lower) for piece in half.chunk(2, dim=3)]
        tiled: Tensor = self.unit(torch.cat(quarters, dim=1)).repeat(1, 1, 2, 2)
        return tiled[:, :, :height, :width]


class SpectralTransform(nn.Module):
    """Transform the global channels of a map: `project(x + unit(x) + local_unit(x))`.

    `x` is the input after a 1x1 convolution to half the output channels (at least 4), batch norm
    and ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, *, local_unit: bool = True) -> None:
        super().__init__()
        inside = max(out_channels // 2, 4)
        self.reduce = nn.Sequential(
            # In place of the pooling in LaMa, so that the weights have the same names.
            nn.Identity(),
            nn.Conv2d(in_channels, inside, 1, bias=False),
            nn.BatchNorm2d(inside),
            nn.ReLU(),
        )
        self.unit = FourierUnit(inside, inside)
        self.local_unit = LocalFourierUnit(inside) if local_unit else None
        self.project = nn.Conv2d(inside, out_channels, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H, W)."""
        reduced = self.reduce(maps)
        total = reduced + self.unit(reduced)
        if self.local_unit is not None:
            total = total + self.local_unit(reduced)
        projected: Tensor = self.project(total)
        return projected


class FFC(nn.Module):
    """Fast Fourier convolution of a map whose last channels are global.

    The output is `local' = conv(local) + conv(global)` and `global' = conv(local) +
    spectral(global)`, with three separate 3x3 convolutions and a `SpectralTransform`. If both
    ratios are 0, the layer is an ordinary 3x3 convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        ratio_in: Fraction of the input channels that are global.
        ratio_out: Fraction of the output channels that are global.
        local_unit: Whether the spectral transform has a local Fourier unit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        ratio_in: float,
        ratio_out: float,
        local_unit: bool = True,
    ) -> None:
        super().__init__()
        for name, ratio in (("ratio_in", ratio_in), ("ratio_out", ratio_out)):
            if not 0 <= ratio <= 1:
                raise UserError(f"FFC: {name} must be in 0..1, got {ratio}")
        self.split_in = split_channels(in_channels, ratio_in)
        self.split_out = split_channels(out_channels, ratio_out)

        def convolution(source: int, target: int) -> nn.Module | None:
            if not source or not target:
                return None
            return nn.Conv2d(source, target, 3, padding=1, bias=False)

        (local_in, global_in), (local_out, global_out) = self.split_in, self.split_out
        self.local_to_local = convolution(local_in, local_out)
        self.local_to_global = convolution(local_in, global_out)
        self.global_to_local = convolution(global_in, local_out)
        self.global_to_global = None
        if global_in and global_out:
            self.global_to_global = SpectralTransform(global_in, global_out, local_unit=local_unit)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H, W), both with the local channels first."""
        own, whole = maps.split(self.split_in, dim=1)
        parts = [
            _sum(self.local_to_local, own, self.global_to_local, whole),
            _sum(self.local_to_global, own, self.global_to_global, whole),
        ]
        return torch.cat([part for part in parts if part is not None], dim=1)


class FFCBlock(nn.Sequential):
    """Fast Fourier convolution, batch norm and ReLU, with the options of `FFC`."""

    def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
        super().__init__(
            FFC(in_channels, out_channels, **options),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


def split_channels(channels: int, ratio: float) -> tuple[int, int]:
    """Return the number of local channels and the number of global channels."""
    count = round(channels * ratio)
    return channels - count, count


def join_maps(first: Tensor, second: Tensor, ratio: float) -> Tensor:
    """Concatenate maps (N, C1, H, W) and (N, C2, H, W), with the local channels of both first.

    `ratio` is the fraction of each map's channels that are global.
    """
    halves = [maps.split(split_channels(maps.shape[1], ratio), dim=1) for maps in (first, second)]
    return torch.cat([half[part] for part in (0, 1) for half in halves], dim=1)


def _sum(
    first: nn.Module | None, one: Tensor, second: nn.Module | None, other: Tensor
) -> Tensor | None:
    """Return `first(one) + second(other)`, where either module may be missing."""
    outputs = [path(maps) for path, maps in ((first, one), (second, other)) if path is not None]
    return sum(outputs[1:], outputs[0]) if outputs else None
