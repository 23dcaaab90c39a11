"""One metric of one arm against its twin: the numbers behind tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kd.errors import UserError
from kd.metrics.interval import Interval, paired_interval
from kd.metrics.kinds import kind_of
from kd.metrics.records import Records

# Everything that is not listed here is an accuracy, shown in percent. Of saliency not even areas
# under curves are: papers write them as 0.86.
_UNITS = {"nll": " (nats)", "ece": "", "area": "", "KLD": " (nats)", "IG": " (bits)",
          **dict.fromkeys(("CC", "SIM", "NSS", "AUC_Judd", "sAUC"), "")}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """One metric of one arm, and how far it is from the arm it is compared with."""

    metric: str
    arm: str
    values: tuple[float, ...]  # one a seed
    difference: Interval | None = None  # None: this is the arm that others are compared with
    by_seed: tuple[Interval, ...] = ()  # differences of each seed, over images

    @property
    def mean(self) -> float:
        """Over seeds."""
        return sum(self.values) / len(self.values)


def compare(
    name: str, arm: str, runs: Sequence[Records], twins: Sequence[Records] | None
) -> Comparison:
    """One metric of one arm; one seed alone is judged over images, not over seeds.

    Args:
        name: The metric.
        arm: What the runs are called.
        runs: Predictions, one a seed.
        twins: Those to compare with, None for the arm that others are compared with.

    Raises:
        UserError: The metric cannot be had.
    """
    values = tuple(value_of(name, run) for run in runs)
    if twins is None:
        return Comparison(name, arm, values)
    for twin in twins:
        value_of(name, twin)
    by_seed = tuple(
        kind_of(run).difference(run, twin, name) for twin, run in zip(twins, runs, strict=True)
    )
    if len(by_seed) == 1:
        return Comparison(name, arm, values, by_seed[0], by_seed)
    return Comparison(name, arm, values, paired_interval([i.mean for i in by_seed]), by_seed)


def value_of(name: str, records: Records) -> float:
    """A metric that must be there.

    Raises:
        UserError: There is no such metric, or nothing counts for it.
    """
    kind = kind_of(records)
    number = kind.value(records, name)
    if number is None:
        raise UserError(f"metric {name!r}: none of these {kind.things} counts for it")
    return number


def interval_of(name: str, records: Records) -> Interval | None:
    """A metric of one run with its 95 % interval over images; None where none can be had."""
    return kind_of(records).interval(records, name)


def label_of(name: str) -> str:
    """A metric with its unit."""
    return name + _UNITS.get(name, " (%)")


def scale_of(name: str) -> int:
    """What a metric is multiplied by to be shown: 100 for those in percent."""
    return 1 if name in _UNITS else 100


def number_cell(name: str, number: float | None) -> str:
    """A metric's number as tables show it, nothing where there is none."""
    if number is None:
        return ""
    return f"{number:.3f}" if scale_of(name) == 1 else f"{100 * number:.1f}"


def bounds_cell(name: str, interval: Interval | None) -> str:
    """[low, high] of a metric, nothing where nothing is known about them."""
    if interval is None or interval.low != interval.low:  # NaN
        return ""
    return f"[{number_cell(name, interval.low)}, {number_cell(name, interval.high)}]"


def difference_cell(name: str, interval: Interval) -> str:
    """A difference with its sign and bounds, and a star where it is clear of zero."""
    scale = scale_of(name)
    digits = 1 if scale == 100 else 3
    mean, low, high = (f"{scale * bound:+z.{digits}f}" for bound in interval)
    if interval.low != interval.low:  # NaN: nothing is known about the bounds
        return f"{mean} "
    return f"{mean} [{low}, {high}]{'*' if interval.clear_of_zero else ' '}"
