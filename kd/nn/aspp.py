"""Places seen at several distances at once, and the whole picture beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
