"""Suppression for whole batches without loops over images, which exported graphs need.

torchvision's code loops over the images of a batch, so that an exported graph would have a fixed
batch size. These functions give the same detections, up to the order of equal scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms


def suppress(
    boxes: Tensor, scores: Tensor, groups: Tensor, *, overlap: float, least: float, top: int
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression within the groups of each image.

    Args:
        boxes: (N, M, 4) xyxy pixels, 0 or above.
        scores: (N, M).
        groups: (N, M) int64, such as the class; boxes of different groups do not suppress each
            other.
        overlap: IoU above which the box with the lower score is removed.
        least: Boxes need a higher score.
        top: Number of boxes per image to return, K.

    Returns:
        Scores (N, K), best first, -1 where an image has fewer boxes; and indices into M, (N, K).
    """
    n, m = scores.shape
    images = torch.arange(n, device=boxes.device)[:, None].expand(n, m).flatten()
    flat, values = boxes.reshape(-1, 4), scores.flatten()
    some = (values > least).nonzero()[:, 0]
    # Boxes of different groups or images are moved apart: groups along x, images along y.
    step = flat.flatten().amax(dim=0) + 1
    apart = torch.stack([groups.flatten(), images], dim=1).to(flat.dtype)[some] * step
    kept = some[nms(flat[some] + apart.repeat(1, 2), values[some], overlap)]
    left = torch.full_like(values, -1.0).scatter(0, kept, values[kept])
    best = left.view(n, m).topk(min(top, m), dim=1)
    return best.values, best.indices


def decoded(coder: Any, deltas: Tensor, anchors: Tensor) -> Tensor:
    """Decode deltas (N, M, 4) of anchors (N, M, 4) by a box coder of torchvision."""
    n, m = deltas.shape[:2]
    flat = deltas.reshape(-1, 4), anchors.reshape(-1, 4)
    boxes = coder.decode_single(*flat) if hasattr(coder, "decode_single") else coder.decode(*flat)
    return torch.as_tensor(boxes).view(n, m, 4)


def clipped(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes (N, M, 4) to images of these heights and widths (N, 2)."""
    limits = sizes.to(boxes.dtype)[:, None, [1, 0, 1, 0]]
    return boxes.clamp(min=0.0).minimum(limits)


def as_detections(boxes: Tensor, scores: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
    """Gather the chosen boxes (N, K) to detections (N, K, 6); rows with a score below 0 become 0.

    Args:
        boxes: (N, M, 4).
        scores: Scores of the chosen boxes, (N, K).
        labels: (N, M) int64.
        chosen: Indices into M, (N, K).
    """
    corners = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
    classes = labels.gather(1, chosen).to(boxes.dtype)
    rows = torch.cat([corners, scores[..., None], classes[..., None]], dim=2)
    return rows * (scores >= 0).to(rows.dtype)[..., None]
