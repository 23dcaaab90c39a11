"""What the labels themselves ask for, where the plain torch losses do not fit."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import UserError
from kd.losses._checks import (
    floating,
    labels_fit,
    mask_fits,
    name_of,
    not_negative,
    one_device,
    same_shape,
    wide_type,
)


def masked_bce(
    logits: Tensor,
    targets: Tensor,
    hidden: Tensor,
    *,
    valid: Tensor | None = None,
    hidden_weight: float = 5.0,
) -> Tensor:
    """Binary cross-entropy of pixel logits, averaged apart inside and outside the hidden region.

    `(w * inside + outside) / (w + 1)` for each input, then the mean over inputs, so that parts of a
    batch add up to it. A region without pixels takes no part, nor does its weight.

    Args:
        logits: One per class and pixel, (K, C, H, W).
        targets: Whether the class covers the pixel, bool (K, C, H, W); classes may overlap.
        hidden: The hidden region, bool (K, H, W).
        valid: Pixels of the picture rather than of its padding, bool (K, H, W). What the logits are
            elsewhere does not matter, were they not even finite.
        hidden_weight: The weight w of the hidden region.

    Returns:
        Scalar, the mean over K; 0 with a zero gradient where K is 0.

    Raises:
        UserError: Shapes or devices that differ, targets or masks that are not bool, or a weight
            that is negative or not finite.
    """
    _check_bce(logits, targets, hidden, valid, hidden_weight)
    if valid is not None:
        logits = _Seen.apply(logits, ~valid[:, None])
    # -log sigmoid(x) = softplus(x) - x; targets stay bool: as floats they would be the largest.
    wide = wide_type(logits)
    present = logits.masked_fill(~targets, 0.0).sum(dim=1, dtype=wide)
    entropy = (F.softplus(logits).sum(dim=1, dtype=wide) - present) / logits.shape[1]  # (K, H, W)
    return _in_and_out(entropy, torch.ones_like(entropy), hidden, valid, hidden_weight)


def _in_and_out(
    values: Tensor, weights: Tensor, hidden: Tensor, valid: Tensor | None, hidden_weight: float
) -> Tensor:
    """Weighted means of values (K, H, W) apart in and out of a region, put together, over K."""
    inside, outside = hidden, ~hidden
    if valid is not None:
        inside, outside = inside & valid, outside & valid
    means, shares = [], []
    for region, share in ((inside, hidden_weight), (outside, 1.0)):
        own = weights.masked_fill(~region, 0.0)
        mass = own.sum(dim=(1, 2))
        total = (values.masked_fill(~region, 0.0) * own).sum(dim=(1, 2))
        means.append(total / mass.where(mass > 0, torch.ones_like(mass)))
        shares.append((mass > 0).to(values.dtype) * share)
    whole = shares[0] + shares[1]
    per_input = (shares[0] * means[0] + shares[1] * means[1]) / whole.where(
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
    """Cross-entropy of one class a pixel, averaged apart inside and outside the hidden region.

    Put together as `masked_bce` does it. With class weights each average is a weighted one, the
    weights of its pixels in the denominator, as torch's own cross-entropy has it.

    Args:
        logits: One per class and pixel, (K, C, H, W).
        targets: The class of each pixel, int64 (K, H, W).
        hidden: The hidden region, bool (K, H, W).
        valid: Pixels of the picture rather than of its padding, bool (K, H, W).
        class_weights: Above 0, (C,).
        hidden_weight: The weight of the hidden region against 1 for the rest.

    Returns:
        Scalar, the mean over K; 0 where K is 0.

    Raises:
        UserError: Shapes, types or devices that do not fit, or a weight that is negative.
    """
    name = "masked_cross_entropy"
    floating(name, logits=logits)
    mask_fits(name, "hidden", hidden, logits, beside="logits")
    not_negative(name, "hidden_weight", hidden_weight)
    if targets.shape != hidden.shape or targets.dtype != torch.int64:
        raise UserError(
            f"{name}: targets must be int64 {tuple(hidden.shape)}, got "
            f"{name_of(targets.dtype)} {tuple(targets.shape)}"
        )
    if class_weights is not None and class_weights.shape != logits.shape[1:2]:
        count = len(class_weights)
        raise UserError(f"{name}: {logits.shape[1]} classes have {count} class_weights")
    if valid is not None:
        mask_fits(name, "valid", valid, logits, beside="logits")
        logits = _Seen.apply(logits, ~valid[:, None])
        logits = logits.masked_fill(~valid[:, None], 0.0)
    wide = logits.to(wide_type(logits))
    entropy = F.cross_entropy(wide, targets, reduction="none")  # (K, H, W)
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
    """Binary cross-entropy of which classes are there; the sigmoid is in here, once.

    Args:
        logits: One per class, (N, C).
        targets: Which classes are there, bool (N, C).
        known: Rows whose targets are known, bool (N,); None = all.
        pos_weight: Weight of a class where it is there against 1 where it is not, (C,).

    Returns:
        Scalar, the mean over known rows and classes; 0 with a zero gradient where none is known.

    Raises:
        UserError: Shapes, types or devices that do not fit.
    """
    name = "multilabel_bce"
    same_shape(name, logits, targets, dimensions=2, names=("logits", "targets"))
    floating(name, logits=logits)
    one_device(name, logits=logits, targets=targets)
    if targets.dtype != torch.bool:
        raise UserError(f"{name}: targets must be bool, got {name_of(targets.dtype)}")
    if pos_weight is not None and pos_weight.shape != logits.shape[1:]:
        raise UserError(f"{name}: {logits.shape[1]} classes have {len(pos_weight)} pos_weight")
    if known is None:
        known = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    elif known.shape != logits.shape[:1] or known.dtype != torch.bool:
        raise UserError(f"{name}: known must be bool ({len(logits)},), got {tuple(known.shape)}")
    wide = logits.to(wide_type(logits)).masked_fill(~known[:, None], 0.0)
    weight = None if pos_weight is None else pos_weight.to(wide)
    entropy = F.binary_cross_entropy_with_logits(
        wide, targets.to(wide), pos_weight=weight, reduction="none"
    )
    total = entropy.masked_fill(~known[:, None], 0.0).sum()
    return total / (known.sum() * logits.shape[1]).clamp(min=1)


def _check_bce(
    logits: Tensor, targets: Tensor, hidden: Tensor, valid: Tensor | None, hidden_weight: float
) -> None:
    same_shape("masked_bce", logits, targets, dimensions=4, names=("logits", "targets"))
    floating("masked_bce", logits=logits)
    if targets.dtype != torch.bool:
        raise UserError(f"masked_bce: targets must be bool, got {name_of(targets.dtype)}")
    one_device("masked_bce", logits=logits, targets=targets)
    mask_fits("masked_bce", "hidden", hidden, logits, beside="logits")
    not_negative("masked_bce", "hidden_weight", hidden_weight)
    if valid is not None:
        mask_fits("masked_bce", "valid", valid, logits, beside="logits")


class _Seen(torch.autograd.Function):
    """The logits; the gradient of those unseen is 0, not 0 times what is not finite."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, unseen: Tensor) -> Tensor:
        """The logits as they are."""
        ctx.save_for_backward(unseen)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """The gradient, filled."""
        (unseen,) = ctx.saved_tensors
        return upstream.masked_fill(unseen, 0.0), None


def cross_entropy_labelled(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy over the objects whose label is known.

    Args:
        logits: Logits or log-probabilities, (M, C).
        labels: Class of each object, int64 (M,); -1 where the label is withheld.
        label_smoothing: Share of the target spread over all classes.

    Returns:
        Scalar, the mean over the labelled; 0 with a zero gradient where there are none.

    Raises:
        UserError: Shapes or devices that do not fit, labels that are not int64, or a smoothing out
            of range.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise UserError(
            "cross_entropy_labelled: expected logits (M, C) and labels (M,), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    floating("cross_entropy_labelled", logits=logits)
    labels_fit("cross_entropy_labelled", labels, logits, beside="logits")
    if not 0 <= label_smoothing <= 1:
        raise UserError(
            f"cross_entropy_labelled: label_smoothing must be in 0..1, got {label_smoothing}"
        )
    total = F.cross_entropy(
        # What has no label must not have a gradient even where it is not finite.
        logits.to(wide_type(logits)).masked_fill((labels < 0)[:, None], 0.0),
        labels,
        ignore_index=-1,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total / (labels >= 0).sum().clamp(min=1)
