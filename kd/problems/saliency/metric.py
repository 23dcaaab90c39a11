"""Saliency records (the arrays of `predictions.npz`) and their metrics over images.

The arrays are `image_ids` (N,) and every metric of `kd.metrics.saliency.METRICS`, (N,), NaN where
undefined. Four more (N,) arrays identify the ground truth, so that only runs with equal ground
truth are compared: `fixation_counts`; `other_counts`, number of other images' fixations for
shuffled AUC; `truth_entropy`, in bits; `prior_bits`, mean log2 of the prior at fixations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kd.errors import UserError
from kd.metrics.bootstrap import Interval, drawn_again
from kd.metrics.records import Array, Records, check_arrays
from kd.metrics.saliency import METRICS, SaliencyTruth, density_of, log2_at, measure
from kd.problems.images import PerImage

ROWS = tuple(METRICS)
COUNTS = ("fixation_counts", "other_counts")
TRUTH = (*COUNTS, "truth_entropy", "prior_bits")
REQUIRED = ("image_ids", *ROWS, *TRUTH)
# Smoothing differs in the last digits between machines; another sigma makes a larger difference.
_TOLERANCE = 1e-3

Float = NDArray[np.float64]


class SaliencyMaps(PerImage[dict[str, float]]):
    """Metrics of saliency maps, averaged over images.

    Args:
        truth: Returns the ground truth of an image id; predictions are scored at its size.
        where: Prefix of error messages, such as the name of a run or dataset.
        references: Returns arrays of reference metrics to add to the records; row i belongs to
            image id i.
    """

    def __init__(
        self, truth: Callable[[int], SaliencyTruth], *, where: str = "evaluation",
        references: Callable[[], Mapping[str, Array]] = dict,
    ) -> None:  # fmt: skip
        super().__init__(where=where)
        self._truth, self._references = truth, references

    def take(self, decoded: Tensor | Sequence[Tensor], batch: Mapping[str, Tensor]) -> None:
        """Score a batch's maps: (N, 1, H, W), (N, H, W), or a list of maps that differ in size.

        Maps must be non-negative and have the ground truth's size; their scale does not matter.
        """
        for predicted, number in zip(decoded, batch["image_ids"].tolist(), strict=True):
            if number in self._images:
                continue
            flat = predicted[0] if predicted.ndim == 3 and len(predicted) == 1 else predicted
            truth = self._truth(number)
            try:
                self._images[number] = row_of(measure(flat.detach().cpu(), truth), truth)
            except UserError as error:
                raise UserError(f"{self._where}: image {number}: {error}") from None

    def compute(self) -> dict[str, float]:
        """Mean of each metric over the images that define it, and `count`, the number of images."""
        records = self._own()
        found = {name: value(records, name) for name in ROWS}
        numbers = {name: number for name, number in found.items() if number is not None}
        return {**numbers, "count": float(len(self._images))}

    def records(self) -> dict[str, Array]:
        """The arrays described in the module docstring, and those of the references."""
        own = self._own()
        known = self._references().items()
        return {**own, **{name: rows[own["image_ids"]] for name, rows in known}}

    def _own(self) -> dict[str, Array]:
        records = records_of(self._images)
        check(records, self._where)
        return records


def row_of(numbers: dict[str, float], truth: SaliencyTruth) -> dict[str, float]:
    """Add the values that identify the ground truth to one image's metrics."""
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
    """Convert a mapping from image id to the result of `row_of` into records, sorted by id."""
    numbers = sorted(rows)
    found: dict[str, Array] = {"image_ids": np.array(numbers, np.int64)}
    for name in (*ROWS, *TRUTH):
        kind = np.int64 if name in COUNTS else np.float64
        found[name] = np.array([rows[number][name] for number in numbers], kind)
    return found


def number_of(name: str, records: Records) -> Float:
    """Values of the metric `name` for each image, (N,); NaN where undefined."""
    if name not in ROWS:
        raise UserError(f"metric {name!r}: unknown; there are {', '.join(ROWS)}")
    return np.asarray(records[name], np.float64)


def value(records: Records, name: str) -> float | None:
    """Mean of a metric over the images where it is defined; None if there are none."""
    numbers = number_of(name, records)
    there = ~np.isnan(numbers)
    return float(numbers[there].mean()) if there.any() else None


def interval(records: Records, name: str) -> Interval | None:
    """Mean of a metric with its 95 % bootstrap interval over images; None if undefined."""
    numbers = number_of(name, records)
    return None if np.isnan(numbers).all() else _drawn(numbers)


def difference(records: Records, twin: Records, name: str) -> Interval:
    """Mean paired difference `records` - `twin` of a metric, over images where both are defined."""
    return _drawn(number_of(name, records) - number_of(name, twin))


def check(records: Records, where: str) -> None:
    """Raise a UserError, prefixed with `where`, if records are malformed or have no fixation."""
    check_arrays(records, REQUIRED, where)
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
        raise UserError(f"{where}: no fixation was scored, because the images have none")


def check_same_truth(records: Records, other: Records, pair: str) -> None:
    """Raise a UserError, prefixed with `pair`, if two runs differ in ground truth."""
    differences = {
        "fixation_counts": ("fixations", "they were evaluated on different data"),
        "other_counts": ("fixations of other images (sAUC)", "the val splits differ"),
        "truth_entropy": ("densities of fixations", "they were smoothed differently"),
        "prior_bits": ("priors (IG)", "they were fitted to different images"),
    }
    for name, (what, why) in differences.items():
        own, others = (np.asarray(one[name], np.float64) for one in (records, other))
        differing = ~np.isclose(own, others, rtol=0, atol=_TOLERANCE, equal_nan=True)
        if wrong := int(differing.sum()):
            raise UserError(f"{pair} have different {what} for {wrong} images; {why}")


def _drawn(numbers: Float) -> Interval:
    """Mean of the values (N,) that are not NaN, with bounds from bootstrap resamples of all N."""
    there = ~np.isnan(numbers)
    known = np.where(there, numbers, 0.0)

    def mean(counts: Float) -> Float:
        weight = counts @ there
        means = np.full(len(counts), np.nan)
        np.divide(counts @ known, weight, out=means, where=weight > 0)
        return means

    return drawn_again(mean, len(numbers))
