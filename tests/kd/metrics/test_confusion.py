"""Classes one by one, confusions and their lift, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kd.metrics.confusion import beyond_prior, confusion_matrix, confusions, per_class
from kd.metrics.records import Records

CUP, FORK, PERSON = 0, 1, 2


def said(labels: list[int], answers: list[int], prior: list[float] | None = None) -> Records:
    """Objects of `labels` of which each is answered with 80 %."""
    probs = np.where(np.eye(3)[answers] > 0, 0.8, 0.1)
    count = len(labels)
    records = {
        "object_ids": np.arange(count),
        "image_ids": np.arange(count) // 2,
        "labels": np.array(labels),
        "area_fractions": np.full(count, 0.01),
        "log_probs": np.log(probs),
    }
    return records if prior is None else {**records, "prior": np.array(prior)}


#                 four cups             two forks     two persons
LABELS = [CUP, CUP, CUP, CUP, FORK, FORK, PERSON, PERSON]
ANSWERS = [CUP, FORK, FORK, PERSON, PERSON, CUP, PERSON, PERSON]


def test_the_matrix_has_the_true_class_in_rows() -> None:
    matrix = confusion_matrix(said(LABELS, ANSWERS))
    assert matrix.tolist() == [[1, 2, 1], [1, 0, 1], [0, 0, 2]]
    assert matrix.sum() == len(LABELS)


def test_confusions_are_worked_by_hand() -> None:
    found = confusions(said(LABELS, ANSWERS, [0.3, 0.1, 0.6]))
    pairs = [(pair.true, pair.predicted, pair.count) for pair in found]
    assert pairs == [(CUP, FORK, 2), (CUP, PERSON, 1), (FORK, CUP, 1), (FORK, PERSON, 1)]
    first = found[0]
    assert first.fraction == 0.5  # two of four cups
    assert first.expected == 0.1  # one answer in ten is a fork
    assert first.lift == pytest.approx(5.0)
    assert first.excess == pytest.approx(2 - 4 * 0.1)
    assert found[1].lift == pytest.approx(0.25 / 0.6)


def test_without_a_prior_the_labels_shares_stand_in_for_it() -> None:
    assert [pair.expected for pair in confusions(said(LABELS, ANSWERS))] == [
        0.25, 0.25, 0.5, 0.25,
    ]  # fmt: skip


def test_mistakes_that_the_prior_explains_are_none_beyond_it() -> None:
    """Half of the cups are called persons, and so is half of everything: no news."""
    records = said([CUP] * 6 + [PERSON] * 2, [PERSON] * 3 + [FORK] * 3 + [PERSON] * 2,
                   [0.3, 0.1, 0.6])  # fmt: skip
    assert [(pair.true, pair.predicted) for pair in beyond_prior(records)] == [(CUP, FORK)]
    assert beyond_prior(records, at_least=4) == []


def test_the_greatest_excess_comes_first_not_the_greatest_count() -> None:
    records = said([CUP] * 10 + [FORK] * 4, [PERSON] * 6 + [CUP] * 4 + [CUP] * 4, [0.1, 0.4, 0.5])
    found = beyond_prior(records)
    assert [(pair.true, pair.predicted) for pair in found] == [(FORK, CUP), (CUP, PERSON)]
    assert [pair.excess for pair in found] == pytest.approx([4 - 4 * 0.1, 6 - 10 * 0.5])


def test_the_per_class_table_has_the_most_frequent_class_first_and_what_is_said_instead() -> None:
    rows = per_class(said(LABELS, ANSWERS, [0.3, 0.1, 0.6]), instead=1)
    assert [(row.label, row.support, row.top1, row.top5) for row in rows] == [
        (CUP, 4, 0.25, 1.0), (FORK, 2, 0.0, 1.0), (PERSON, 2, 1.0, 1.0),
    ]  # fmt: skip
    assert [[pair.predicted for pair in row.instead] for row in rows] == [[FORK], [CUP], []]


def test_a_class_without_objects_has_no_row() -> None:
    assert [row.label for row in per_class(said([FORK, FORK], [CUP, FORK]))] == [FORK]


def test_the_matrix_agrees_with_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    labels, answers = rng.integers(3, size=(2, 50)).tolist()
    expected = np.zeros((3, 3), dtype=int)
    for label, answer in zip(labels, answers, strict=True):
        expected[label, answer] += 1
    records = said(labels, answers)
    np.testing.assert_array_equal(confusion_matrix(records), expected)
    pairs = {(pair.true, pair.predicted): pair.count for pair in confusions(records)}
    assert pairs == {
        (i, j): expected[i, j] for i in range(3) for j in range(3) if i != j and expected[i, j]
    }
