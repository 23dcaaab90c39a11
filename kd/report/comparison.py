"""One metric of one arm against its twin: the numbers behind tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kd.errors import UserError
from kd.metrics import scores
from kd.metrics.interval import Interval, bootstrap, paired_bootstrap, paired_interval
from kd.metrics.records import Records

# Everything that is not listed here is an accuracy, shown in percent.
_UNITS = {"nll": " (nats)", "ece": "", "area": ""}


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
    by_seed = tuple(_over_images(name, twin, run) for twin, run in zip(twins, runs, strict=True))
    if len(by_seed) == 1:
        return Comparison(name, arm, values, by_seed[0], by_seed)
    return Comparison(name, arm, values, paired_interval([i.mean for i in by_seed]), by_seed)


def _over_images(name: str, twin: Records, run: Records) -> Interval:
    if name == "ece":  # No mean over objects: bounds would need the bins drawn again.
        return Interval(value_of(name, run) - value_of(name, twin), float("nan"), float("nan"))
    a, b = scores.measure(twin, name), scores.measure(run, name)
    assert a is not None and b is not None  # _value has seen both
    images = run["image_ids"][b.selected]
    return paired_bootstrap(a.values, b.values, images, classes=b.classes)


def value_of(name: str, records: Records) -> float:
    """A metric that must be there.

    Raises:
        UserError: There is no such metric, or no object counts for it.
    """
    number = scores.value(records, name)
    if number is None:
        raise UserError(f"metric {name!r}: none of these objects counts for it")
    return number


def interval_of(name: str, records: Records) -> Interval | None:
    """A metric of one run with its 95 % interval over images; None where none can be had.

    `ece` is no mean over objects: its bounds would need the bins drawn again.
    """
    found = None if name == "ece" else scores.measure(records, name)
    if found is None:
        return None
    images = records["image_ids"][found.selected]
    return bootstrap(found.values, images, classes=found.classes)


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
