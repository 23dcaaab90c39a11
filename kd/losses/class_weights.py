"""Compute class weights from class frequencies; rare classes get larger weights."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from kd.errors import UserError

CAP = 10.0


def median_frequency(
    frequencies: Sequence[float], *, power: float = 1.0, cap: float = CAP
) -> list[float]:
    """Weight each class c by `clamp((median(f) / f_c) ** power, 1 / cap, cap)`.

    Median frequency balancing of Eigen and Fergus, 2015, https://arxiv.org/abs/1411.4734, with
    `power` and `cap` added. A class with frequency 0 gets the weight `cap` and is excluded from the
    median.

    Args:
        frequencies: Fraction of the training pixels (or objects) that have each class.
        power: 0..1; 0 makes all weights 1, and 1 makes them inversely proportional to frequencies.
        cap: The largest weight; the smallest is 1 / cap.
    """
    _check("median_frequency", frequencies, power, cap)
    middle = statistics.median(frequency for frequency in frequencies if frequency > 0)
    return [_clamped_ratio(middle, frequency, power, cap) for frequency in frequencies]


def positive_weights(
    frequencies: Sequence[float], *, power: float = 1.0, cap: float = CAP
) -> list[float]:
    """Weight the presence of each class c by `clamp(((1 - f_c) / f_c) ** power, 1 / cap, cap)`.

    The absence of a class has the weight 1. With a power of 1, presence and absence have the same
    total weight over all training images.

    Args:
        frequencies: Fraction of the training images that contain each class.
        power: 0..1; 0 makes all weights 1.
        cap: The largest weight; the smallest is 1 / cap.
    """
    _check("positive_weights", frequencies, power, cap)
    if max(frequencies) > 1:
        raise UserError(f"positive_weights: frequencies must be in 0..1, got {max(frequencies)}")
    return [_clamped_ratio(1 - frequency, frequency, power, cap) for frequency in frequencies]


def _clamped_ratio(numerator: float, denominator: float, power: float, cap: float) -> float:
    ratio = (numerator / denominator) ** power if denominator > 0 else (cap if power else 1.0)
    return min(max(ratio, 1 / cap), cap)


def _check(name: str, frequencies: Sequence[float], power: float, cap: float) -> None:
    if not frequencies or min(frequencies) < 0 or max(frequencies) <= 0:
        raise UserError(f"{name}: frequencies must be at least 0, and one above 0")
    if not 0 <= power <= 1:
        raise UserError(f"{name}: power must be in 0..1, got {power}")
    if cap < 1:
        raise UserError(f"{name}: cap must be at least 1, got {cap}")
