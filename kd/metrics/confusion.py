"""Accuracy class by class, and confusions beside those that the class prior explains.

A model predicts its likeliest class. Forks taken for persons say little where every third object is
a person; forks taken for knives do. Each confusion comes with the fraction that the class prior
alone would give it, and the *lift*: how many times more often it was predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kd.metrics.classification import ranks
from kd.metrics.records import Array, Records


@dataclass(frozen=True)
class Confusion:
    """Objects of the class `true` that were predicted as `said`."""

    true: int
    said: int
    count: int
    share: float  # of the objects of `true`
    expected: float  # the fraction among predictions drawn from the class prior

    @property
    def lift(self) -> float:
        """How many times more often than the prior would."""
        return self.share / self.expected

    @property
    def excess(self) -> float:
        """Objects beyond those that the prior would give."""
        return self.count * (1 - self.expected / self.share)


class ClassRow(NamedTuple):
    """One class that occurs."""

    label: int
    support: int
    top1: float
    top5: float
    instead: tuple[Confusion, ...]  # the most frequent wrong predictions first


def confusion_matrix(records: Records) -> NDArray[np.int64]:
    """(C, C) objects by true class (row) and predicted class (column)."""
    num_classes = records["log_probs"].shape[1]
    cell = records["labels"].astype(np.int64) * num_classes + records["log_probs"].argmax(axis=1)
    counts = np.bincount(cell, minlength=num_classes**2)
    return np.asarray(counts.reshape(num_classes, num_classes), dtype=np.int64)


def confusions(records: Records, *, at_least: int = 1) -> list[Confusion]:
    """Every pair of a true and a wrongly predicted class, the most frequent first.

    Args:
        records: Predictions; without `prior`, the shares of their own labels stand in for it.
        at_least: Objects that a pair must have.
    """
    matrix = confusion_matrix(records)
    support = matrix.sum(axis=1)
    expected = records["prior"] if "prior" in records else support / support.sum()
    true, said = np.nonzero(matrix >= max(at_least, 1))
    order = np.argsort(-matrix[true, said], kind="stable")
    return [
        Confusion(i, j, int(matrix[i, j]), float(matrix[i, j] / support[i]), float(expected[j]))
        for i, j in zip(true[order].tolist(), said[order].tolist(), strict=True)
        if i != j
    ]


def beyond_prior(records: Records, *, at_least: int = 3) -> list[Confusion]:
    """Confusions that the prior does not explain, those with most objects beyond it first.

    Args:
        records: As `confusions`.
        at_least: Objects that a pair must have: a lift taken from one says nothing.
    """
    found = [pair for pair in confusions(records, at_least=at_least) if pair.excess > 0]
    return sorted(found, key=lambda pair: -pair.excess)


def per_class(records: Records, *, instead: int = 3) -> list[ClassRow]:
    """Support, accuracy and wrong predictions of each class that occurs, the most frequent first.

    Args:
        records: Predictions.
        instead: How many wrong predictions of each class.
    """
    places, labels = ranks(records["log_probs"], records["labels"]), records["labels"]
    num_classes = records["log_probs"].shape[1]
    support = np.bincount(labels, minlength=num_classes)
    top1, top5 = (_shares(places < n, labels, support) for n in (1, 5))
    wrong: dict[int, list[Confusion]] = {}
    for pair in confusions(records):
        wrong.setdefault(pair.true, []).append(pair)
    return [
        ClassRow(c, int(support[c]), float(top1[c]), float(top5[c]),
                 tuple(wrong.get(c, [])[:instead]))
        for c in np.argsort(-support, kind="stable").tolist() if support[c]
    ]  # fmt: skip


def _shares(hits: Array, labels: Array, support: Array) -> NDArray[np.float64]:
    counts = np.bincount(labels, weights=hits, minlength=len(support))
    return np.asarray(counts / np.maximum(support, 1), dtype=np.float64)
