"""Supervised losses that torch does not provide."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import UserError
from kd.losses._checks import (
    check_device,
    check_floating,
    check_labels,
    check_mask,
    check_not_negative,
    check_shapes,
    dtype_name,
    wide_dtype,
)


def masked_bce(
    logits: Tensor,
    targets: Tensor,
    hidden: Tensor,
    *,
    valid: Tensor | None = None,
    hidden_weight: float = 5.0,
) -> Tensor:
    """Binary cross-entropy of pixels, averaged separately inside and outside a hidden region.

    The means of each of the K inputs are combined as `(w * inside + outside) / (w + 1)`. If the
    region or the rest has no pixels, the other mean is used alone. The loss is the mean over
    inputs, so that losses of micro-batches can be averaged. It is 0 with a zero gradient if K is 0.

    Args:
        logits: Class logits, (K, C, H, W).
        targets: Whether the class covers the pixel, bool (K, C, H, W); classes may overlap.
        hidden: The hidden region, bool (K, H, W).
        valid: False at padding, bool (K, H, W), where logits need not be finite; None = all True.
        hidden_weight: Weight w of the hidden region.
    """
    _check_presence("masked_bce", logits, targets, dimensions=4)
    _check_regions("masked_bce", logits, hidden, valid, hidden_weight)
    if valid is not None:
        logits = _ZeroGradient.apply(logits, ~valid[:, None])
    # Since -log sigmoid(x) = softplus(x) - x, targets need no conversion to float, which would take
    # most of the memory.
    dtype = wide_dtype(logits)
    present = logits.masked_fill(~targets, 0.0).sum(dim=1, dtype=dtype)
    entropy = (F.softplus(logits).sum(dim=1, dtype=dtype) - present) / logits.shape[1]  # (K, H, W)
    return _in_and_out(entropy, torch.ones_like(entropy), hidden, valid, hidden_weight)


def _in_and_out(
    values: Tensor, weights: Tensor, hidden: Tensor, valid: Tensor | None, hidden_weight: float
) -> Tensor:
    """Combine weighted means of values (K, H, W) inside and outside a region; average over K."""
    inside, outside = hidden, ~hidden
    if valid is not None:
        inside, outside = inside & valid, outside & valid
    means, masses = [], []
    for region, weight in ((inside, hidden_weight), (outside, 1.0)):
        own = weights.masked_fill(~region, 0.0)
        mass = own.sum(dim=(1, 2))
        total = (values.masked_fill(~region, 0.0) * own).sum(dim=(1, 2))
        means.append(total / mass.where(mass > 0, torch.ones_like(mass)))
        masses.append((mass > 0).to(values.dtype) * weight)
    whole = masses[0] + masses[1]
    per_input = (masses[0] * means[0] + masses[1] * means[1]) / whole.where(
        whole > 0, torch.ones_like(whole)
    )
    return per_input.sum() / max(len(per_input), 1)


def masked_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    hidden: Tensor,
    *,
    valid: Tensor | None = None,
    class_weights: Tensor | None = None,
    hidden_weight: float = 5.0,
) -> Tensor:
    """Cross-entropy of one class per pixel, averaged separately inside and outside a hidden region.

    The two means are combined as in `masked_bce`. With class weights each mean is divided by the
    sum of its pixels' weights, as in torch's cross-entropy. The loss is the mean over K; 0 if K is
    0.

    Args:
        logits: Class logits, (K, C, H, W).
        targets: Class of each pixel, int64 (K, H, W).
        hidden: The hidden region, bool (K, H, W).
        valid: False at padding, bool (K, H, W); None = all True.
        class_weights: Weight of each class, above 0, (C,); None = 1.
        hidden_weight: Weight of the hidden region; the weight of the rest is 1.
    """
    name = "masked_cross_entropy"
    _check_regions(name, logits, hidden, valid, hidden_weight)
    if targets.shape != hidden.shape or targets.dtype != torch.int64:
        raise UserError(
            f"{name}: targets must be int64 {tuple(hidden.shape)}, got "
            f"{dtype_name(targets.dtype)} {tuple(targets.shape)}"
        )
    if class_weights is not None and class_weights.shape != logits.shape[1:2]:
        count = len(class_weights)
        raise UserError(f"{name}: expected {logits.shape[1]} class_weights, got {count}")
    if valid is not None:
        logits = _ZeroGradient.apply(logits, ~valid[:, None])
        logits = logits.masked_fill(~valid[:, None], 0.0)
    dtype = logits.to(wide_dtype(logits))
    entropy = F.cross_entropy(dtype, targets, reduction="none")  # (K, H, W)
    weights = torch.ones_like(entropy)
    if class_weights is not None:
        weights = class_weights.to(entropy)[targets]
    return _in_and_out(entropy, weights, hidden, valid, hidden_weight)


def multilabel_bce(
    logits: Tensor,
    targets: Tensor,
    *,
    known: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of which classes are present in an image, from logits.

    The loss is the mean over classes and images; it is 0 with a zero gradient without images.

    Args:
        logits: Class logits, (N, C).
        targets: Which classes are present, bool (N, C).
        known: Images with labels, bool (N,); others are excluded. None = all.
        pos_weight: Weight of a class's presence, (C,); the weight of its absence is 1.
    """
    name = "multilabel_bce"
    _check_presence(name, logits, targets, dimensions=2)
    if pos_weight is not None and pos_weight.shape != logits.shape[1:]:
        raise UserError(
            f"{name}: expected {logits.shape[1]} values of pos_weight, got {len(pos_weight)}"
        )
    if known is None:
        known = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    elif known.shape != logits.shape[:1] or known.dtype != torch.bool:
        raise UserError(f"{name}: known must be bool ({len(logits)},), got {tuple(known.shape)}")
    dtype = logits.to(wide_dtype(logits)).masked_fill(~known[:, None], 0.0)
    weight = None if pos_weight is None else pos_weight.to(dtype)
    entropy = F.binary_cross_entropy_with_logits(
        dtype, targets.to(dtype), pos_weight=weight, reduction="none"
    )
    total = entropy.masked_fill(~known[:, None], 0.0).sum()
    return total / (known.sum() * logits.shape[1]).clamp(min=1)


