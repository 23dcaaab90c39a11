"""Metrics of class probabilities: top-n, per class, confusable classes, by size, calibration.

All functions take records (`kd.problems.objects.metric`), the arrays of a `predictions.npz`. Most
metrics are a mean over objects, or a mean over classes of such means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kd.errors import UserError
from kd.metrics.bootstrap import Interval, bootstrap, paired_bootstrap
from kd.metrics.records import Array, Records

TOPS = (1, 3, 5, 10, 20)
CALIBRATION_BINS = 15
# Area of the hidden region as a fraction of the image, lower bound included; each bin has about a
# quarter of COCO's objects with fractions of 0.15 to 30 %.
FRACTION_BINS = {
    "tiny": (0.0, 0.005),
    "small": (0.005, 0.02),
    "medium": (0.02, 0.08),
    "large": (0.08, np.inf),
}
# Number of other objects in the image, lower bound included.
VISIBLE_BINS: dict[str, tuple[float, float]] = {
    "0": (0, 1), "1-2": (1, 3), "3-4": (3, 5), "5-6": (5, 7), "7-10": (7, 11),
    "over10": (11, np.inf),
}  # fmt: skip
BINS: dict[str, Mapping[str, tuple[float, float]]]
BINS = {"fraction": FRACTION_BINS, "visible": VISIBLE_BINS}


class Reliability(NamedTuple):
    """Accuracy by confidence in the non-empty bins of a reliability diagram."""

    confidence: Array  # (B,) mean over the bin's objects
    accuracy: Array  # (B,)
    objects: Array  # (B,) number of objects


def ranks(scores: Array, labels: Array) -> NDArray[np.int64]:
    """Compute the rank of each row's true class, (K,); 0 is best.

    The rank is the number of classes with a higher score, plus half the number of tied other
    classes, rounded up. A constant prediction is therefore never correct.

    Args:
        scores: (K, C), higher is better.
        labels: (K,), 0..C-1.

    Raises:
        UserError: A score is NaN.
    """
    if np.isnan(scores).any():
        row = int(np.flatnonzero(np.isnan(scores).any(axis=1))[0])
        raise UserError(f"scores: row {row} contains NaN and cannot be ranked")
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    ahead = (scores > own).sum(axis=1)
    tied = (scores == own).sum(axis=1) - 1
    return np.asarray(ahead + (tied + 1) // 2, dtype=np.int64)


def reliability(log_probs: Array, labels: Array, *, bins: int = CALIBRATION_BINS) -> Reliability:
    """Compute mean confidence (largest probability) and accuracy in bins of equal width."""
    confidence = np.exp(log_probs.astype(np.float64)).max(axis=1)
    correct = ranks(log_probs, labels) == 0
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=part, minlength=bins) for part in (confidence, correct)]
    filled = count > 0
    confident, accurate = (part[filled] / count[filled] for part in sums)
    return Reliability(confident, accurate, count[filled])


def calibration_error(log_probs: Array, labels: Array, *, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error (Guo et al., 2017, https://arxiv.org/abs/1706.04599).

    It is the mean of |confidence - accuracy| over the bins, weighted by their numbers of objects.
    """
    points = reliability(log_probs, labels, bins=bins)
    gaps = np.abs(points.confidence - points.accuracy)
    return float((gaps * points.objects).sum() / points.objects.sum())


def confusable_groups(names: Sequence[str | None]) -> NDArray[np.int64]:
    """Number the groups of classes that share a name, (C,); -1 for classes without a group."""
    shared = sorted({name for name in names if name is not None and names.count(name) > 1})
    number = {name: place for place, name in enumerate(shared)}
    return np.array(
        [-1 if name is None else number.get(name, -1) for name in names], dtype=np.int64
    )


def prior_records(records: Records) -> Records | None:
    """Replace every prediction by the class prior; return None if the records have no prior."""
    if "prior" not in records:
        return None
    log_prior = np.log(records["prior"].astype(np.float64))
    log_probs = np.broadcast_to(log_prior, (len(records["labels"]), len(log_prior)))
    return {**records, "log_probs": log_probs}


def _top(records: Records, n: int) -> Array:
    return np.asarray(ranks(records["log_probs"], records["labels"]) < n, dtype=np.float64)


def _nll(records: Records) -> Array:
    labels = records["labels"]
    own = records["log_probs"][np.arange(len(labels)), labels]
    return np.asarray(-own, dtype=np.float64)


def _topn_auc(records: Records) -> Array:
    # The mean over objects equals the mean of the top-n curve over n = 1..C.
    places = ranks(records["log_probs"], records["labels"])
    return np.asarray(1.0 - places / records["log_probs"].shape[1], dtype=np.float64)


def _groups(records: Records) -> Array:
    """Confusable group of each class, (C,); -1 for none."""
    return records.get("confusable", np.full(records["log_probs"].shape[1], -1))


def _is_confusable(records: Records) -> NDArray[np.bool_]:
    return np.asarray(_groups(records)[records["labels"]] >= 0)


def _pair_top1(records: Records) -> Array:
    groups, labels = _groups(records), records["labels"]
    inside = groups[labels][:, None] == groups[None, :]
    scores = np.where(inside, records["log_probs"], -np.inf)
    return np.asarray(ranks(scores, labels) == 0, dtype=np.float64)


def _top1_in_bin(records: Records, kind: str, name: str) -> Array:
    low, high = BINS[kind][name]
    of_objects = records.get("area_fractions" if kind == "fraction" else kind)
    if of_objects is None:
        of_objects = np.full(len(records["labels"]), -1)
    return np.where((of_objects >= low) & (of_objects < high), _top(records, 1), np.nan)


