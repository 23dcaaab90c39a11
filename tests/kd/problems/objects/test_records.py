"""Records: other predictions of the same objects, and errors of records."""

from __future__ import annotations

import numpy as np
import pytest

from kd.errors import UserError
from kd.metrics.records import Records
from kd.problems.objects.metric import check, with_predictions


def three() -> Records:
    return {
        "object_ids": np.array([5, 7, 9]),
        "image_ids": np.array([1, 1, 2]),
        "labels": np.array([0, 1, 1]),
        "area_fractions": np.array([0.1, 0.1, 0.1]),
        "log_probs": np.log(np.full((3, 2), 0.5)),
    }


def test_other_predictions_are_put_in_order_of_the_objects() -> None:
    ids = np.array([9, 2, 5, 7])
    log_probs = np.log([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.7, 0.3]])
    found = with_predictions(three(), ids, log_probs)
    np.testing.assert_allclose(np.exp(found["log_probs"][:, 0]), [0.5, 0.7, 0.9])
    np.testing.assert_array_equal(found["labels"], [0, 1, 1])


@pytest.mark.parametrize(
    ("ids", "classes", "said"),
    [
        ([5, 9], 2, "posterior: no prediction for object 7; was it made on another dataset?"),
        ([5, 7], 2, "posterior: no prediction for object 9; was it made on another dataset?"),
        ([], 2, "posterior: no prediction for object 5; was it made on another dataset?"),
        ([5, 7, 9], 3, r"posterior: log_probs has shape \(3, 3\) for 3 objects and 2 classes"),
    ],
)
def test_an_object_without_an_answer_is_named(ids: list[int], classes: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        with_predictions(three(), np.array(ids), np.zeros((len(ids), classes)), "posterior")


def test_a_number_of_visible_objects_for_each_object() -> None:
    check({**three(), "visible": np.array([1, 1, 0])}, "run")
    check(three(), "an older run")
    with pytest.raises(UserError, match="run: arrays of different lengths"):
        check({**three(), "visible": np.array([1])}, "run")
