"""Predictions of objects: arrays of `predictions.npz`.

`object_ids` (K,), `image_ids` (K,), `labels` (K,), `area_fractions` (K,), box area by image area,
and `log_probs` (K, C); optional: `visible` (K,), numbers of other objects in the image, `prior`
(C,), class fractions of the training labels, and `confusable` (C,), numbers of groups of
confusable classes, -1 for none.
"""

from __future__ import annotations

import numpy as np

from kd.errors import UserError
from kd.metrics.records import Array, Records

REQUIRED = ("object_ids", "image_ids", "labels", "area_fractions", "log_probs")
BY_CLASS = ("prior", "confusable")  # all others have a row for each object
# How far a row of probabilities may be from summing to one: bfloat16 has three digits.
_NORMALISED_WITHIN = 0.05


def with_predictions(
    records: Records, object_ids: Array, log_probs: Array, where: str = "predictions"
) -> Records:
    """Replace predictions by others, log_probs (N, C) of object_ids (N,) in any order.

    Raises:
        UserError: An object has no prediction, or the number of classes differs.
    """
    num_classes = records["log_probs"].shape[1]
    if log_probs.shape != (len(object_ids), num_classes):
        raise UserError(
            f"{where}: {log_probs.shape} for {len(object_ids)} objects of {num_classes} classes"
        )
    order = np.argsort(object_ids, kind="stable")
    wanted = records["object_ids"]
    place = np.searchsorted(object_ids, wanted, sorter=order)
    rows = order[np.minimum(place, len(order) - 1)] if len(order) else place
    if not len(order) or (lacking := object_ids[rows] != wanted).any():
        row = int(np.flatnonzero(lacking)[0]) if len(order) else 0
        raise UserError(f"{where}: no prediction for object {wanted[row]}; other data?")
    return {**records, "log_probs": log_probs[rows]}


def check(records: Records, where: str) -> None:
    """Check shapes, labels and that rows are log-probabilities; messages begin with `where`."""
    if missing := [name for name in REQUIRED if name not in records]:
        raise UserError(f"{where}: no {', '.join(missing)}; these are no predictions")
    scores, labels = records["log_probs"], records["labels"]
    by_object = [name for name in (*REQUIRED, "visible") if name in records]
    lengths = {name: records[name].shape[:1] for name in by_object}
    if scores.ndim != 2 or len(set(lengths.values())) > 1:
        raise UserError(f"{where}: arrays of different lengths: {lengths}")
    if not len(labels):
        raise UserError(f"{where}: no object was scored; is any of them labelled and large enough?")
    num_classes = scores.shape[1]
    for name in BY_CLASS:
        if name in records and records[name].shape != (num_classes,):
            raise UserError(
                f"{where}: {name} is {records[name].shape}, there are {num_classes} classes"
            )
    if (wrong := (labels < 0) | (labels >= num_classes)).any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"{where}: object {records['object_ids'][row]} has label {labels[row]}, "
            f"there are {num_classes} classes"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.exp(scores.astype(np.float64)).sum(axis=1)
    if (wrong := ~(np.abs(total - 1) <= _NORMALISED_WITHIN)).any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"{where}: object {records['object_ids'][row]}: probabilities sum to {total[row]:.4g}, "
            "not 1 (NaN, or scores that were not normalised)"
        )


def check_same_truth(records: Records, other: Records, pair: str) -> None:
    """Check that two records have the same classes and labels; `pair` names both in messages."""
    own, others = (one["log_probs"].shape[1] for one in (records, other))
    if own != others:
        raise UserError(f"{pair} know different numbers of classes: {own} and {others}")
    if wrong := int((records["labels"] != other["labels"]).sum()):
        raise UserError(f"{pair} disagree on the labels of {wrong} objects: other data")
