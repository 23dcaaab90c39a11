"""Divergences between distributions over the places of a picture: where people look."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses._checks import (
    comparable,
    floating,
    mask_fits,
    one_device,
    positive,
    same_shape,
    wide_type,
)
from kd.losses.channel_wise import channel_wise, log_shares

EPS = 1e-7  # of the published form


def saliency_kld(
    logits: Tensor, density: Tensor, valid: Tensor | None = None, *, published: bool = False
) -> Tensor:
    """KL(truth || prediction) of distributions over a picture's places.

    The prediction is a softmax of the logits over the valid places. As published with MSI-Net
    (Kroner et al., 2020, https://arxiv.org/abs/1902.06634) a map in 0..1 is divided by its sum
    instead, `q = y / (eps + sum y)`, `p = m / (eps + sum m)`, loss `sum q log(eps + q / (eps + p))`
    with eps 1e-7; the map `m` is the sigmoid of the logits here. (MSI-Net's own was scaled to 0..1
    by its least and largest place.) A sigmoid that is 0 or 1 everywhere has no gradient left; a
    softmax always has one.

    Args:
        logits: Of the prediction, (N, 1, H, W).
        density: The truth, (N, 1, H, W); divided by its sum over the valid places here. That no
            place is below 0 is not checked.
        valid: Places that take part, bool (N, H, W); all of them where not given.
        published: Whether to take the published form.

    Returns:
        Scalar, the mean over the pictures with a density above 0 at a valid place; 0 with a zero
        gradient where there are none.

    Raises:
        UserError: Shapes or devices that differ, more than one channel, whole numbers, or a mask
            that is not bool.
    """
    same_shape("saliency_kld", logits, density, dimensions=4, names=("logits", "density"))
    _one_channel("saliency_kld", logits, "logits")
    floating("saliency_kld", logits=logits, density=density)
    one_device("saliency_kld", logits=logits, density=density)
    if valid is not None:
        mask_fits("saliency_kld", "valid", valid, logits, beside="logits")
    places = _places(logits, valid)
    wide = wide_type(logits, density)
    truth = density.flatten(2).to(wide).masked_fill(~places, 0.0)  # (N, 1, H * W)
    mass = truth.sum(dim=2, keepdim=True)
    empty = mass == 0  # and not "above 0 is not so", which would hide what is no number
    if published:
        divergence = _published(truth, _sigmoid(logits, places, wide))
    else:
        q = truth / torch.where(empty, 1.0, mass)
        log_p = log_shares(logits, places, 1.0, wide)
        divergence = (torch.xlogy(q, q) - q * log_p).sum(dim=2, keepdim=True)
    total = torch.where(empty, 0.0, divergence).sum()
    return total / (~empty).sum().clamp(min=1)


def saliency_maps(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None = None,
    *,
    temperature: float = 1.0,
    published: bool = False,
) -> Tensor:
    """KL(teacher || student) of softened distributions over a picture's places.

    Both are softmaxes over the valid places of logits divided by the temperature, and the square of
    it keeps the gradient's size: `channel_wise` of the one channel.

    The published form divides maps by the temperature, and then by their sum, which takes the
    temperature out again: it has **no effect** there. The student's map is the sigmoid of its
    logits, the teacher's its density (a sigmoid of a softmax's logits, which are known up to a
    constant, would be another map). The form is kept to compare with, and the temperature's square
    is left out of it too.

    Args:
        student: Logits, (N, 1, H, W).
        teacher: Logits, (N, 1, H, W).
        valid: Places that take part, bool (N, H, W); all of them where not given.
        temperature: Divides both; above 1 softens.
        published: Whether to take the published form, that of `saliency_kld`.

    Returns:
        Scalar, the mean over the N pictures, or over those with a valid place; 0 with a zero
        gradient where there are none.

    Raises:
        UserError: Shapes or devices that differ, more than one channel, whole numbers, a mask that
            is not bool, or a temperature that is not above 0.
    """
    comparable("saliency_maps", student, teacher, dimensions=4)
    _one_channel("saliency_maps", student, "student")
    positive("saliency_maps", "temperature", temperature)
    if valid is not None:
        mask_fits("saliency_maps", "valid", valid, student, beside="student")
    if not published:
        return channel_wise(student, teacher, temperature=temperature, valid=valid)
    places = _places(student, valid)
    wide = wide_type(student, teacher)
    maps = _sigmoid(student, places, wide) / temperature
    truth = _density(teacher, places, wide) / temperature
    divergence = _published(truth, maps)
    seen = places.any(dim=2, keepdim=True)
    return torch.where(seen, divergence, 0.0).sum() / seen.sum().clamp(min=1)


def _places(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Which places take part, (N, 1, H * W)."""
    if valid is None:
        return torch.ones_like(logits, dtype=torch.bool).flatten(2)
    return valid.flatten(1)[:, None]


def _sigmoid(logits: Tensor, places: Tensor, wide: torch.dtype) -> Tensor:
    """A map in 0..1, (N, 1, H * W), 0 at places that take no part."""
    rows = logits.flatten(2).to(wide).masked_fill(~places, 0.0)
    # A sigmoid makes 0 or 1 of an infinite logit; as elsewhere, such must not pass unseen.
    return (rows.sigmoid() + 0.0 * rows).masked_fill(~places, 0.0)


def _density(logits: Tensor, places: Tensor, wide: torch.dtype) -> Tensor:
    """A softmax over places, (N, 1, H * W), 0 at those that take no part."""
    rows = logits.flatten(2).to(wide).masked_fill(~places, 0.0)
    # A share makes 0 of a logit of minus infinity; as elsewhere, such must not pass unseen.
    return log_shares(logits, places, 1.0, wide).exp().masked_fill(~places, 0.0) + 0.0 * rows


def _published(truth: Tensor, maps: Tensor) -> Tensor:
    """Divergence of maps (N, 1, P), each divided by its sum: (N, 1, 1)."""
    q, p = (one / (EPS + one.sum(dim=2, keepdim=True)) for one in (truth, maps))
    return (q * (EPS + q / (EPS + p)).log()).sum(dim=2, keepdim=True)


def _one_channel(loss: str, maps: Tensor, name: str) -> None:
    if maps.shape[1] != 1:
        raise UserError(f"{loss}: {name} must have one channel, got {tuple(maps.shape)}")
