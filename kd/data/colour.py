"""Colour changes of a picture in one pass.

All of them (RGB shift, jitter, grey, shuffle) are affine in RGB; they are multiplied out to one
3x4 matrix, several times as fast as one pass each, and rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Matrix = npt.NDArray[np.float64]

_LUMA = np.array([0.2989, 0.587, 0.114])  # torchvision's weights
_TO_GREY = np.tile(_LUMA / _LUMA.sum(), (3, 1))
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


@dataclass(frozen=True, kw_only=True)
class ColourChange:
    """Colour changes in the order they are applied; the defaults change nothing."""

    rgb_shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    grey: bool = False
    order: tuple[int, int, int] = (0, 1, 2)

    def matrix(self, mean: Matrix) -> tuple[Matrix, Matrix]:
        """Multiply everything out.

        Args:
            mean: (3,) the image's mean RGB, which contrast is stretched about.

        Returns:
            Weights (3, 3) and offsets (3,) on the scale 0..255.
        """
        weight = np.eye(3) * self.brightness
        offset = np.array(self.rgb_shift) * self.brightness
        middle = (_TO_GREY @ (weight @ mean + offset))[0]
        weight, offset = weight * self.contrast, offset * self.contrast
        offset = offset + (1 - self.contrast) * middle
        mix = self.saturation * np.eye(3) + (1 - self.saturation) * _TO_GREY
        mix = _turn_hue(self.hue) @ mix
        if self.grey:
            mix = _TO_GREY @ mix
        mix = mix[list(self.order)]
        return mix @ weight, mix @ offset

    def __call__(self, image: Tensor) -> Tensor:
        """Apply to (3, H, W) uint8."""
        flat = image.reshape(3, -1).float()
        weight, offset = self.matrix(flat.mean(dim=1).double().numpy())
        weights = torch.from_numpy(weight).float()
        offsets = torch.from_numpy(offset).float()[:, None]
        changed = torch.addmm(offsets, weights, flat).round_().clamp_(0, 255)
        return changed.to(torch.uint8).view_as(image)


def _turn_hue(turn: float) -> Matrix:
    if not turn:
        return np.eye(3)
    cosine, sine = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    rotation = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    turned: Matrix = _FROM_YIQ @ rotation @ _TO_YIQ
    return turned
