"""Argument checks of the losses; error messages state the expected and the actual value.

The checks never read the values of tensors, which would synchronise with the accelerator in every
step. Values that are not finite make the loss not finite, which stops the training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd.errors import UserError


def check_pair(loss: str, student: Tensor, teacher: Tensor, *, dimensions: int) -> None:
    """Check that student and teacher agree in shape and device and are floating point."""
    check_shapes(loss, student, teacher, dimensions=dimensions)
    check_floating(loss, student=student, teacher=teacher)
    check_device(loss, student=student, teacher=teacher)


def check_shapes(
    loss: str,
    first: Tensor,
    second: Tensor,
    *,
    dimensions: int,
    names: tuple[str, str] = ("student", "teacher"),
) -> None:
    """Check that two tensors have the same shape, with the given number of dimensions."""
    if first.ndim != dimensions:
        raise UserError(
            f"{loss}: expected {dimensions} dimensions, got {names[0]} {tuple(first.shape)}"
        )
    if first.shape != second.shape:
        raise UserError(
            f"{loss}: {names[0]} {tuple(first.shape)} and {names[1]} {tuple(second.shape)} "
            "differ in shape"
        )


def check_floating(loss: str, **tensors: Tensor) -> None:
    """Check that tensors have a floating-point dtype."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(
                f"{loss}: {name} must be floating point, got {dtype_name(tensor.dtype)}"
            )


def check_device(loss: str, **tensors: Tensor) -> None:
    """Check that all tensors are on the same device."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise UserError(f"{loss}: expected one device, got {places}")


def check_mask(
    loss: str, name: str, mask: Tensor, maps: Tensor, *, like: str, weights: bool = False
) -> None:
    """Check that a mask (N, H, W) fits maps (N, C, H, W) in shape, dtype and device.

    `like` is the name of the maps in error messages. The mask must be bool; with `weights` it may
    also be floating point.
    """
    expected = (maps.shape[0], *maps.shape[2:])
    if tuple(mask.shape) != expected:
        raise UserError(f"{loss}: {name} must be {expected}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool and not (weights and mask.is_floating_point()):
        kinds = "bool or floating point" if weights else "bool"
        raise UserError(f"{loss}: {name} must be {kinds}, got {dtype_name(mask.dtype)}")
    check_device(loss, **{like: maps, name: mask})


def check_labels(loss: str, labels: Tensor, rows: Tensor, *, like: str) -> None:
    """Check that labels are int64, one for each of the rows; `like` is the name of the rows."""
    if labels.shape != rows.shape[:1]:
        raise UserError(f"{loss}: labels must be ({len(rows)},), got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise UserError(f"{loss}: labels must be int64, got {dtype_name(labels.dtype)}")
    check_device(loss, **{like: rows, "labels": labels})


def check_positive(loss: str, name: str, value: float) -> None:
    """Check that an option, such as a temperature, is finite and above 0."""
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{loss}: {name} must be above 0 and finite, got {value}")


def check_not_negative(loss: str, name: str, value: float) -> None:
    """Check that an option, such as a weight, is finite and not negative."""
    if not (value >= 0 and math.isfinite(value)):
        raise UserError(f"{loss}: {name} must be 0 or above and finite, got {value}")


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype for sums and logarithms: float64 if any tensor has it, else float32.

    Losses are small differences of large numbers, for which half precision is too coarse.
    """
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without the prefix "torch.", e.g. "float32"."""
    return str(dtype).removeprefix("torch.")
