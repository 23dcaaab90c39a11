"""Channel-wise distillation: the spatial distribution of each channel of a map."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses._checks import check_mask, check_pair, check_positive, wide_dtype
from kd.losses.logits import kl_logits


def channel_wise(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, valid: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of each channel's softmax over the cells of the map.

    Shu et al., 2021, https://arxiv.org/abs/2011.13256: `T^2 / (N * C)` times the sum over images
    and channels. A constant added to a channel changes nothing. The paper does not define the loss
    for void cells; here the softmax is over an image's valid cells only.

    Args:
        student: Logits or features, (N, C, H, W).
        teacher: The same, (N, C, H, W).
        temperature: Divides both; above 1 flattens the distributions.
        valid: Cells to include, bool (N, H, W); None = all.

    Returns:
        Scalar, the mean over C and over the images with a valid cell; 0 with a zero gradient if
        there are none.
    """
    check_pair("channel_wise", student, teacher, dimensions=4)
    check_positive("channel_wise", "temperature", temperature)
    if valid is None:
        rows = (maps.flatten(2).flatten(0, 1) for maps in (student, teacher))  # (N * C, H * W)
        return kl_logits(*rows, temperature=temperature)
    check_mask("channel_wise", "valid", valid, student, like="student")
    places = valid.flatten(1)[:, None]  # (N, 1, H * W)
    dtype = wide_dtype(student, teacher)
    log_p, log_q = (
        masked_log_softmax(maps, places, temperature, dtype) for maps in (student, teacher)
    )
    total = (log_q.exp() * (log_q - log_p)).sum()
    count = places.any(dim=2).sum() * student.shape[1]
    return total / count.clamp(min=1) * temperature**2


def masked_log_softmax(
    maps: Tensor, places: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """Log-softmax over the valid cells, (N, C, H * W); 0 in all others."""
    logits = maps.flatten(2).to(dtype)
    # -inf excludes a cell; but a softmax of nothing but -inf has neither value nor gradient.
    out = torch.where(places.any(dim=2, keepdim=True), -math.inf, 0.0).to(dtype)
    logits = torch.where(places, logits, out) / temperature
    return F.log_softmax(logits, dim=2).masked_fill(~places, 0.0)
