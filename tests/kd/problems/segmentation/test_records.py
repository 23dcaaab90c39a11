"""Numbers from the confusions of images, and how sure they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kd.errors import UserError
from kd.metrics.records import Records
from kd.problems.segmentation import metric as map_scores
from kd.problems.segmentation.evaluation import SegmentationResults
from kd.problems.segmentation.metric import MeanIoU

RESULTS = SegmentationResults()
NAMES = ("sky", "road", "car")


def records_of(seed: int, *, images: int = 12, right: float = 0.6, first: int = 0) -> Records:
    """Maps of three classes, of which a fraction is right; the truth is the same for every seed."""
    truth = np.random.default_rng(99).integers(0, 3, (images, 40))
    rng = np.random.default_rng(seed)
    said = np.where(rng.random(truth.shape) < right, truth, rng.integers(0, 3, truth.shape))
    confusion = np.zeros((images, 3, 3), np.int64)
    for image in range(images):
        np.add.at(confusion[image], (truth[image], said[image]), 1)
    ids = np.arange(first, first + images)
    return {"image_ids": ids, "confusion": confusion, "names": np.array(NAMES)}


def slowly(confusion: Any, name: str) -> float:
    """A metric from its definition, class by class."""
    iou, accuracy = {}, {}
    for c in range(len(confusion)):
        hits, true, said = confusion[c, c], confusion[c].sum(), confusion[:, c].sum()
        if true + said - hits:
            iou[c] = hits / (true + said - hits)
        if true:
            accuracy[c] = hits / true
    found: dict[str, float] = {
        "mIoU": np.mean(list(iou.values())),
        "mean_accuracy": np.mean(list(accuracy.values())),
        "pixel_accuracy": np.trace(confusion) / confusion.sum(),
        "iou/1": iou.get(1, float("nan")),
    }
    return found[name]


@pytest.mark.parametrize("name", ["mIoU", "mean_accuracy", "pixel_accuracy", "iou/1"])
def test_numbers_and_their_bounds_are_those_of_summed_confusions(name: str) -> None:
    run, twin = records_of(0, right=0.8), records_of(1)
    expected = slowly(run["confusion"].sum(axis=0), name)
    assert RESULTS.value(run, name) == pytest.approx(expected)
    found = RESULTS.difference(run, twin, name)
    assert found.mean == pytest.approx(expected - slowly(twin["confusion"].sum(axis=0), name))
    rng = np.random.default_rng(5)
    gaps = []
    for _ in range(2000):
        drawn = rng.integers(0, 12, 12)
        a, b = (one["confusion"][drawn].sum(axis=0) for one in (run, twin))
        gaps.append(slowly(a, name) - slowly(b, name))
    assert found[1:] == pytest.approx(np.quantile(gaps, [0.025, 0.975]), abs=0.015)
    bounds = RESULTS.interval(run, name)
    assert bounds is not None and bounds.low < expected < bounds.high


def test_numbers_are_those_that_an_evaluation_writes() -> None:
    metric = MeanIoU(4)
    for image in range(5):
        maps = torch.randint(0, 3, (2, 1, 6, 6))
        batch = {"label_maps": maps[0], "image_ids": torch.tensor([image])}
        metric.take(maps[1], batch)
    records = metric.records()
    for name in map_scores.ROWS:
        assert RESULTS.value(records, name) == pytest.approx(metric.compute()[name])
    assert RESULTS.value(records, "iou/3") is None  # neither there nor said


def test_a_class_is_asked_for_by_name_or_number() -> None:
    run = records_of(0)
    assert RESULTS.value(run, "iou/car") == RESULTS.value(run, "iou/2")
    with pytest.raises(UserError, match="no such class; there are sky, road, car"):
        RESULTS.value(run, "iou/tree")
    nameless = {name: part for name, part in run.items() if name != "names"}
    with pytest.raises(UserError, match="no such class; there are 0 to 2"):
        RESULTS.value(nameless, "iou/3")
    with pytest.raises(UserError, match="'top1': unknown; there are mIoU"):
        RESULTS.value(run, "top1")


def test_equal_runs_differ_by_nothing_and_one_image_has_no_bounds() -> None:
    run = records_of(0)
    assert RESULTS.difference(run, run, "mIoU") == (0.0, 0.0, 0.0)
    one, other = (records_of(seed, images=1) for seed in (0, 1))
    alone = RESULTS.difference(one, other, "mIoU")
    assert np.isnan(alone.low) and not np.isnan(alone.mean)


def test_a_class_of_few_images_is_left_out_of_draws_that_lack_it() -> None:
    confusion = np.zeros((2, 2, 2), np.int64)
    confusion[:, 0, 0] = 10
    confusion[1, 1] = (1, 3)
    rare = {"image_ids": np.arange(2), "confusion": confusion}
    bounds = RESULTS.interval(rare, "iou/1")
    assert bounds is not None
    assert tuple(bounds) == pytest.approx((0.75, 0.75, 0.75))


def test_damage_is_named() -> None:
    run = records_of(0)
    wrong = {
        "no confusion": {"image_ids": run["image_ids"]},
        r"\(12, 3, 3\) for 4 images": {**run, "image_ids": np.arange(4)},
        r"expected \(N, C, C\)": {**run, "confusion": run["confusion"][:, :2]},
        "no pixel was scored": {**run, "confusion": np.zeros_like(run["confusion"])},
        "2 class names for 3": {**run, "names": np.array(["a", "b"])},
        "negative counts": {**run, "confusion": -run["confusion"]},
    }
    for message, records in wrong.items():
        with pytest.raises(UserError, match=message):
            RESULTS.check(records, "here")
    RESULTS.check(run, "here")


def test_only_answers_about_the_same_images_are_compared() -> None:
    run = records_of(0)
    RESULTS.check_same(records_of(1), run, "a and b")
    other = {**run, "confusion": run["confusion"][::-1]}
    four = {**run, "confusion": np.pad(run["confusion"], ((0, 0), (0, 1), (0, 1)))}
    wrong = {
        r"different images \(12 and 12, 2 in both\)": records_of(0, first=10),
        "different label maps for 12 images": other,
        "numbers of classes: 4 and 3": four,
    }
    for message, records in wrong.items():
        with pytest.raises(UserError, match=message):
            RESULTS.check_same(records, run, "a and b")
