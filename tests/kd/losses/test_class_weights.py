"""Class weights from class frequencies."""

from __future__ import annotations

import pytest

from kd.errors import UserError
from kd.losses.class_weights import median_frequency, positive_weights


def test_the_median_class_weighs_one_and_rare_ones_more() -> None:
    weights = median_frequency([0.6, 0.2, 0.1, 0.05, 0.05])
    assert weights == pytest.approx([1 / 6, 0.5, 1, 2, 2])
    gentle = median_frequency([0.6, 0.2, 0.1, 0.05, 0.05], power=0.5)
    assert gentle == pytest.approx([weight**0.5 for weight in weights])
    assert median_frequency([0.6, 0.0, 0.4], power=0.0) == [1, 1, 1]


def test_weights_are_capped_on_both_sides() -> None:
    assert median_frequency([1e-6, 0.1, 0.9999, 0.1], cap=4.0) == [4.0, 1.0, 0.25, 1.0]
    assert median_frequency([0.0, 0.5, 0.5]) == [10.0, 1.0, 1.0]


def test_presence_weighs_as_much_as_absence() -> None:
    frequencies = [0.25, 0.5, 0.1]
    weights = positive_weights(frequencies)
    assert [r * w for r, w in zip(frequencies, weights, strict=True)] == pytest.approx(
        [1 - r for r in frequencies]
    )
    assert positive_weights([0.0, 1.0]) == [10.0, 0.1]
    assert positive_weights([0.0, 0.3], power=0.0) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("frequencies", "options", "message"),
    [
        ([], {}, "one above 0"),
        ([-0.1, 1.0], {}, "must be at least 0"),
        ([0.5], {"power": 2.0}, r"power must be in 0..1, got 2.0"),
        ([0.5], {"cap": 0.5}, "cap must be at least 1"),
    ],
)
def test_bad_frequencies_and_options_are_rejected(
    frequencies: list[float], options: dict[str, float], message: str
) -> None:
    for function in (median_frequency, positive_weights):
        with pytest.raises(UserError, match=message):
            function(frequencies, **options)
    with pytest.raises(UserError, match=r"frequencies must be in 0..1, got 1.5"):
        positive_weights([1.5])
