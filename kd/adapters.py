"""From a student's features to the teacher's shape; they live inside the module that DDP wraps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError


def conv1x1(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Module:
    """A 1x1 convolution: (N, in, H, W) to (N, out, H, W)."""
    return nn.Conv2d(in_channels, out_channels, 1, bias=bias)


def conv3x3(
    in_channels: int, out_channels: int, *, relu: bool = True, init_std: float = 0.01
) -> nn.Module:
    """A 3x3 convolution and ReLU, as feature imitation uses it.

    Wang et al., 2019, https://arxiv.org/abs/1906.03609.

    Args:
        in_channels: The student's.
        out_channels: The teacher's.
        relu: Whether the teacher's features come out of a ReLU, so that the student's should too.
        init_std: Spread of the initial weights; near zero, so that early gradients into the student
            stay small until the adapter has learned something.
    """
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.normal_(convolution.weight, std=init_std)
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    return nn.Sequential(convolution, nn.ReLU()) if relu else convolution


def linear(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Module:
    """A linear layer on the last dimension: (M, in) to (M, out)."""
    return nn.Linear(in_channels, out_channels, bias=bias)


class Resize(nn.Module):
    """Bilinear resampling to a fixed grid, then 1x1 to the teacher's channels where they differ.

    The channels are changed on the smaller of the two grids.
    """

    def __init__(self, in_channels: int, out_channels: int, *, size: Sequence[int]) -> None:
        super().__init__()
        if len(size) != 2 or min(size) < 1:
            raise UserError(f"adapter 'resize': size must be (height, width), got {size!r}")
        self.size = int(size[0]), int(size[1])
        self.project = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, height, width)."""
        shrinks = self.size[0] * self.size[1] < features.shape[2] * features.shape[3]
        if not shrinks:
            features = self.project(features)
        features = F.interpolate(
            features, self.size, mode="bilinear", align_corners=False, antialias=shrinks
        )
        return self.project(features) if shrinks else features


def resize(in_channels: int, out_channels: int, *, size: Sequence[int]) -> nn.Module:
    """Bilinear to a grid of size (height, width), then 1x1 where the channels differ."""
    return Resize(in_channels, out_channels, size=size)


ADAPTERS: dict[str, Callable[..., nn.Module]] = {
    "conv1x1": conv1x1,
    "conv3x3": conv3x3,
    "linear": linear,
    "resize": resize,
}
