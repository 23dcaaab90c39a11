"""Intervals of differences, over seeds and over images."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from kd.errors import UserError
from kd.metrics.bootstrap import Interval, bootstrap, paired_bootstrap, paired_interval


def test_the_interval_over_seeds_is_worked_by_hand() -> None:
    # Mean 2, standard deviation 1, t(0.975, 2) = 4.30265: the reach is 4.30265 / sqrt(3).
    found = paired_interval([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, 2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert not found.clear_of_zero


def test_the_interval_over_seeds_agrees_with_the_paired_t_test() -> None:
    a, b = np.array([0.31, 0.35, 0.30, 0.33]), np.array([0.36, 0.37, 0.37, 0.36])
    theirs = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert paired_interval(b - a)[1:] == pytest.approx((theirs.low, theirs.high))
    assert paired_interval(b - a).clear_of_zero


def test_one_seed_has_no_interval() -> None:
    with pytest.raises(UserError, match="at least two"):
        paired_interval([0.1])


def slow_bootstrap(
    a: np.ndarray, b: np.ndarray, groups: np.ndarray, classes: np.ndarray, samples: int
) -> tuple[float, float]:
    """The same draws as a loop: images, then their objects, then the mean of class means."""
    generator = np.random.default_rng(0)
    images = np.unique(groups)
    found = []
    for _ in range(samples):
        drawn = generator.integers(0, len(images), size=len(images))
        rows = np.concatenate([np.flatnonzero(groups == images[i]) for i in drawn])
        gaps = [
            np.mean(b[rows][classes[rows] == c]) - np.mean(a[rows][classes[rows] == c])
            for c in np.unique(classes[rows])
        ]
        found.append(np.mean(gaps))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("by_class", [False, True])
def test_the_bootstrap_agrees_with_a_slow_loop(
    by_class: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd.metrics.bootstrap.SAMPLES", 150)
    generator = np.random.default_rng(3)
    a, b = generator.integers(0, 2, (2, 40)).astype(float)
    groups = generator.integers(100, 112, 40)
    classes = generator.integers(0, 4, 40) if by_class else np.zeros(40, dtype=int)
    found = paired_bootstrap(a, b, groups, classes=classes if by_class else None)
    assert found[1:] == pytest.approx(slow_bootstrap(a, b, groups, classes, 150))


def test_equal_runs_differ_by_nothing_and_the_sign_follows_the_second() -> None:
    a = np.array([0.0, 1.0, 0.0, 1.0])
    images = np.arange(4)
    assert paired_bootstrap(a, a, images) == (0.0, 0.0, 0.0)
    assert paired_bootstrap(a, np.ones(4), images).mean == 0.5
    forth, back = paired_bootstrap(a, np.ones(4), images), paired_bootstrap(np.ones(4), a, images)
    assert (forth.low, forth.high) == (-back.high, -back.low)


def test_the_same_images_are_drawn_each_time() -> None:
    a, b = np.random.default_rng(1).random((2, 50))
    images = np.arange(50) // 2
    assert paired_bootstrap(a, b, images) == paired_bootstrap(a, b, images)


def test_objects_of_one_image_count_as_one_observation() -> None:
    gain = np.repeat(np.random.default_rng(0).integers(0, 2, 30), 20).astype(float)
    nothing = np.zeros(600)
    by_image = paired_bootstrap(nothing, gain, np.repeat(np.arange(30), 20))
    by_object = paired_bootstrap(nothing, gain, np.arange(600))
    assert by_image.high - by_image.low > 3 * (by_object.high - by_object.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kd.metrics.bootstrap.SAMPLES", 300)
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        a = generator.random(60) < 0.4
        b = generator.random(60) < 0.5
        found = paired_bootstrap(a.astype(float), b.astype(float), np.arange(60))
        inside += found.low <= 0.1 <= found.high
    assert 180 <= inside <= 199


def test_one_image_has_no_bounds() -> None:
    found = paired_bootstrap(np.zeros(3), np.ones(3), np.zeros(3))
    assert found.mean == 1.0
    assert math.isnan(found.low)
    assert not found.clear_of_zero


def test_unequal_lengths_and_no_objects_are_refused() -> None:
    with pytest.raises(UserError, match="same objects twice"):
        paired_bootstrap(np.zeros(2), np.zeros(3), np.zeros(2))
    with pytest.raises(UserError, match="same objects twice"):
        paired_bootstrap(np.zeros(0), np.zeros(0), np.zeros(0))


def test_an_interval_that_touches_zero_is_not_clear_of_it() -> None:
    assert not Interval(1.0, 0.0, 2.0).clear_of_zero
    assert Interval(-1.0, -2.0, -0.5).clear_of_zero


def test_one_runs_interval_holds_its_mean_and_narrows_with_more_images() -> None:
    values = np.array([0.0, 1.0, 1.0, 1.0] * 25)
    few, many = (bootstrap(np.tile(values, n), np.arange(100 * n)) for n in (1, 16))
    assert few.mean == many.mean == pytest.approx(0.75)
    # The standard error of a fraction is sqrt(p (1 - p) / n).
    reach = 1.96 * math.sqrt(0.75 * 0.25 / 100)
    assert (few.low, few.high) == pytest.approx((0.75 - reach, 0.75 + reach), abs=0.02)
    assert (many.high - many.low) == pytest.approx((few.high - few.low) / 4, rel=0.1)
    alone = bootstrap(np.array([1.0, 0.0]), np.zeros(2))
    assert alone.mean == 0.5 and math.isnan(alone.low)
