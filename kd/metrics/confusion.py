"""Accuracy by class, and confusions compared with those that the class prior explains.

Predicting "person" for a fork means little if every third object is a person; predicting "knife"
does. Each confusion therefore has the fraction expected from the class prior, and the lift, which
is the observed fraction divided by the expected one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kd.metrics.classification import ranks
from kd.metrics.records import Records


@dataclass(frozen=True)
class Confusion:
    """Objects of the class `true` that were predicted as `predicted`."""

    true: int
    predicted: int
    count: int
    fraction: float  # of the objects of class `true`
    expected: float  # the prior of class `predicted`

    @property
    def lift(self) -> float:
        """Observed fraction divided by the expected one."""
        return self.fraction / self.expected

    @property
    def excess(self) -> float:
        """Observed number of objects minus the number expected from the prior."""
        return self.count * (1 - self.expected / self.fraction)


class ClassRow(NamedTuple):
    """Accuracy and most frequent errors of one class."""

    label: int
    support: int
    top1: float
    top5: float
    instead: tuple[Confusion, ...]  # errors, most frequent first


def confusion_matrix(records: Records) -> NDArray[np.int64]:
    """Count objects by true class (row) and predicted class (column), (C, C)."""
    num_classes = records["log_probs"].shape[1]
    cell = records["labels"].astype(np.int64) * num_classes + records["log_probs"].argmax(axis=1)
    counts = np.bincount(cell, minlength=num_classes**2)
    return np.asarray(counts.reshape(num_classes, num_classes), dtype=np.int64)


def confusions(records: Records, *, at_least: int = 1) -> list[Confusion]:
    """List pairs of true and predicted class with at least `at_least` objects, most frequent first.

    If the records have no `prior`, the class fractions of their labels are used.
    """
    matrix = confusion_matrix(records)
    support = matrix.sum(axis=1)
    expected = records["prior"] if "prior" in records else support / support.sum()
    true, predicted = np.nonzero(matrix >= max(at_least, 1))
    order = np.argsort(-matrix[true, predicted], kind="stable")
    return [
        Confusion(i, j, int(matrix[i, j]), float(matrix[i, j] / support[i]), float(expected[j]))
        for i, j in zip(true[order].tolist(), predicted[order].tolist(), strict=True)
        if i != j
    ]


def beyond_prior(records: Records, *, at_least: int = 3) -> list[Confusion]:
    """List confusions that are more frequent than the prior predicts, largest excess first."""
    found = [pair for pair in confusions(records, at_least=at_least) if pair.excess > 0]
    return sorted(found, key=lambda pair: -pair.excess)


def per_class(records: Records, *, instead: int = 3) -> list[ClassRow]:
    """Compute support, accuracy and the `instead` most frequent errors by class, largest first."""
    places, labels = ranks(records["log_probs"], records["labels"]), records["labels"]
    num_classes = records["log_probs"].shape[1]
    support = np.bincount(labels, minlength=num_classes)
    top1, top5 = (
        np.bincount(labels, weights=places < n, minlength=num_classes) / np.maximum(support, 1)
        for n in (1, 5)
    )
    wrong: dict[int, list[Confusion]] = {}
    for pair in confusions(records):
        wrong.setdefault(pair.true, []).append(pair)
    return [
        ClassRow(c, int(support[c]), float(top1[c]), float(top5[c]),
                 tuple(wrong.get(c, [])[:instead]))
        for c in np.argsort(-support, kind="stable").tolist() if support[c]
    ]  # fmt: skip