# Metric -> value of each object, (K,). It is NaN for excluded objects, whatever their scores.
_MEASURES: dict[str, Callable[[Records], Array]] = {
    "mean_class_top1": lambda records: _top(records, 1),
    "topn_auc": _topn_auc,
    "nll": _nll,
    "confusable_top1": lambda records: np.where(_is_confusable(records), _top(records, 1), np.nan),
    "confusable_pair_top1": lambda records: np.where(
        _is_confusable(records), _pair_top1(records), np.nan
    ),
    **{
        f"{kind}/{name}_top1": partial(_top1_in_bin, kind=kind, name=name)
        for kind, bins in BINS.items()
        for name in bins
    },
}
_BY_CLASS = "mean_class_top1"  # a mean over classes, not over objects


def bin_title(kind: str, name: str) -> str:
    """Title of a bin in `BINS` for axes and tables; size bins have bounds on a second line."""
    if kind == "visible":
        return name.replace("over", "over ").replace("-", " to ")
    low, high = (100 * bound for bound in FRACTION_BINS[name])
    bounds = f"over {low:g} %" if np.isinf(high) else f"{low:g} to {high:g} %"
    return f"{name}\n{bounds}"


def measure(records: Records, name: str) -> Array | None:
    """Compute each object's value of a metric, (K,); NaN for excluded objects, None if all are.

    Raises:
        UserError: The metric is unknown, or is not a mean over objects (`ece`).
    """
    if matched := re.fullmatch(r"top([1-9]\d*)", name):
        n = int(matched[1])
        return _top(records, n) if n <= records["log_probs"].shape[1] else None
    if name not in _MEASURES:
        raise UserError(f"metric {name!r}: unknown; there are top<n>, ece, {', '.join(_MEASURES)}")
    found = _MEASURES[name](records)
    return None if np.isnan(found).all() else found


def value(records: Records, name: str) -> float | None:
    """Compute a metric of the records; None if it is undefined for all objects."""
    if name == "ece":
        return calibration_error(records["log_probs"], records["labels"])
    if (found := measure(records, name)) is None:
        return None
    if name != _BY_CLASS:
        return float(found[~np.isnan(found)].mean())
    support = np.bincount(records["labels"])
    sums = np.bincount(records["labels"], weights=found)
    return float((sums[support > 0] / support[support > 0]).mean())


def interval(records: Records, name: str) -> Interval | None:
    """A metric with its 95 % interval over images; None for `ece` or if undefined."""
    if name == "ece" or (found := measure(records, name)) is None:
        return None
    there = ~np.isnan(found)
    classes = records["labels"] if name == _BY_CLASS else None
    return bootstrap(found[there], records["image_ids"][there], classes=classes)


def difference(records: Records, twin: Records, name: str) -> Interval:
    """A metric minus that of the paired run `twin` on the same objects; no bounds for `ece`."""
    if name == "ece":
        own, other = (calibration_error(r["log_probs"], r["labels"]) for r in (records, twin))
        return Interval(own - other, float("nan"), float("nan"))
    before, after = measure(twin, name), measure(records, name)
    assert before is not None and after is not None  # callers have computed both values
    there = ~np.isnan(after)
    classes = records["labels"] if name == _BY_CLASS else None
    return paired_bootstrap(
        before[there], after[there], records["image_ids"][there], classes=classes
    )


def chance(records: Records, name: str) -> float | None:
    """Expected metric of uniformly random guesses on the same objects; None if undefined."""
    # Exact, unlike `ranks` of constant scores, which places the true class in the middle.
    if value(records, name) is None or name == "ece":
        return None
    num_classes = int(records["log_probs"].shape[1])
    if matched := re.fullmatch(r"top(\d+)", name):
        return int(matched[1]) / num_classes
    if name == "confusable_pair_top1":
        groups = records["confusable"]
        own = groups[records["labels"][_is_confusable(records)]]
        size = np.bincount(groups[groups >= 0])[own]
        return float((1.0 / size).mean())
    special = {"topn_auc": (num_classes + 1) / (2 * num_classes), "nll": float(np.log(num_classes))}
    return special.get(name, 1 / num_classes)


def curve(records: Records) -> NDArray[np.float64]:
    """Compute the top-n accuracies for n = 1..C: (C,)."""
    places = ranks(records["log_probs"], records["labels"])
    counts = np.bincount(places, minlength=records["log_probs"].shape[1])
    return np.asarray(np.cumsum(counts) / max(len(places), 1), dtype=np.float64)


def evaluate(records: Records) -> dict[str, float]:
    """Compute all metrics that the records allow, and those of the class prior as `prior_<metric>`.

    They are `top1` to `top20` (up to C), `mean_class_top1` over the classes that occur, `topn_auc`
    (area under the top-n curve: 1 is perfect, 0.5 about chance), `nll` (nats), `ece` (15 bins),
    `confusable_top1`, `confusable_pair_top1` (among the classes of the true class's group),
    `fraction/<bin>_top1`, `visible/<bin>_top1` and the number of objects, `count`.
    """
    names = [f"top{n}" for n in TOPS] + list(_MEASURES)
    found = {name: value(records, name) for name in [*names, "ece"]}
    if (prior := prior_records(records)) is not None:
        plain = [name for name in names if "/" not in name]
        found |= {f"prior_{name}": value(prior, name) for name in plain}
    numbers = {name: number for name, number in found.items() if number is not None}
    return {**numbers, "count": float(len(records["labels"]))}
