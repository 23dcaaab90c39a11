"""Saliency losses: KL divergences between distributions over the pixels of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses._checks import (
    check_device,
    check_floating,
    check_mask,
    check_pair,
    check_positive,
    check_shapes,
    wide_dtype,
)
from kd.losses.logits import channel_wise, masked_log_softmax

EPS = 1e-7  # of the published form


def saliency_kld(
    logits: Tensor, density: Tensor, valid: Tensor | None = None, *, published: bool = False
) -> Tensor:
    """KL(ground truth || prediction) of distributions over the pixels of an image.

    The prediction is the softmax of the logits over the valid pixels. The published form is that of
    MSI-Net (Kroner et al., 2020, https://arxiv.org/abs/1902.06634): for the ground truth y and a
    map m in 0..1, `q = y / (eps + sum y)`, `p = m / (eps + sum m)` and the loss is `sum q log(eps +
    q / (eps + p))` with eps 1e-7. Here m is the sigmoid of the logits, whose gradient vanishes
    where it saturates; MSI-Net scales maps to 0..1 by minimum and maximum.

    Args:
        logits: Prediction, (N, 1, H, W).
        density: Ground truth, (N, 1, H, W), not negative (not checked). It is normalised over the
            valid pixels.
        valid: Pixels to include, bool (N, H, W); None = all.
        published: Whether to use the published form.

    Returns:
        Scalar, the mean over the images with a density above 0 at a valid pixel; 0 with a zero
        gradient if there are no such images.
    """
    check_shapes("saliency_kld", logits, density, dimensions=4, names=("logits", "density"))
    _one_channel("saliency_kld", logits, "logits")
    check_floating("saliency_kld", logits=logits, density=density)
    check_device("saliency_kld", logits=logits, density=density)
    if valid is not None:
        check_mask("saliency_kld", "valid", valid, logits, like="logits")
    places = _places(logits, valid)
    dtype = wide_dtype(logits, density)
    truth = density.flatten(2).to(dtype).masked_fill(~places, 0.0)  # (N, 1, H * W)
    mass = truth.sum(dim=2, keepdim=True)
    empty = mass == 0  # not `~(mass > 0)`, which would hide NaN
    if published:
        divergence = _published(truth, _sigmoid(logits, places, dtype))
    else:
        q = truth / torch.where(empty, 1.0, mass)
        log_p = masked_log_softmax(logits, places, 1.0, dtype)
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
    """KL(teacher || student) of softened distributions over the pixels of an image.

    Both distributions are softmaxes over the valid pixels of logits divided by the temperature. The
    loss is multiplied by the squared temperature; it equals `channel_wise` of one-channel maps.

    The published form (see `saliency_kld`), for comparisons only, divides maps by the temperature
    and then by their sum, so that the temperature has **no effect**; there is no factor of its
    square. The student's map is then the sigmoid of its logits, while the teacher's map is the
    softmax of its logits: teachers are trained with a softmax, so their sigmoid has no meaning.

    Args:
        student: Logits, (N, 1, H, W).
        teacher: Logits, (N, 1, H, W).
        valid: Pixels to include, bool (N, H, W); None = all.
        temperature: Divides both sets of logits; above 1 softens the distributions.
        published: Whether to use the published form.

    Returns:
        Scalar, the mean over the images with a valid pixel; 0 with a zero gradient if none has one.
    """
    check_pair("saliency_maps", student, teacher, dimensions=4)
    _one_channel("saliency_maps", student, "student")
    check_positive("saliency_maps", "temperature", temperature)
    if valid is not None:
        check_mask("saliency_maps", "valid", valid, student, like="student")
    if not published:
        return channel_wise(student, teacher, temperature=temperature, valid=valid)
    places = _places(student, valid)
    dtype = wide_dtype(student, teacher)
    maps = _sigmoid(student, places, dtype) / temperature
    truth = _density(teacher, places, dtype) / temperature
    divergence = _published(truth, maps)
    non_empty = places.any(dim=2, keepdim=True)
    return torch.where(non_empty, divergence, 0.0).sum() / non_empty.sum().clamp(min=1)


def _places(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Mask of the pixels to include, bool (N, 1, H * W)."""
    if valid is None:
        return torch.ones_like(logits, dtype=torch.bool).flatten(2)
    return valid.flatten(1)[:, None]


def _sigmoid(logits: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Sigmoid of the logits, (N, 1, H * W), 0 at excluded pixels."""
    rows = logits.flatten(2).to(dtype).masked_fill(~places, 0.0)
    # The second term is NaN for infinite logits, so that training stops at them.
    return (rows.sigmoid() + 0.0 * rows).masked_fill(~places, 0.0)


def _density(logits: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Softmax of the logits over the included pixels, (N, 1, H * W), 0 at excluded pixels."""
    rows = logits.flatten(2).to(dtype).masked_fill(~places, 0.0)  # NaN below for infinite logits
    density = masked_log_softmax(logits, places, 1.0, dtype).exp()
    return density.masked_fill(~places, 0.0) + 0.0 * rows


def _published(truth: Tensor, maps: Tensor) -> Tensor:
    """Published divergence of maps (N, 1, P), each divided by its sum: (N, 1, 1)."""
    q, p = (one / (EPS + one.sum(dim=2, keepdim=True)) for one in (truth, maps))
    return (q * (EPS + q / (EPS + p)).log()).sum(dim=2, keepdim=True)


def _one_channel(loss: str, maps: Tensor, name: str) -> None:
    if maps.shape[1] != 1:
        raise UserError(f"{loss}: {name} must have one channel, got {tuple(maps.shape)}")
