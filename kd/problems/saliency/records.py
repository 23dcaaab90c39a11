"""Numbers of saliency maps from those of each image: the arrays of a `predictions.npz`.

`image_ids` (N,) and, (N,) each, every number of `kd.metrics.saliency.METRICS` by its name, NaN
where an image's truth says nothing. What the truth was, so that no two are compared that were
held against different ones: `fixation_counts` (N,), `other_counts` (N,), the fixations of shuffled
AUC, `truth_entropy` (N,) of the density in bits, and `prior_bits` (N,), what the prior says of a
fixation: its mean logarithm to the base 2. Counts are 0 and numbers NaN where there is none.
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
# Smoothing differs in the last digits between machines; another sigma does by far more.
_ALIKE = 1e-3

Float = NDArray[np.float64]


def image(prediction: Tensor, truth: SaliencyTruth) -> dict[str, float]:
    """One image's row of all arrays but `image_ids`.

    Args:
        prediction: (H, W), not negative, of any scale.
        truth: Of the same size.

    Raises:
        UserError: As `kd.metrics.saliency.measure`.
    """
    return row_of(measure(prediction, truth), truth)


def row_of(numbers: dict[str, float], truth: SaliencyTruth) -> dict[str, float]:
    """The same of numbers that were had elsewhere, as `saliency_priors.inter_observer`'s."""
    counted = truth.prior is not None and len(truth.fixations)
    true = density_of(truth.density)
    entropy = -float((true * true.clamp_min(1e-300).log2()).sum())
    return {
        **numbers,
        "fixation_counts": len(truth.fixations),
        "other_counts": 0 if truth.others is None else len(truth.others),
        "truth_entropy": entropy if truth.density.any() else math.nan,
        "prior_bits": (
            float(log2_at(truth.prior, truth.fixations).mean())
            if truth.prior is not None and counted
            else math.nan
        ),
    }


def records_of(rows: dict[int, dict[str, float]]) -> dict[str, Array]:
    """Records of images by id, in its order.

    Args:
        rows: Image id -> as `image` gives it.
    """
    numbers = sorted(rows)
    found: dict[str, Array] = {"image_ids": np.array(numbers, np.int64)}
    for name in (*ROWS, *TRUTH):
        kind = np.int64 if name in COUNTS else np.float64
        found[name] = np.array([rows[number][name] for number in numbers], kind)
    return found


def number_of(name: str, records: Records) -> Float:
    """A metric of each image, (N,); NaN where nothing counts for it.

    Raises:
        UserError: There is no such metric.
    """
    if name not in ROWS:
        raise UserError(f"metric {name!r}: unknown; there are {', '.join(ROWS)}")
    return np.asarray(records[name], np.float64)


def value(records: Records, name: str) -> float | None:
    """A metric's mean over the images that have it; None where none has."""
    numbers = number_of(name, records)
    there = ~np.isnan(numbers)
    return float(numbers[there].mean()) if there.any() else None


def interval(records: Records, name: str) -> Interval | None:
    """A metric of one run with its 95 % interval, images drawn again; None where none has it."""
    numbers = number_of(name, records)
    return None if np.isnan(numbers).all() else _drawn(numbers)


def difference(records: Records, twin: Records, name: str) -> Interval:
    """A metric less that of a twin on the same images; both are given the same ones again.

    An image counts where both have the metric.
    """
    return _drawn(number_of(name, records) - number_of(name, twin))


def check(records: Records, where: str) -> None:
    """Check records before a number is computed from them.

    Args:
        records: As this module describes.
        where: What the message begins with.

    Raises:
        UserError: A missing array, wrong shapes, an infinite number, or not one fixation.
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
    """Fixations, smoothing, prior and shuffled fixations must be the same.

    Args:
        records: Of one run.
        other: Of another, about the same images.
        pair: Names both, for the message.

    Raises:
        UserError: They are not.
    """
    words = {
        "fixation_counts": "the fixations: other data",
        "other_counts": "the fixations on other images, of sAUC: another split",
        "truth_entropy": "the density of fixations: another smoothing",
        "prior_bits": "the prior, of IG: fitted to other images",
    }
    for name, what in words.items():
        own, others = (np.asarray(one[name], np.float64) for one in (records, other))
        differing = ~np.isclose(own, others, rtol=0, atol=_ALIKE, equal_nan=True)
        if wrong := int(differing.sum()):
            whose, _, why = what.partition(": ")
            raise UserError(f"{pair} disagree on {whose} on {wrong} images: {why}")


def _drawn(numbers: Float) -> Interval:
    """The mean over images that have a number, and its bounds as all images are drawn again."""
    there = ~np.isnan(numbers)
    known = np.where(there, numbers, 0.0)

    def mean(counts: Float) -> Float:
        weight = counts @ there
        shares = np.full(len(counts), np.nan)
        np.divide(counts @ known, weight, out=shares, where=weight > 0)
        return shares

    return drawn_again(mean, len(numbers))