def _check_regions(
    name: str, logits: Tensor, hidden: Tensor, valid: Tensor | None, hidden_weight: float
) -> None:
    check_floating(name, logits=logits)
    check_mask(name, "hidden", hidden, logits, like="logits")
    check_not_negative(name, "hidden_weight", hidden_weight)
    if valid is not None:
        check_mask(name, "valid", valid, logits, like="logits")


def _check_presence(name: str, logits: Tensor, targets: Tensor, *, dimensions: int) -> None:
    check_shapes(name, logits, targets, dimensions=dimensions, names=("logits", "targets"))
    check_floating(name, logits=logits)
    check_device(name, logits=logits, targets=targets)
    if targets.dtype != torch.bool:
        raise UserError(f"{name}: targets must be bool, got {dtype_name(targets.dtype)}")


class _ZeroGradient(torch.autograd.Function):
    """Identity whose gradient is 0 at excluded pixels, even if the upstream gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, excluded: Tensor) -> Tensor:
        ctx.save_for_backward(excluded)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (excluded,) = ctx.saved_tensors
        return upstream.masked_fill(excluded, 0.0), None


def cross_entropy_labelled(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy averaged over the labelled objects; 0 with a zero gradient if there are none.

    Args:
        logits: Logits or log-probabilities, (M, C).
        labels: Class of each object, int64 (M,); -1 if unlabelled.
        label_smoothing: Fraction of the target probability that is spread evenly over all classes.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise UserError(
            "cross_entropy_labelled: expected logits (M, C) and labels (M,), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    check_floating("cross_entropy_labelled", logits=logits)
    check_labels("cross_entropy_labelled", labels, logits, like="logits")
    if not 0 <= label_smoothing <= 1:
        raise UserError(
            f"cross_entropy_labelled: label_smoothing must be in 0..1, got {label_smoothing}"
        )
    total = F.cross_entropy(
        # Unlabelled rows must have no gradient even where they are not finite.
        logits.to(wide_dtype(logits)).masked_fill((labels < 0)[:, None], 0.0),
        labels,
        ignore_index=-1,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total / (labels >= 0).sum().clamp(min=1)
