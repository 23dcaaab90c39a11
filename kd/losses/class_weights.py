"""Weights of classes from how often they occur; rare ones count more, within limits."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from kd.errors import UserError

CAP = 10.0


def median_frequency(
    shares: Sequence[float], *, power: float = 1.0, cap: float = CAP
) -> list[float]:
    """`clamp((median(s) / s_c) ** power, 1 / cap, cap)` for each class c.

    Eigen and Fergus, 2015, https://arxiv.org/abs/1411.4734; power and cap are ours: a half is
    gentler, 0 gives all classes 1. A class that never occurs gets the cap and takes no part in the
    median.

    Args:
        shares: Of the train pixels (or objects), one for each class.
        power: 0 to 1.
        cap: The largest weight; its inverse is the smallest.

    Raises:
        UserError: A share below 0, none above it, or an option out of range.
    """
    _check("median_frequency", shares, power, cap)
    middle = statistics.median(share for share in shares if share > 0)
    return [_between(middle, share, power, cap) for share in shares]


def positive_weights(
    shares: Sequence[float], *, power: float = 1.0, cap: float = CAP
) -> list[float]:
    """`clamp(((1 - r_c) / r_c) ** power, 1 / cap, cap)`: how much a class's presence weighs.

    At power 1 a class's presence and its absence weigh the same in sum.

    Args:
        shares: Of the train pictures that show the class, 0 to 1 each.
        power: 0 to 1; 0 gives 1.
        cap: The largest weight; its inverse is the smallest.

    Raises:
        UserError: A share out of 0..1, or an option out of range.
    """
    _check("positive_weights", shares, power, cap)
    if max(shares) > 1:
        raise UserError(f"positive_weights: shares must be in 0..1, got {max(shares)}")
    return [_between(1 - share, share, power, cap) for share in shares]


def _between(above: float, below: float, power: float, cap: float) -> float:
    ratio = (above / below) ** power if below > 0 else (cap if power else 1.0)
    return min(max(ratio, 1 / cap), cap)


def _check(name: str, shares: Sequence[float], power: float, cap: float) -> None:
    if not shares or min(shares) < 0 or max(shares) <= 0:
        raise UserError(f"{name}: shares must be 0 or above, and one above 0")
    if not 0 <= power <= 1:
        raise UserError(f"{name}: power must be in 0..1, got {power}")
    if cap < 1:
        raise UserError(f"{name}: cap must be at least 1, got {cap}")
