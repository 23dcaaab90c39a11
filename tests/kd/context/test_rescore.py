"""Scores and context combined, by hand and at the edges; parameters that no test image has seen."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from kd.context.rescore import (
    Evidence,
    Fit,
    Fitter,
    Setting,
    combine,
    evidence_of,
    is_clear,
    rescored,
    settings_of,
)
from kd.metrics.coco_ap import Boxes, MeanAP, summary

BOX = [0.0, 0.0, 20.0, 20.0]


def known(
    scores: list[float], evidence: list[float], label: list[int], place: list[int]
) -> Evidence:
    """Detections by hand."""
    return Evidence(np.array(scores), np.array(evidence), np.array(label), np.array(place))


def logit(score: float) -> float:
    """Log s / (1 - s)."""
    return math.log(score / (1 - score))


def test_plain_is_a_sum_of_logits() -> None:
    one = known([0.3], [math.log(2.0)], [0], [0])
    assert logit(combine(one, Setting(0.5))[0]) == pytest.approx(logit(0.3) + 0.5 * math.log(2))


def test_evidence_is_the_posterior_over_the_prior() -> None:
    log_probs = np.log(np.array([[0.7, 0.3], [0.1, 0.9]], dtype=np.float32))
    found = evidence_of(
        np.array([0.5, 0.5, 0.5]),
        np.array([0, 1, 1]),
        np.array([0, 1, -1]),
        log_probs,
        np.log([0.4, 0.6]),
    )
    expected = [math.log(0.7 / 0.4), math.log(0.9 / 0.6), 0.0]  # nothing was asked about the last
    assert found.evidence == pytest.approx(expected, abs=1e-6)


def test_an_impossible_class_keeps_a_finite_score() -> None:
    log_probs = np.array([[-np.inf, 0.0]], dtype=np.float32)
    found = evidence_of(
        np.array([0.5, 0.5]), np.array([0, 1]), np.array([0, 0]), log_probs, np.log([0.5, 0.5])
    )
    for alone in (None, 0.0, 1.0):
        new = combine(found, Setting(3.0, alone))
        assert np.isfinite(new).all()
        assert new[0] < new[1]


def test_a_context_that_knows_nothing_changes_nothing() -> None:
    prior = np.log([0.4, 0.6])
    found = evidence_of(
        np.array([0.2, 0.9]), np.array([0, 1]), np.array([0, 0]), prior[None].astype("f4"), prior
    )
    for setting in (Setting(1.0), Setting(2.0, 0.0), Setting(2.0, 1.0)):
        np.testing.assert_allclose(combine(found, setting), [0.2, 0.9], atol=1e-6)


def test_competing_is_bayes_rule_where_one_box_has_all_there_is() -> None:
    """Two classes and nothing else, .6 and .4; context says 3 to 1 for the second."""
    pair = known([0.6, 0.4], [math.log(0.5), math.log(1.5)], [0, 1], [0, 0])
    weights = 0.6 * 0.5, 0.4 * 1.5
    expected = [weight / sum(weights) for weight in weights]
    assert combine(pair, Setting(1.0, 1.0)) == pytest.approx(expected)


def test_competing_by_hand_with_room_for_something_else() -> None:
    """.5 and .3 of one box, .2 for nothing: b = 1 leaves that .2, b = 0 scales it as the rest."""
    pair = known([0.5, 0.3], [math.log(2.0), math.log(0.5)], [0, 1], [0, 0])
    total = 0.5 * 2 + 0.3 * 0.5
    assert combine(pair, Setting(1.0, 1.0)) == pytest.approx(
        [1 / (total + 0.2), 0.15 / (total + 0.2)]
    )
    nothing = 0.2 * total / 0.8
    expected = [1 / (total + nothing), 0.15 / (total + nothing)]
    assert combine(pair, Setting(1.0, 0.0)) == pytest.approx(expected)
    assert sum(expected) == pytest.approx(0.8)  # the box is as sure to hold something as before


def test_competing_is_plain_for_a_class_alone() -> None:
    alone = known([0.3, 0.6], [0.7, -1.2], [0, 1], [0, 1])
    plain = combine(alone, Setting(0.8))
    assert combine(alone, Setting(0.8, 1.0)) == pytest.approx(plain)
    assert combine(alone, Setting(0.8, 0.0)) == pytest.approx([0.3, 0.6])
    half = combine(alone, Setting(0.8, 0.5))
    assert half == pytest.approx(combine(alone, Setting(0.4)))


def test_two_boxes_of_one_class_do_not_compete() -> None:
    twice = known([0.5, 0.4], [1.0, 1.0], [2, 2], [0, 0])
    assert combine(twice, Setting(1.0, 1.0)) == pytest.approx(combine(twice, Setting(1.0)))


def test_nothing_is_bit_equal_and_scores_stay_in_range() -> None:
    random = np.random.default_rng(0)
    scores = np.concatenate([random.random(40), [0.0, 1.0, 1e-12]])
    many = Evidence(scores, random.normal(0, 8, 43), random.integers(0, 4, 43), np.arange(43) // 5)
    assert np.array_equal(combine(many, Setting()), scores)
    for alone in (None, 0.0, 0.5, 1.0):
        new = combine(many, Setting(2.0, alone))
        assert np.isfinite(new).all()
        assert ((new >= 0) & (new <= 1)).all()
    unasked = replace(many, place=np.full(43, -1))
    assert np.array_equal(combine(unasked, Setting(2.0, 0.5)), scores)


def scenes(images: int, helpful: float) -> tuple[MeanAP, Evidence]:
    """An object an image; two classes at its box, the scores a coin, evidence right or wrong."""
    random = np.random.default_rng(3)
    truth = random.integers(0, 2, images)
    rows = np.arange(images)
    boxes = np.tile(np.array(BOX), (images, 1))
    areas, crowd = np.full(images, 400.0), np.zeros(images, np.bool_)
    objects = Boxes(rows, truth, boxes, areas, crowd)
    found = Boxes(
        np.repeat(rows, 2), np.tile([0, 1], images), np.repeat(boxes, 2, axis=0),
        np.repeat(areas, 2), np.repeat(crowd, 2),
    )  # fmt: skip
    right = (found.label == np.repeat(truth, 2)) * 2.0 - 1
    evidence = helpful * right + random.normal(0, 1.0, 2 * images)
    scores = random.uniform(0.2, 0.8, 2 * images)
    return MeanAP(objects, found, images, 2), Evidence(scores, evidence, found.label, found.image)


def test_help_is_found_and_noise_is_left_alone() -> None:
    folds = np.arange(60) % 4
    meter, good = scenes(60, helpful=1.5)
    fit = Fitter(meter, good, settings_of("auto"), folds).fit()
    assert fit.clear
    assert fit.setting.strength > 0
    assert fit.gain > 0.05
    meter, bad = scenes(60, helpful=-1.5)
    fit = Fitter(meter, bad, settings_of("auto"), folds).fit()
    assert fit.setting == Setting()
    assert np.array_equal(rescored(bad, [fit], np.zeros(120, np.int64)), bad.scores)


def test_the_test_fold_has_no_part_in_its_parameters() -> None:
    """Whatever is found or true on a fold, its own parameters are the same; the others' are not."""
    folds = np.arange(40) % 4
    meter, clean = scenes(40, helpful=0.8)
    mine = folds[clean.place] == 2
    poison = np.where(mine, -50.0 * clean.evidence, clean.evidence)
    poisoned = replace(clean, evidence=poison, scores=np.where(mine, 0.5, clean.scores))
    one, other = (Fitter(meter, data, settings_of("auto"), folds) for data in (clean, poisoned))
    assert one.fit(without=2, per_class=True) == other.fit(without=2, per_class=True)
    assert one.fit(without=1) != other.fit(without=1)


