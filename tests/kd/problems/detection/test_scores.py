"""Numbers of detections by name, how sure they are, and what is said of damaged records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd.errors import UserError
from kd.metrics.bootstrap import resamples
from kd.metrics.coco_ap import Boxes, Floats, MeanAP, mean_of_known, summary
from kd.metrics.kitti_ap import KittiTruth, kitti_ap
from kd.metrics.records import Records
from kd.metrics.voc_ap import VocAP
from kd.problems.detection import scores as box_scores
from kd.problems.detection.evaluation import DetectionResults
from kd.problems.detection.scores import box_records, kitti_truth

DETECTIONS = DetectionResults()
NAMES = ("cup", "mug", "tie", "jar")
GROUPS = ("drink", "drink", None, "alone")
IMAGES_OF = 24


def boxes_of(image: Any, label: Any, xywh: Floats, crowd: Any = None) -> Boxes:
    none = np.zeros(len(xywh), np.bool_)
    areas = xywh[:, 2] * xywh[:, 3]
    return Boxes(image, label, xywh, areas, none if crowd is None else crowd)


def records_of(seed: int, *, right: float = 0.7, kitti: bool = False, ids: int = 5) -> Records:
    """Three classes of four are there, in all three sizes; the truth is the same for each seed."""
    random = np.random.default_rng(99)
    image = np.repeat(np.arange(IMAGES_OF), 4)
    label = random.integers(0, 3, len(image))
    side = random.choice([12.0, 50.0, 130.0], (len(image), 1)) * np.ones(2)
    xywh = np.concatenate([random.uniform(0, 300, (len(image), 2)), side], axis=1)
    truth = boxes_of(image, label, xywh, random.random(len(image)) < 0.05)
    random = np.random.default_rng(seed)
    rows = random.integers(0, len(image), 6 * IMAGES_OF)
    said = np.where(random.random(len(rows)) < right, label[rows], random.integers(0, 4, len(rows)))
    near = xywh[rows] * random.uniform(0.92, 1.08, (len(rows), 4))
    marks = None
    if kitti:
        occluded = np.arange(len(image)) % 3
        region = truth.crowd
        marks = KittiTruth(truth, 0.2 * (occluded == 1), occluded, np.zeros_like(region), region)
    return box_records(
        truth, boxes_of(image[rows], said, near), random.random(len(rows)), names=NAMES,
        image_ids=np.arange(IMAGES_OF) * 3 + ids, category_ids=np.array([1, 4, 5, 9]),
        confusable=GROUPS, kitti=marks,
    )  # fmt: skip


def meter_of(records: Records) -> tuple[MeanAP, Floats]:
    """The evaluator of mean_ap, which is held to pycocotools elsewhere."""
    sides = [
        boxes_of(records[f"{side}_images"].astype(int), records[f"{side}_labels"].astype(int),
                 records[f"{side}_boxes"].astype(float), crowd)
        for side, crowd in (("truth", records["truth_crowds"]), ("found", None))
    ]  # fmt: skip
    return MeanAP(sides[0], sides[1], IMAGES_OF, 4), records["found_scores"]


def test_every_name_is_what_it_says() -> None:
    run = records_of(0)
    meter, scores = meter_of(run)
    averages = meter.average(meter.match(scores))
    whole = {key: float(numbers[0]) for key, numbers in summary(averages).items()}
    for name, key in box_scores.COCO.items():
        assert box_scores.value(run, name) == pytest.approx(whole[key], abs=1e-12)
    assert box_scores.value(run, "AP/mug") == pytest.approx(averages[0, 0, :, 1].mean())
    assert box_scores.value(run, "AP75/1") == pytest.approx(averages[0, 0, 5, 1])
    assert box_scores.value(run, "AP_small/tie") == pytest.approx(averages[0, 1, :, 2].mean())
    assert box_scores.value(run, "AP/jar") is None  # none is there
    # cups and mugs look alike; nothing looks like a jar or a tie.
    half = averages[0, 0, 0, :2].mean()
    assert box_scores.value(run, "confusable_AP50") == pytest.approx(half)
    ours = {"truth": meter.truth, "found": meter.found}
    voc = VocAP(ours["truth"], ours["found"], IMAGES_OF, 4)
    for name, points in box_scores.VOC.items():
        average = voc.average(voc.match(scores), points=points)
        assert box_scores.value(run, name) == pytest.approx(mean_of_known(average)[0])
        assert box_scores.value(run, f"{name}/tie") == pytest.approx(average[0, 2])
    assert box_scores.value(run, "KITTI_easy") is None
    values = box_scores.evaluate(run)
    assert {"AP", "AR100", "VOC07_mAP", "confusable_AP50", "count"} <= values.keys()
    assert "KITTI_easy" not in values and values["count"] == IMAGES_OF


def test_without_confusable_classes_there_is_no_number_of_them() -> None:
    run = {name: part for name, part in records_of(0).items() if name != "confusable"}
    assert box_scores.value(run, "confusable_AP50") is None


def test_kittis_numbers_are_there_where_their_marks_are() -> None:
    run = records_of(0, kitti=True)
    truth = kitti_truth(run)
    assert truth is not None
    meter, scores = meter_of(run)
    for name, points in (("KITTI", 40), ("KITTI11", 11)):
        expected = kitti_ap(truth, meter.found, scores, overlaps=[0.5] * 4, points=points)
        for row, difficulty in enumerate(("easy", "moderate", "hard")):
            number = box_scores.value(run, f"{name}_{difficulty}")
            assert number == pytest.approx(np.nanmean(expected[row]))
            own = box_scores.value(run, f"{name}_{difficulty}/cup")
            assert own == pytest.approx(expected[row, 0])
    assert box_scores.interval(run, "KITTI_hard") is None
    gap = box_scores.difference(run, records_of(1, kitti=True), "KITTI_hard")
    assert np.isnan(gap.low) and not np.isnan(gap.mean)


def test_intervals_are_percentiles_of_averages_taken_anew() -> None:
    run, twin = records_of(0, right=1.0), records_of(1, right=0.3)
    drawn = []
    for one in (run, twin):
        meter, scores = meter_of(one)
        matches = meter.match(scores)
        parts = [meter.average(matches, weights) for weights in resamples(IMAGES_OF)]
        drawn.append(np.concatenate([summary(part)["AP"] for part in parts]))
    assert len(drawn[0]) == 2000
    number = box_scores.value(run, "AP")
    bounds = box_scores.interval(run, "AP")
    assert bounds is not None and number is not None
    # Resamples lie higher than what was observed: repeated images make AP larger.
    bias = drawn[0].mean() - number
    assert bias > 0
    assert bounds[1:] == pytest.approx(np.quantile(drawn[0], [0.025, 0.975]) - bias, abs=1e-6)
    assert bounds.low < bounds.mean < bounds.high
    gap = box_scores.difference(run, twin, "AP")
    both = drawn[0] - drawn[1]
    other = box_scores.value(twin, "AP")
    assert other is not None and gap.mean == pytest.approx(number - other)
    shift = both.mean() - gap.mean
    assert gap[1:] == pytest.approx(np.quantile(both, [0.025, 0.975]) - shift, abs=1e-6)
    assert gap.clear_of_zero
    rare = box_scores.interval(run, "AP_small/cup")
    assert rare is not None and 0 <= rare.low <= rare.mean <= rare.high <= 1


def test_equal_runs_differ_by_nothing_and_one_image_has_no_bounds() -> None:
    run = records_of(0)
    for name in ("AP", "confusable_AP50", "AP_large", "VOC07_mAP", "AR100"):
        assert box_scores.difference(run, records_of(0), name) == (0.0, 0.0, 0.0)
    rows = {side: run[f"{side}_images"] == 0 for side in ("truth", "found")}
    one = {name: part[rows[name[:5]]] if name[:5] in rows else part for name, part in run.items()}
    one["image_ids"] = run["image_ids"][:1]
    alone = box_scores.interval(one, "AP")
    assert alone is not None and np.isnan(alone.low) and alone.mean == box_scores.value(one, "AP")
    assert np.isnan(box_scores.difference(one, one, "AP").low)


def test_numbers_follow_the_content_of_records() -> None:
    """What was computed is kept by content: a copy that was changed has numbers of its own."""
    run = dict(records_of(0))
    before = box_scores.value(run, "AP50")
    run["found_scores"] = run["found_scores"][::-1].copy()
    assert box_scores.value(run, "AP50") != before
    run["found_scores"][:] = records_of(0)["found_scores"]  # in place
    assert box_scores.value(run, "AP50") == before


def test_classes_come_with_their_objects() -> None:
    run = records_of(0)
    rows = box_scores.per_class(run)
    support = np.bincount(run["truth_labels"][~run["truth_crowds"]], minlength=4)
    assert [row.label for row in rows] == np.argsort(-support, kind="stable")[:3].tolist()
    assert [row.objects for row in rows] == sorted(support.tolist(), reverse=True)[:3]
    for row in rows:
        assert row.numbers["AP50"] == box_scores.value(run, f"AP50/{row.label}")
    sizes = [box_scores.objects_of(run, size).sum() for size in ("small", "medium", "large")]
    assert sum(sizes) == box_scores.objects_of(run).sum() == support.sum()
    hit, ignored = box_scores.right_at_half(run)
    found = box_scores.value(run, "AR100")
    assert found is not None and hit.sum() >= found * support.sum()
    assert not (hit & ignored)[~run["truth_crowds"][0]].all()


def test_names_that_mean_nothing_are_refused() -> None:
    run = records_of(0)
    wrong = {
        "metric 'top1': unknown; there are AP, AP50": "top1",
        "'mIoU/cup': unknown": "mIoU/cup",
        "'confusable_AR': unknown": "confusable_AR",
        "'KITTI12_easy': unknown": "KITTI12_easy",
        "metric 'AP/pan': no such class; there are cup, mug": "AP/pan",
        "metric 'AP/4': no such": "AP/4",
    }
    for message, name in wrong.items():
        with pytest.raises(UserError, match=message):
            box_scores.value(run, name)


def test_damage_is_named() -> None:
    run = records_of(0)
    last = len(run["found_scores"]) - 1

    def changed(name: str, row: int, value: float) -> Records:
        part = run[name].copy()
        part[row] = value
        return {**run, name: part}

    wrong = {
        "here: no truth_areas, found_scores; not a file of predictions of boxes": {
            name: part for name, part in run.items() if name not in ("truth_areas", "found_scores")
        },
        rf"found_labels is \({last},\), expected \({last + 1},\)": {
            **run, "found_labels": run["found_labels"][1:]},
        r"truth_boxes is \(96,\), expected \(96, 4\)": {
            **run, "truth_boxes": run["truth_boxes"][:, 0]},
        r"confusable is \(3,\), expected \(4,\)": {**run, "confusable": run["confusable"][:3]},
        "truth_crowds is int64, expected bool": {
            **run, "truth_crowds": run["truth_crowds"].astype(np.int64)},
        "image_ids must ascend": {**run, "image_ids": run["image_ids"][::-1]},
        r"found_images\[7\] is 24, expected 0..23": changed("found_images", 7, 24),
        r"truth_labels\[0\] is -1, expected 0..3": changed("truth_labels", 0, -1),
        r"found_boxes\[2\] on image \d+ is not finite": changed("found_boxes", 2, np.inf),
        r"found_boxes\[3\] on image \d+ has a negative side": changed("found_boxes", 3, -1.0),
        "the annotations have no objects": {**run, "truth_crowds": np.ones(96, np.bool_)},
    }  # fmt: skip
    for message, records in wrong.items():
        with pytest.raises(UserError, match=f"^here: {message.removeprefix('here: ')}"):
            DETECTIONS.check(records, "here")
    DETECTIONS.check(run, "here")


def test_only_detections_of_the_same_objects_are_compared() -> None:
    run = records_of(0)
    DETECTIONS.check_same(records_of(1), run, "a and b")
    fewer = {
        **run,
        **{name: part[1:] for name, part in run.items() if name.startswith("truth_")},
    }
    moved = {**run, "truth_boxes": run["truth_boxes"] + np.eye(96, 4)}
    wrong = {
        r"different images with boxes \(24 and 24, 0 in both\)": records_of(1, ids=6),
        "numbers of objects: 95 and 96": fewer,
        "different truth_boxes for 4 objects": moved,
    }
    for message, records in wrong.items():
        with pytest.raises(UserError, match=message):
            DETECTIONS.check_same(records, run, "a and b")


def test_a_real_detectors_results_give_its_numbers(coco_mini: Path) -> None:
    records = DETECTIONS.read_file(
        coco_mini / "annotations" / "instances_val2017.json",
        coco_mini / "detections" / "nanodet_m_val2017.json",
    )
    values = box_scores.evaluate(records)
    assert round(values["AP"], 4) == 0.2531 and round(values["AP50"], 4) == 0.4086
    assert values["AP"] == pytest.approx(0.25305111, abs=1e-8)
    assert values["AP_large"] == pytest.approx(0.4930072, abs=1e-7)
