"""What each channel of a score or feature map looks at."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses._checks import comparable, mask_fits, positive, wide_type
from kd.losses.logits import kl_logits


def channel_wise(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, valid: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of where each channel is active: a softmax over its places.

    Shu et al., 2021, https://arxiv.org/abs/2011.13256: `T^2 / (N * C)` times the sum over images
    and channels. A constant added to a channel changes nothing. The paper does not say what to do
    with places that have no class; here the softmax is over an image's valid places alone.

    Args:
        student: Logits or features, (N, C, H, W).
        teacher: The same, (N, C, H, W).
        temperature: Divides both; above 1 widens what a channel looks at.
        valid: Places that take part, bool (N, H, W); all of them where not given.

    Returns:
        Scalar, the mean over C and over the N images, or over those with a valid place; 0 with a
        zero gradient where there are none.

    Raises:
        UserError: Shapes or devices that differ, integers, a mask that is not bool, or a
            temperature that is not above 0.
    """
    comparable("channel_wise", student, teacher, dimensions=4)
    positive("channel_wise", "temperature", temperature)
    if valid is None:
        rows = (maps.flatten(2).flatten(0, 1) for maps in (student, teacher))  # (N * C, H * W)
        return kl_logits(*rows, temperature=temperature)
    mask_fits("channel_wise", "valid", valid, student, beside="student")
    places = valid.flatten(1)[:, None]  # (N, 1, H * W)
    wide = wide_type(student, teacher)
    log_p, log_q = (log_shares(maps, places, temperature, wide) for maps in (student, teacher))
    total = (log_q.exp() * (log_q - log_p)).sum()
    count = places.any(dim=2).sum() * student.shape[1]
    return total / count.clamp(min=1) * temperature**2


def log_shares(maps: Tensor, places: Tensor, temperature: float, wide: torch.dtype) -> Tensor:
    """Over the valid places: (N, C, H * W), with 0 on both sides at all others."""
    logits = maps.flatten(2).to(wide)
    # -inf is out of the softmax; but a softmax of nothing else has no value, nor a gradient.
    out = torch.where(places.any(dim=2, keepdim=True), -math.inf, 0.0).to(wide)
    logits = torch.where(places, logits, out) / temperature
    return F.log_softmax(logits, dim=2).masked_fill(~places, 0.0)
