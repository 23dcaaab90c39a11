"""Top-n accuracy of object classes, and its records (the arrays of `predictions.npz`).

The arrays are `object_ids`, `image_ids`, `labels`, `area_fractions` (box area divided by image
area), (K,) each, and `log_probs` (K, C). Optional: `visible` (K,), number of other objects in the
image; `prior` (C,), class fractions of the training labels; `confusable` (C,), index of each
class's group of confusable classes, or -1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from kd.errors import UserError
from kd.metrics import classification as scores
from kd.metrics.records import (
    Array,
    Records,
    check_arrays,
    check_same_classes,
    gathered,
    save_records,
)

REQUIRED = ("object_ids", "image_ids", "labels", "area_fractions", "log_probs")
BY_CLASS = ("prior", "confusable")  # arrays with one row per class; all others: per object
# Tolerance of the sum of a row's probabilities, which is 1 up to the rounding of bfloat16.
_NORMALISED_WITHIN = 0.05
# Number of objects that are copied to the CPU together, because each copy waits for the device.
_FLUSH_AT = 4096
# Smallest class fraction: if it were 0, objects of the class would have an infinite NLL.
_PRIOR_FLOOR = 1e-8


class TopN:
    """Collects class log-probabilities of objects; computes top-n accuracy and related metrics.

    A tie with another class counts against the model. Repeated objects are scored once.

    Args:
        num_classes: C.
        prior: Class fractions of the training labels, (C,); adds metrics `prior_...`.
        confusable: For each class, its group of confusable classes, or None.
        visible: Maps image ids (K,) to the number of other objects in each image, (K,).
        where: Prefix of error messages, such as the name of a run or dataset.

    Raises:
        UserError: `prior` or `confusable` does not have C entries.
    """

    def __init__(
        self, num_classes: int, *, prior: Tensor | Array | Sequence[float] | None = None,
        confusable: Sequence[str | None] | None = None,
        visible: Callable[[Array], Array] | None = None, where: str = "evaluation",
    ) -> None:  # fmt: skip
        self.num_classes = num_classes
        self._where = where
        self._visible = visible
        self._extra: dict[str, Array] = {}
        if prior is not None:
            self._extra["prior"] = _checked_prior(prior, num_classes, where)
        if confusable is not None:
            if len(confusable) != num_classes:
                raise UserError(
                    f"{where}: {len(confusable)} confusable groups for {num_classes} classes"
                )
            self._extra["confusable"] = scores.confusable_groups(tuple(confusable))
        self._pending: list[dict[str, Tensor]] = []
        self._chunks: list[dict[str, Array]] = []

    def update(
        self, log_probs: Tensor, labels: Tensor, area_fractions: Tensor, object_ids: Tensor,
        image_ids: Tensor,
    ) -> None:  # fmt: skip
        """Add K objects: log-probabilities (K, C), all other arguments (K,).

        `area_fractions` are box areas divided by image areas. Objects with label -1 are ignored.
        """
        expected = (len(labels), self.num_classes)
        if tuple(log_probs.shape) != expected:
            raise ValueError(f"log_probs: {tuple(log_probs.shape)}, expected {expected}")
        batch = {
            # Copied, because a compiled model may write its next output over this one.
            "log_probs": log_probs.detach().to(torch.float32, copy=True),
            "labels": labels.detach().clone(),
            "area_fractions": area_fractions.detach().to(torch.float32, copy=True),
            "object_ids": object_ids.detach().clone(),
            "image_ids": image_ids.detach().clone(),
        }
        odd = {name: tuple(p.shape) for name, p in batch.items() if len(p) != len(labels)}
        if odd:
            raise ValueError(f"expected {len(labels)} rows, as many as labels, got {odd}")
        self._pending.append(batch)
        if sum(len(part["labels"]) for part in self._pending) >= _FLUSH_AT:
            self._flush()

    def take(self, decoded: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Add a batch with the log-probabilities (K, C) of its hidden objects."""
        hidden = batch["hidden"]
        labels, fractions, ids = (
            batch[name][hidden] for name in ("labels", "area_fractions", "object_ids")
        )
        self.update(decoded, labels, fractions, ids, batch["image_ids"][batch["image_of"][hidden]])

    def gather(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge the objects of all ranks; every rank must call this method."""
        self._chunks = gathered(self._merged(), group)

    def records(self) -> dict[str, Array]:
        """Arrays of `predictions.npz`, checked and sorted by object id."""
        records = {**self._merged(), **self._extra}
        if self._visible is not None:
            records["visible"] = self._visible(records["image_ids"])
        check(records, self._where)
        return records

    def compute(self) -> dict[str, float]:
        """All metrics by name (accuracies in 0..1), from `kd.metrics.classification.evaluate`."""
        return scores.evaluate(self.records())

    def save_predictions(self, path: str | Path) -> None:
        save_records(self.records(), Path(path))

    def _flush(self) -> None:
        if not self._pending:
            return
        names = self._pending[0]
        joined = {name: torch.cat([part[name] for part in self._pending]) for name in names}
        self._chunks.append({name: part.cpu().numpy() for name, part in joined.items()})
        self._pending = []

    def _merged(self) -> dict[str, Array]:
        """Arrays of all labelled objects, each object once, sorted by object id."""
        self._flush()
        if not self._chunks:
            empty = np.zeros(0, dtype=np.int64)
            chunk: dict[str, Array] = dict.fromkeys(REQUIRED, empty)
            chunk["log_probs"] = np.zeros((0, self.num_classes), dtype=np.float32)
            chunk["area_fractions"] = np.zeros(0, dtype=np.float32)
            return chunk
        joined = {
            name: np.concatenate([chunk[name] for chunk in self._chunks]) for name in REQUIRED
        }
        labelled = np.flatnonzero(joined["labels"] != -1)
        _, first = np.unique(joined["object_ids"][labelled], return_index=True)
        merged = {name: part[labelled[first]] for name, part in joined.items()}
        self._chunks = [merged]
        return merged


def _checked_prior(
    prior: Tensor | Array | Sequence[float], num_classes: int, where: str
) -> NDArray[np.float64]:
    given = prior.detach().cpu().numpy() if isinstance(prior, Tensor) else prior
    array = np.asarray(given, dtype=np.float64)
    if array.shape != (num_classes,):
        raise UserError(f"{where}: prior is {array.shape} for {num_classes} classes")
    if not (np.isfinite(array).all() and (array >= 0).all() and array.sum() > 0):
        raise UserError(f"{where}: prior must be class fractions: none negative, not all zero")
    floored = np.maximum(array / array.sum(), _PRIOR_FLOOR)
    return np.asarray(floored / floored.sum(), dtype=np.float64)


def with_predictions(
    records: Records, object_ids: Array, log_probs: Array, where: str = "predictions"
) -> Records:
    """Replace the predictions in records by `log_probs` (N, C) of the objects `object_ids` (N,).

    Raises a UserError if an object has no prediction or the number of classes differs.
    """
    num_classes = records["log_probs"].shape[1]
    if log_probs.shape != (len(object_ids), num_classes):
        raise UserError(
            f"{where}: log_probs has shape {log_probs.shape} for {len(object_ids)} objects and "
            f"{num_classes} classes"
        )
    order = np.argsort(object_ids, kind="stable")
    wanted = records["object_ids"]
    place = np.searchsorted(object_ids, wanted, sorter=order)
    rows = order[np.minimum(place, len(order) - 1)] if len(order) else place
    if not len(order) or (lacking := object_ids[rows] != wanted).any():
        row = int(np.flatnonzero(lacking)[0]) if len(order) else 0
        raise UserError(
            f"{where}: no prediction for object {wanted[row]}; was it made on another dataset?"
        )
    return {**records, "log_probs": log_probs[rows]}


def check(records: Records, where: str) -> None:
    """Raise a UserError, prefixed with `where`, if records are invalid or not normalised."""
    check_arrays(records, REQUIRED, where)
    scores, labels = records["log_probs"], records["labels"]
    by_object = [name for name in (*REQUIRED, "visible") if name in records]
    lengths = {name: records[name].shape[:1] for name in by_object}
    if scores.ndim != 2 or len(set(lengths.values())) > 1:
        raise UserError(f"{where}: arrays of different lengths: {lengths}")
    if not len(labels):
        raise UserError(f"{where}: no object was scored; is any object labelled and large enough?")
    num_classes = scores.shape[1]
    for name in BY_CLASS:
        if name in records and records[name].shape != (num_classes,):
            raise UserError(f"{where}: {name} is {records[name].shape} for {num_classes} classes")
    if (wrong := (labels < 0) | (labels >= num_classes)).any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"{where}: object {records['object_ids'][row]} has label {labels[row]}, "
            f"but there are {num_classes} classes"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.exp(scores.astype(np.float64)).sum(axis=1)
    if (wrong := ~(np.abs(total - 1) <= _NORMALISED_WITHIN)).any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"{where}: object {records['object_ids'][row]}: probabilities sum to {total[row]:.4g}, "
            "not 1; the scores are NaN or were not normalised"
        )


def check_same_truth(records: Records, other: Records, pair: str) -> None:
    """Raise a UserError, prefixed with `pair`, if two runs differ in classes or labels."""
    check_same_classes(records["log_probs"].shape[1], other["log_probs"].shape[1], pair)
    if wrong := int((records["labels"] != other["labels"]).sum()):
        raise UserError(
            f"{pair} have different labels for {wrong} objects; they were evaluated on "
            "different data"
        )
