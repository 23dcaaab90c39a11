"""A picture as tokens: small patches that know no others, or a trunk's map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError


class Patches(nn.Module):
    """Tokens of squares of a picture, each blind to all but its near neighbours.

    No token sees further than `reach` patches, so that one pass over the whole picture serves
    every hidden region: whoever may not see a region passes over the tokens that its pixels have
    got into, `touched`. Norms are by place (over channels), since any other would carry a trace of
    the whole picture everywhere.

    Args:
        width: Length of a token.
        patch: Side of a square, pixels.
        reach: How many 3x3 convolutions over the squares, each a square further.
    """

    def __init__(self, width: int, *, patch: int, reach: int) -> None:
        super().__init__()
        self.patch, self.reach = patch, reach
        self.stem = nn.Conv2d(3, width, patch, stride=patch)
        self.start = nn.Sequential(_PlaceNorm(width), nn.GELU(), nn.Conv2d(width, width, 1))
        self.near = nn.ModuleList(
            nn.Sequential(
                _PlaceNorm(width),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GELU(),
                nn.Conv2d(width, width, 1),
            )
            for _ in range(reach)
        )
        self.end = _PlaceNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) to maps (N, D, ceil(H / patch), ceil(W / patch))."""
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        maps = self.start(self.stem(padded))
        for step in self.near:
            maps = maps + step(maps)
        ended: Tensor = self.end(maps)
        return ended

    def touched(self, regions: Tensor) -> Tensor:
        """(K, h, w) bool: the tokens that any pixel of the regions (K, H, W) has got into."""
        height, width = regions.shape[1:]
        padded = F.pad(regions.float(), (0, -width % self.patch, 0, -height % self.patch))
        hit = F.max_pool2d(padded[:, None], self.patch)
        if self.reach:
            hit = F.max_pool2d(hit, 2 * self.reach + 1, stride=1, padding=self.reach)
        return hit[:, 0] > 0


class _PlaceNorm(nn.Module):
    """Layer norm over the channels of each place of a map (N, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, maps: Tensor) -> Tensor:
        normed: Tensor = self.norm(maps.movedim(1, -1)).movedim(-1, 1)
        return normed


def place_boxes(grid: tuple[int, int], frame: tuple[float, float], like: Tensor) -> Tensor:
    """(h * w, 4) boxes of a map's places, in units of the frame's long side.

    Args:
        grid: h and w.
        frame: Height and width that the grid covers, in those units.
        like: Of the wanted type and device.
    """
    rows = torch.arange(grid[0], device=like.device, dtype=like.dtype) * (frame[0] / grid[0])
    columns = torch.arange(grid[1], device=like.device, dtype=like.dtype) * (frame[1] / grid[1])
    top, left = torch.meshgrid(rows, columns, indexing="ij")
    boxes = [left, top, left + frame[1] / grid[1], top + frame[0] / grid[0]]
    return torch.stack(boxes, dim=-1).flatten(0, 1)


def check_patches(patch: int, reach: int) -> None:
    """Refuse sizes that are none.

    Raises:
        UserError: One of them is.
    """
    if patch < 1 or reach < 0:
        raise UserError(
            f"scene_transformer: patch {patch} must be 1 or more, reach {reach} 0 or more"
        )
