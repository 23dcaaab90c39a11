"""Metrics of saliency maps from the records of `predictions.npz`.

`image_ids` (N,) and every metric of `kd.metrics.saliency.METRICS` by name, (N,) each, NaN where it
is undefined. Four arrays (N,) identify the ground truth, so that runs with different ones are not
compared: `fixation_counts`; `other_counts`, fixations of shuffled AUC; `truth_entropy` of the
density, bits; `prior_bits`, the mean base-2 logarithm of the prior at fixations. Without ground
truth counts are 0 and the others NaN.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kd.errors import UserError
from kd.metrics.bootstrap import Interval, drawn_again
from kd.metrics.records import Array, Records
from kd.metrics.saliency import METRICS, SaliencyTruth, density_of, log2_at, measure

ROWS = tuple(METRICS)
COUNTS = ("fixation_counts", "other_counts")
TRUTH = (*COUNTS, "truth_entropy", "prior_bits")
REQUIRED = ("image_ids", *ROWS, *TRUTH)
# Smoothing differs in the last digits between machines; another sigma changes far more.
_TOLERANCE = 1e-3

Float = NDArray[np.float64]


def image(prediction: Tensor, truth: SaliencyTruth) -> dict[str, float]:
    """One image's values of all arrays but `image_ids`.

    Args:
        prediction: (H, W), not negative, of any scale.
        truth: Ground truth of the same size.

    Raises:
        UserError: As `kd.metrics.saliency.measure`.
    """
    return row_of(measure(prediction, truth), truth)


def row_of(numbers: dict[str, float], truth: SaliencyTruth) -> dict[str, float]:
    """Metrics of one image with the values that identify its ground truth."""
    prior = math.nan
    if truth.prior is not None and len(truth.fixations):
        prior = float(log2_at(truth.prior, truth.fixations).mean())
    true = density_of(truth.density)
    entropy = -float((true * true.clamp_min(1e-300).log2()).sum())
    return {
        **numbers,
        "fixation_counts": len(truth.fixations),
        "other_counts": 0 if truth.others is None else len(truth.others),
        "truth_entropy": entropy if truth.density.any() else math.nan,
        "prior_bits": prior,
    }


def records_of(rows: dict[int, dict[str, float]]) -> dict[str, Array]:
    """Records, in the order of image ids, of rows as `image` returns them."""
    numbers = sorted(rows)
    found: dict[str, Array] = {"image_ids": np.array(numbers, np.int64)}
    for name in (*ROWS, *TRUTH):
        kind = np.int64 if name in COUNTS else np.float64
        found[name] = np.array([rows[number][name] for number in numbers], kind)
    return found


def number_of(name: str, records: Records) -> Float:
    """A metric of each image, (N,), NaN where it is undefined; refuse unknown names."""
    if name not in ROWS:
        raise UserError(f"metric {name!r}: unknown; there are {', '.join(ROWS)}")
    return np.asarray(records[name], np.float64)


def value(records: Records, name: str) -> float | None:
    """A metric's mean over the images where it is defined; None if there are none."""
    numbers = number_of(name, records)
    there = ~np.isnan(numbers)
    return float(numbers[there].mean()) if there.any() else None


def interval(records: Records, name: str) -> Interval | None:
    """A metric with its 95 % bootstrap interval over images; None if it is undefined."""
    numbers = number_of(name, records)
    return None if np.isnan(numbers).all() else _drawn(numbers)


def difference(records: Records, twin: Records, name: str) -> Interval:
    """A metric minus a twin's, over images where both are defined, with a paired bootstrap."""
    return _drawn(number_of(name, records) - number_of(name, twin))


def check(records: Records, where: str) -> None:
    """Check records; messages begin with `where`.

    Raises:
        UserError: A missing array, wrong shapes, an infinite number, or no fixations.
    """
    if missing := [name for name in REQUIRED if name not in records]:
        raise UserError(f"{where}: no {', '.join(missing)}; these are no predictions")
    images = len(records["image_ids"])
    for name in REQUIRED:
        if records[name].shape != (images,):
            raise UserError(
                f"{where}: {name} is {records[name].shape} for {images} images, expected (N,)"
            )
    for name in ROWS:
        if (wrong := np.isinf(records[name])).any():
            first = records["image_ids"][int(np.flatnonzero(wrong)[0])]
            raise UserError(f"{where}: {name} of image {first} is infinite")
    if not records["fixation_counts"].sum():
        raise UserError(f"{where}: not one fixation was scored; did nobody look at any image?")


def check_same_truth(records: Records, other: Records, pair: str) -> None:
    """Check that fixations, smoothing, prior and shuffled fixations of two records are the same."""
    differences = {
        "fixation_counts": ("the fixations", "other data"),
        "other_counts": ("the fixations on other images, of sAUC", "another split"),
        "truth_entropy": ("the density of fixations", "another smoothing"),
        "prior_bits": ("the prior, of IG", "fitted to other images"),
    }
    for name, (what, why) in differences.items():
        own, others = (np.asarray(one[name], np.float64) for one in (records, other))
        differing = ~np.isclose(own, others, rtol=0, atol=_TOLERANCE, equal_nan=True)
        if wrong := int(differing.sum()):
            raise UserError(f"{pair} disagree on {what} on {wrong} images: {why}")


def _drawn(numbers: Float) -> Interval:
    """The mean over images with a number; bounds are over resamples of all images."""
    there = ~np.isnan(numbers)
    known = np.where(there, numbers, 0.0)

    def mean(counts: Float) -> Float:
        weight = counts @ there
        means = np.full(len(counts), np.nan)
        np.divide(counts @ known, weight, out=means, where=weight > 0)
        return means

    return drawn_again(mean, len(numbers))
