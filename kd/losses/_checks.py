"""Checks that losses share: each names what was got and what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd.errors import UserError


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


def mask_shape(loss: str, name: str, mask: Tensor, expected: tuple[int, ...]) -> None:
    """A mask must have one value for each place."""
    if tuple(mask.shape) != expected:
        raise UserError(f"{loss}: {name} must be {expected}, got {tuple(mask.shape)}")


def positive(loss: str, name: str, value: float) -> None:
    """Temperatures and the like must be above 0 and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{loss}: {name} must be above 0 and finite, got {value}")


def not_negative(loss: str, name: str, value: float) -> None:
    """Weights inside a loss must be 0 or more, and finite."""
    if not (value >= 0 and math.isfinite(value)):
        raise UserError(f"{loss}: {name} must be 0 or more and finite, got {value}")


def wide_type(tensor: Tensor) -> torch.dtype:
    """The type that sums and logarithms are taken in: float32, or float64 where that came in.

    Losses are small differences of large numbers, which half precision cannot hold.
    """
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