def test_each_fold_gets_its_own_fit_and_each_class_its_own_setting() -> None:
    four = known([0.5] * 4, [1.0] * 4, [0, 1, 0, 1], [0, 1, 2, 3])
    first = Fit(Setting(1.0), {1: Setting(2.0)}, 0.1, True, Setting(1.0))
    second = Fit(Setting(), {}, 0.0, False, Setting(3.0))
    new = rescored(four, [first, second], np.array([0, 0, 1, 1]))
    expected = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2)), 0.5, 0.5]
    assert new == pytest.approx(expected)


def test_a_gain_is_clear_above_its_standard_error() -> None:
    assert is_clear(np.array([0.1, 0.2, 0.15]))
    assert not is_clear(np.array([0.3, -0.2, 0.0]))
    assert not is_clear(np.array([0.0, 0.0, 0.0]))
    assert not is_clear(np.array([0.4]))
    assert is_clear(np.array([0.1, np.nan, 0.2]))  # a fold without objects says nothing


def test_settings_begin_with_none() -> None:
    for rule in ("plain", "competing", "auto"):
        assert settings_of(rule)[0] == Setting()
    assert all(setting.alone is None for setting in settings_of("plain"))


def test_class_settings_need_a_clear_gain_and_objects() -> None:
    """Context helps class 1 and misleads about class 0."""
    meter, data = scenes(120, helpful=1.5)
    turned = replace(data, evidence=np.where(data.label == 0, -data.evidence, data.evidence))
    fitter = Fitter(meter, turned, settings_of("plain"), np.arange(120) % 4)
    fit = fitter.fit(per_class=True)
    scores = rescored(turned, [fit], np.zeros(240, np.int64))
    common = rescored(turned, [fitter.fit()], np.zeros(240, np.int64))
    ap, plain = (summary(meter.average(meter.match(new)))["AP"][0] for new in (scores, common))
    assert ap > plain
    assert fit.classes
