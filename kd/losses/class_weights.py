"""Class weights from class frequencies, clamped: rare classes weigh more."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from kd.errors import UserError

CAP = 10.0


def median_frequency(
    frequencies: Sequence[float], *, power: float = 1.0, cap: float = CAP
) -> list[float]:
    """`clamp((median(f) / f_c) ** power, 1 / cap, cap)` for each class c.

    Eigen and Fergus, 2015, https://arxiv.org/abs/1411.4734, to which power and cap are added: a
    power of 0.5 is gentler, with 0 all weights are 1. A class that never occurs gets the cap and is
    left out of the median.

    Args:
        frequencies: Fraction of the train pixels (or objects) of each class.
        power: 0 to 1.
        cap: The largest weight; 1 / cap is the smallest.
    """
    _check("median_frequency", frequencies, power, cap)
    middle = statistics.median(frequency for frequency in frequencies if frequency > 0)
    return [_clamped_ratio(middle, frequency, power, cap) for frequency in frequencies]


def positive_weights(
    frequencies: Sequence[float], *, power: float = 1.0, cap: float = CAP
) -> list[float]:
    """`clamp(((1 - f_c) / f_c) ** power, 1 / cap, cap)`: weight of a class's presence.

    At power 1 a class's presence and absence have the same total weight. The frequencies are the
    fractions of the train images that contain each class; other arguments as `median_frequency`.
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
