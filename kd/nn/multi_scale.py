"""Test-time augmentation of segmentation by scales and mirroring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.trunk_base import resized

MULTIPLE = 16  # sides of rescaled images are multiples of this


class MultiScale(nn.Module):
    """Average a network's class distributions over scales and mirrored images.

    Args:
        model: Maps images (N, 3, H, W) to logits (N, C, h, w), or a dict with `logits`.
        scales: Factors on the image's sides; rescaled sides are rounded to multiples of 16 pixels.
        mirror: Whether to evaluate each scale also on the image mirrored left to right.

    Raises:
        UserError: No scale, a scale that is not above 0, or one that is given twice.
    """

    def __init__(
        self, model: nn.Module, scales: Sequence[float] = (1.0,), *, mirror: bool = False
    ) -> None:
        super().__init__()
        if not scales or len(set(scales)) != len(scales):
            raise UserError(f"scales must be one or more different numbers, got {list(scales)}")
        if wrong := [scale for scale in scales if not 0 < scale < float("inf")]:
            raise UserError(f"scales must be above 0, got {wrong[0]}")
        self.model, self.mirror = model, mirror
        # The scale nearest to 1 comes first: it determines the grid of the output.
        self.scales = tuple(sorted(scales, key=lambda scale: abs(scale - 1)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to `logits` (N, C, h, w), the log of the mean, on scale 1's grid."""
        total: Tensor | None = None
        grid: tuple[int, int] | None = None
        for scale in self.scales:
            seen = resized(images, _sides(images, scale))
            logits = self._logits(seen)
            grid = grid or _grid(images, seen, logits)
            both = [logits]
            if self.mirror:
                both.append(self._logits(seen.flip(-1)).flip(-1))
            for one in both:
                probabilities = resized(one, grid).float().softmax(dim=1)
                total = probabilities if total is None else total + probabilities
        assert total is not None
        mean = total / (len(self.scales) * (1 + self.mirror))
        return {"logits": mean.clamp(min=torch.finfo(mean.dtype).tiny).log()}

    def _logits(self, images: Tensor) -> Tensor:
        output: Tensor | Mapping[str, Tensor] = self.model(images)
        return output if isinstance(output, Tensor) else output["logits"]


def _sides(images: Tensor, scale: float) -> tuple[int, int]:
    """Height and width at a scale; at scale 1 those of the images, unrounded."""
    height, width = images.shape[-2:]
    if scale == 1:
        return height, width
    sides = (max(MULTIPLE, round(scale * side / MULTIPLE) * MULTIPLE) for side in (height, width))
    return next(sides), next(sides)


def _grid(images: Tensor, seen: Tensor, logits: Tensor) -> tuple[int, int]:
    """Height and width of the logits at scale 1, from those for the rescaled images `seen`."""
    own, scaled, out = (part.shape[-2:] for part in (images, seen, logits))
    height, width = (max(1, round(own[side] * out[side] / scaled[side])) for side in (0, 1))
    return height, width
