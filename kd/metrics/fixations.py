"""Fixations on pictures: the pixels they lie in, their density, their place on another picture."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from kd.errors import UserError

Size = tuple[int, int]  # height, width


def values_at(saliency: Tensor, fixations: Tensor, what: str = "fixation") -> Tensor:
    """(K,) values of a map (H, W) at the pixels of fixations (K, 2).

    Args:
        saliency: (H, W).
        fixations: (K, 2) x, y.
        what: They are called in messages.

    Raises:
        UserError: They are not (K, 2), or one lies outside of the frame.
    """
    if fixations.ndim != 2 or fixations.shape[1] != 2:
        raise UserError(f"{what}s are {tuple(fixations.shape)}, expected (K, 2): x, y")
    height, width = saliency.shape
    x, y = fixations.unbind(1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)  # false for NaN
    if not inside.all():
        wrong = int((~inside).nonzero()[0])
        raise UserError(
            f"{what} {wrong} at x {float(x[wrong]):g}, y {float(y[wrong]):g} lies outside of the "
            f"picture of {width} x {height}; leave such ones out"
        )
    return saliency[y.long(), x.long()]


def fixation_density(fixations: Tensor, size: Size, sigma: float | tuple[float, float]) -> Tensor:
    """Fixations, each smoothed by a Gaussian of which nothing falls outside of the frame.

    Args:
        fixations: (K, 2) x, y in pixels; a pixel is the floor of both.
        size: (height, width).
        sigma: In pixels; down and across, where two are given.

    Returns:
        (H, W) float64 of sum 1, zeros without fixations.

    Raises:
        UserError: A fixation lies outside of the frame, or a sigma is not above 0.
    """
    sigmas = np.broadcast_to(np.asarray(sigma, dtype=np.float64), 2)
    if not (sigmas > 0).all():
        raise UserError(f"sigma is {sigma}; fixations are smoothed by more than 0 pixels")
    places = torch.arange(size[0] * size[1]).view(size)
    pixels = values_at(places, fixations)
    counts = torch.bincount(pixels, minlength=places.numel()).view(size).double()
    smooth = gaussian_filter(counts.numpy(), sigmas, mode="reflect")
    return torch.from_numpy(smooth) / max(len(pixels), 1)


def moved(fixations: Tensor, size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Fixations of one picture at the same relative place of another.

    Args:
        fixations: (K, 2) x, y in pixels.
        size: (height, width) of their picture.
        to: (height, width) of the other.

    Returns:
        (K, 2) float64, inside the frame also where rounding would bring one to its very border.
    """
    scale = torch.tensor([to[1] / size[1], to[0] / size[0]], dtype=torch.float64)
    last = torch.tensor([to[1], to[0]], dtype=torch.float64)
    last = torch.nextafter(last, torch.zeros_like(last))
    return torch.minimum(fixations.double() * scale, last)
