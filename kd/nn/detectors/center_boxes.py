"""Boxes read off CenterNet's maps.

Zhou et al., 2019, https://arxiv.org/abs/1904.07850.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import UserError, at_least

STRIDE = 4  # pixels a cell of all maps


class Found(NamedTuple):
    """The best places of each picture, the best first; K rows each, whatever they are worth.

    Attributes:
        boxes: (N, K, 4), xyxy pixels.
        scores: (N, K), in 0..1; 0 where a picture has fewer peaks than K.
        labels: (N, K) int64, 0..C-1.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def detections(self, top: int) -> Tensor:
        """What all detectors give, (N, `top`, 6): boxes with an area, zeros for missing ones."""
        good = (self.scores > 0) & ((self.boxes[..., 2:] - self.boxes[..., :2]) > 0).all(dim=-1)
        rows = torch.cat([self.boxes, self.scores[..., None], self.labels[..., None]], dim=-1)
        rows = rows.float().masked_fill(~good[..., None], 0.0)
        order = rows[..., 4].argsort(dim=1, descending=True, stable=True)
        rows = rows.gather(1, order[..., None].expand_as(rows))[:, :top]
        return F.pad(rows, (0, 0, 0, top - rows.shape[1]))

    def by_image(self, least: float = 0.0) -> list[dict[str, Tensor]]:
        """`boxes` (k, 4), `scores` (k,), `labels` (k,) of each picture.

        Only boxes with an area, of a score above `least`.
        """
        sides = self.boxes[..., 2:] - self.boxes[..., :2]
        kept = (self.scores > least) & (sides > 0).all(dim=-1)
        return [
            {
                "boxes": self.boxes[image][rows],
                "scores": self.scores[image][rows],
                "labels": self.labels[image][rows],
            }
            for image, rows in enumerate(kept)
        ]


@torch.no_grad()
def decode_centers(
    output: Mapping[str, Tensor],
    *,
    stride: int = STRIDE,
    top: int = 100,
    sizes: Tensor | None = None,
) -> Found:
    """Read boxes off the maps: a cell is a peak if it equals the largest of the 3x3 around it.

    That takes the place of suppressing what overlaps. Every cell of a plateau is a peak, as
    published. Of equal scores the lower class, then the upper, then the left cell comes first;
    which ones are left out, where more are equal than fit, is not said. NaN is no peak, and neither
    are its neighbours.

    Args:
        output: `heatmap` (N, C, h, w), logits; `size` and `offset` (N, 2, h, w), in cells.
        stride: Pixels a cell.
        top: Most places that are read of a picture, K.
        sizes: Height and width of the pictures inside their padding, (N, 2); boxes are clipped to
            them.

    Raises:
        UserError: `top` is below 1, or shapes that do not fit.
    """
    heat = output["heatmap"]
    _check_maps(output, top)
    classes, height, width = heat.shape[1:]
    peaks = heat == F.max_pool2d(heat, 3, stride=1, padding=1)
    logits = heat.float().masked_fill(~peaks, -math.inf).flatten(1)
    best, place = logits.topk(min(top, classes * height * width), dim=1)  # (N, K) both
    place, order = place.sort(dim=1)
    best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    place = place.gather(1, order)
    cell = place % (height * width)
    # (N, K, 2) both, across first; float32, for half precision has no tenth of a pixel at 512.
    sides, within = (
        output[name].float().flatten(2).transpose(1, 2).gather(1, cell[..., None].expand(-1, -1, 2))
        for name in ("size", "offset")
    )
    middles = torch.stack([cell % width, cell // width], dim=-1) + within
    half = sides.clamp(min=0.0) / 2
    boxes = torch.cat([middles - half, middles + half], dim=-1) * stride
    if sizes is not None:
        limits = sizes.to(boxes)[:, None, [1, 0, 1, 0]]
        boxes = boxes.clamp(min=0.0).minimum(limits)
    return Found(boxes, best.sigmoid(), place // (height * width))


def _check_maps(output: Mapping[str, Tensor], top: int) -> None:
    at_least("decode_centers", top=(top, 1))
    heat = output["heatmap"]
    if heat.ndim != 4:
        raise UserError(f"decode_centers: heatmap must be (N, C, h, w), got {tuple(heat.shape)}")
    expected = (len(heat), 2, *heat.shape[2:])
    for name in ("size", "offset"):
        if tuple(output[name].shape) != expected:
            raise UserError(
                f"decode_centers: {name} must be {expected}, got {tuple(output[name].shape)}"
            )
