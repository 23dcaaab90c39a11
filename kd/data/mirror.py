"""A batch as its pictures would be in a mirror."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def mirror(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mirror pictures left and right, each within its own size, with their boxes and masks.

    Args:
        batch: As in docs/design.md.

    Returns:
        The same batch with other `images` and, where there are some, `boxes` and `segments`.
    """
    images, widths = batch["images"], batch["sizes"][:, 1]
    columns = torch.arange(images.shape[-1], device=images.device)
    # (N, W): the padding beside the picture stays where it is.
    source = torch.where(columns < widths[:, None], widths[:, None] - 1 - columns, columns)
    seen = source[:, None, None].expand_as(images)
    mirrored = {**batch, "images": images.gather(3, seen)}
    if "boxes" not in batch:
        return mirrored
    edge = widths[batch["image_of"]].to(batch["boxes"].dtype)
    x1, y1, x2, y2 = batch["boxes"].unbind(dim=1)
    mirrored["boxes"] = torch.stack([edge - x2, y1, edge - x1, y2], dim=1)
    if "segments" in batch:
        rows = source[batch["image_of"][batch["hidden"]]]
        mirrored["segments"] = batch["segments"].gather(
            2, rows[:, None].expand_as(batch["segments"])
        )
    return mirrored
