"""Checks that losses share: each names what was got and what was expected.

None looks at values, which lie on an accelerator as a rule: looking would make every step wait for
it. A number that is not finite makes the loss not finite instead, and training stops at that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd.errors import UserError


def comparable(loss: str, student: Tensor, teacher: Tensor, *, dimensions: int) -> None:
    """Student and teacher must agree in shape and place, and hold fractions."""
    same_shape(loss, student, teacher, dimensions=dimensions)
    floating(loss, student=student, teacher=teacher)
    one_device(loss, student=student, teacher=teacher)


def same_shape(
    loss: str,
    first: Tensor,
    second: Tensor,
    *,
    dimensions: int,
    names: tuple[str, str] = ("student", "teacher"),
) -> None:
    """Two tensors, a student's and a teacher's as a rule, must agree in shape."""
    if first.ndim != dimensions:
        raise UserError(
            f"{loss}: expected {dimensions} dimensions, got {names[0]} {tuple(first.shape)}"
        )
    if first.shape != second.shape:
        raise UserError(
            f"{loss}: {names[0]} {tuple(first.shape)} and {names[1]} {tuple(second.shape)} "
            "differ in shape"
        )


def floating(loss: str, **tensors: Tensor) -> None:
    """Features and logits must be floating point, of any width."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{loss}: {name} must be floating point, got {name_of(tensor.dtype)}")


def one_device(loss: str, **tensors: Tensor) -> None:
    """All that a loss takes must lie on one device."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise UserError(f"{loss}: expected one device, got {places}")


def mask_fits(
    loss: str, name: str, mask: Tensor, maps: Tensor, *, beside: str, weights: bool = False
) -> None:
    """A mask must have one bool, or one weight where those will do, for each place of the maps.

    Args:
        loss: Whose mask it is.
        name: What the loss calls it.
        mask: The mask.
        maps: What it is a mask of, (N, C, H, W).
        beside: What the loss calls the maps.
        weights: Whether floating-point weights will do as well.
    """
    expected = (maps.shape[0], *maps.shape[2:])
    if tuple(mask.shape) != expected:
        raise UserError(f"{loss}: {name} must be {expected}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool and not (weights and mask.is_floating_point()):
        kinds = "bool or floating point" if weights else "bool"
        raise UserError(f"{loss}: {name} must be {kinds}, got {name_of(mask.dtype)}")
    one_device(loss, **{beside: maps, name: mask})


def labels_fit(loss: str, labels: Tensor, rows: Tensor, *, beside: str) -> None:
    """Labels must be one int64 for each row; `beside` is what the loss calls the rows."""
    if labels.shape != rows.shape[:1]:
        raise UserError(f"{loss}: labels must be ({len(rows)},), got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise UserError(f"{loss}: labels must be int64, got {name_of(labels.dtype)}")
    one_device(loss, **{beside: rows, "labels": labels})


def positive(loss: str, name: str, value: float) -> None:
    """Temperatures and the like must be above 0 and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{loss}: {name} must be above 0 and finite, got {value}")


def not_negative(loss: str, name: str, value: float) -> None:
    """Weights within a loss must be 0 or above and finite."""
    if not (value >= 0 and math.isfinite(value)):
        raise UserError(f"{loss}: {name} must be 0 or above and finite, got {value}")


def wide_type(*tensors: Tensor) -> torch.dtype:
    """The type that sums and logarithms are taken in: float32, or float64 where any came in.

    Losses are small differences of large numbers, which half precision cannot hold.
    """
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """As people write it: "float32"."""
    return str(dtype).removeprefix("torch.")
