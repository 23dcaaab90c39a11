"""Check the arguments of loss functions: shapes, dtypes, devices and options.

The checks do not read tensor values, because that would synchronise with the accelerator at every
step. NaN or infinite inputs make the loss non-finite, and training then stops.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd.errors import UserError


def check_pair(loss: str, student: Tensor, teacher: Tensor, *, dimensions: int) -> None:
    """Check that student and teacher have the same shape and device, and are floating point."""
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
    """Check that two tensors have the same shape and the given number of dimensions."""
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
    """Check that all tensors have a floating-point dtype."""
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
    """Check that a mask (N, H, W) is bool and matches maps (N, C, H, W) in shape and device.

    `like` is the maps' name in error messages. With `weights`, the mask may also be floating point.
    """
    expected = (maps.shape[0], *maps.shape[2:])
    if tuple(mask.shape) != expected:
        raise UserError(f"{loss}: {name} must be {expected}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool and not (weights and mask.is_floating_point()):
        kinds = "bool or floating point" if weights else "bool"
        raise UserError(f"{loss}: {name} must be {kinds}, got {dtype_name(mask.dtype)}")
    check_device(loss, **{like: maps, name: mask})


def check_labels(loss: str, labels: Tensor, rows: Tensor, *, like: str) -> None:
    """Check that labels are int64, one per row; `like` is the rows' name in error messages."""
    if labels.shape != rows.shape[:1]:
        raise UserError(f"{loss}: labels must be ({len(rows)},), got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise UserError(f"{loss}: labels must be int64, got {dtype_name(labels.dtype)}")
    check_device(loss, **{like: rows, "labels": labels})


def check_positive(loss: str, name: str, value: float) -> None:
    """Check that an option, such as a temperature, is above 0 and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{loss}: {name} must be above 0 and finite, got {value}")


def check_not_negative(loss: str, name: str, value: float) -> None:
    """Check that an option, such as a loss weight, is at least 0 and finite."""
    if not (value >= 0 and math.isfinite(value)):
        raise UserError(f"{loss}: {name} must be 0 or above and finite, got {value}")


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype for sums: float64 if any tensor is float64, else float32."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without the prefix "torch.", e.g. "float32"."""
    return str(dtype).removeprefix("torch.")
