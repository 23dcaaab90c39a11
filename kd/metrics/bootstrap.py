"""Confidence intervals over seeds (would another training repeat the gain?) and over images.

Whole images are resampled rather than objects, because objects of one image are correlated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from kd.errors import UserError

Array = NDArray[Any]
SAMPLES = 2000  # bootstrap resamples
_LEVEL = 0.95  # coverage of the intervals
_COUNTS_AT_ONCE = 4_000_000  # image counts in memory


class Interval(NamedTuple):
    """A mean with the lower and upper bounds of its interval; bounds are NaN if unknown."""

    mean: float
    low: float
    high: float

    @property
    def clear_of_zero(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def paired_interval(differences: Sequence[float] | NDArray[np.float64]) -> Interval:
    """Compute Student's 95 % t interval of the mean difference, given one difference per seed.

    Raises:
        UserError: Fewer than two seeds; use `paired_bootstrap` over images instead.
    """
    array = np.asarray(differences, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise UserError(f"an interval over seeds needs at least two seeds, got {array.size}")
    mean = float(array.mean())
    error = float(array.std(ddof=1)) / np.sqrt(len(array))
    reach = float(stats.t.ppf((1 + _LEVEL) / 2, df=len(array) - 1)) * error
    return Interval(mean, mean - reach, mean + reach)


def paired_bootstrap(
    a: Array, b: Array, groups: Array, *, classes: Array | None = None
) -> Interval:
    """Compute mean(b) - mean(a) with its 95 % percentile interval over resampled images.

    Whole images are resampled with replacement, the same for both runs (Efron and Tibshirani, 1993,
    chapter 13). The bounds are NaN if all objects belong to one image.

    Args:
        a: (K,) value of each object in the first run, such as correctness (0 or 1) or NLL.
        b: (K,) values of the same objects in the second run.
        groups: (K,) image of each object.
        classes: (K,) class labels, to average the means of the classes rather than all objects;
            classes missing from a resample are ignored.

    Raises:
        UserError: No objects, or arrays of different lengths.
    """
    lengths = {len(part) for part in (a, b, groups, a if classes is None else classes)}
    if len(lengths) > 1 or not len(a):
        raise UserError(
            f"a paired comparison needs the same objects twice, got {sorted(lengths)} objects"
        )
    support, (sums_a, sums_b) = _per_image(groups, classes, (a, b))

    def difference(counts: Array) -> NDArray[np.float64]:
        drawn = counts @ support  # (R, cells)
        gap = counts @ (sums_b - sums_a)
        with np.errstate(invalid="ignore"):  # 0 / 0 if the class is missing from the resample
            return np.asarray(np.nanmean(gap / drawn, axis=1), dtype=np.float64)

    return drawn_again(difference, len(support))


def drawn_again(
    number: Callable[[NDArray[np.float64]], NDArray[np.float64]], images: int
) -> Interval:
    """Compute a metric with its 95 % percentile interval over resampled images.

    `number` maps weights (R, images), how often each image was drawn, to the metric (R,); NaN
    values are ignored. With fewer than two `images` the bounds are NaN.
    """
    mean = float(number(np.ones((1, images)))[0])
    if images < 2:
        return Interval(mean, np.nan, np.nan)
    drawn = np.concatenate([number(counts) for counts in resamples(images)])
    return percentiles(mean, drawn)


def percentiles(
    mean: float, drawn: NDArray[np.floating[Any]], *, centred: bool = False
) -> Interval:
    """Combine an observed value with the 95 % percentile bounds of its resamples `drawn` (R,).

    NaN resamples are ignored. `centred` subtracts the resamples' bias from the bounds: resampled
    average precision is too large, because images repeat and rare classes are missing.
    """
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return Interval(mean, np.nan, np.nan)
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    bias = float(drawn.mean(dtype=np.float64)) - mean if centred else 0.0
    return Interval(mean, float(low) - bias, float(high) - bias)


def bootstrap(values: Array, groups: Array, *, classes: Array | None = None) -> Interval:
    """95 % percentile interval of one run's mean; same arguments as `paired_bootstrap`."""
    return paired_bootstrap(np.zeros(len(values)), values, groups, classes=classes)


def _per_image(
    groups: Array, classes: Array | None, runs: Sequence[Array]
) -> tuple[Array, list[Array]]:
    """Count the objects of each image and class, and sum each run's values over them."""
    images, group = np.unique(groups, return_inverse=True)
    columns, cell = np.unique(
        np.zeros(len(groups)) if classes is None else classes, return_inverse=True
    )
    flat, shape = group * len(columns) + cell, (len(images), len(columns))

    def total(values: Array) -> Array:
        return np.bincount(flat, weights=values, minlength=shape[0] * shape[1]).reshape(shape)

    return total(np.ones(len(groups))), [total(values) for values in runs]


def resamples(images: int) -> Iterator[NDArray[np.float64]]:
    """Yield how often each image is drawn, as float64 (R, images), until `SAMPLES` rows are made.

    Draws depend on the number of images only, so that resamples of two runs can be subtracted.
    """
    generator = np.random.default_rng(0)
    block = max(1, _COUNTS_AT_ONCE // images)
    for start in range(0, SAMPLES, block):
        rows = min(block, SAMPLES - start)
        drawn = generator.integers(0, images, size=(rows, images))
        drawn += np.arange(rows)[:, None] * images
        counts = np.bincount(drawn.ravel(), minlength=rows * images)
        yield counts.reshape(rows, images).astype(np.float64)
