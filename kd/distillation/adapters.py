"""Adapters: modules that map a student's features to the shape of a teacher's features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError

# Up to this fraction of needed cells, the 3x3 convolution is computed at the needed cells only.
# On a CPU this is 10 times as fast at 5% of the cells and 4 times as fast at 20%.
FEW = 0.25


def conv1x1(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Module:
    """Build a 1x1 convolution, which maps (N, in, H, W) to (N, out, H, W)."""
    return nn.Conv2d(in_channels, out_channels, 1, bias=bias)


class Conv3x3(nn.Module):
    """3x3 convolution with ReLU for feature imitation, computed only where needed.

    Wang et al., 2019, https://arxiv.org/abs/1906.03609.

    Args:
        in_channels: Channels of the student's features.
        out_channels: Channels of the teacher's features.
        relu: Set to False if the teacher's features can be negative.
        init_std: Standard deviation of the initial weights; a small one keeps the student's first
            gradients small.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, relu: bool = True, init_std: float = 0.01
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.activation = nn.ReLU() if relu else nn.Identity()
        nn.init.normal_(self.convolution.weight, std=init_std)
        nn.init.zeros_(self.convolution.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, where: Tensor | None = None) -> Tensor:
        """Map student features (N, in, H, W) to (N, out, H, W).

        `where` (N, H, W) marks the grid cells whose output is needed (True or above 0); None: all.
        If few cells are needed, the other cells are 0.
        """
        images, channels, height, width = features.shape
        if where is not None and where.shape != (images, height, width):
            raise UserError(
                f"adapter 'conv3x3': mask {tuple(where.shape)} does not fit features "
                f"{tuple(features.shape)}"
            )
        places = None if where is None else where.flatten().nonzero().flatten()
        if places is None or len(places) > FEW * features[:, 0].numel():
            adapted: Tensor = self.activation(self.convolution(features))
            return adapted
        rows = F.pad(features, (1, 1, 1, 1)).permute(0, 2, 3, 1).reshape(-1, channels)
        # The upper left corner of each cell's neighbourhood, in the padded map.
        line, step = width + 2, torch.arange(3, device=places.device)
        image, place = places // (height * width), places % (height * width)
        corner = (image * (height + 2) + place // width) * line + place % width
        around = corner[:, None] + (step[:, None] * line + step).flatten()
        near = rows.index_select(0, around.flatten()).view(len(places), 9 * channels)
        weight = self.convolution.weight.permute(0, 2, 3, 1).flatten(1)
        chosen = self.activation(F.linear(near, weight, self.convolution.bias))
        whole: Tensor = chosen.new_zeros(images * height * width, chosen.shape[1])
        whole = whole.index_copy(0, places, chosen)
        return whole.view(images, height, width, chosen.shape[1]).permute(0, 3, 1, 2)


def linear(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Module:
    """Build a linear layer, which maps (M, in) to (M, out)."""
    return nn.Linear(in_channels, out_channels, bias=bias)


class Resize(nn.Module):
    """Resample features to a fixed grid, with a 1x1 convolution if the channels differ.

    Args:
        in_channels: Channels of the student's features.
        out_channels: Channels of the teacher's features.
        size: Height and width of the teacher's features.
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
        """Map (N, in, H, W) to (N, out, height, width); project on the smaller of the two grids."""
        shrinks = self.size[0] * self.size[1] < features.shape[2] * features.shape[3]
        if not shrinks:
            features = self.project(features)
        # Antialiasing is not implemented for bfloat16 on a CPU.
        resized = F.interpolate(
            features.float(), self.size, mode="bilinear", align_corners=False, antialias=shrinks
        ).to(features.dtype)
        return self.project(resized) if shrinks else resized
