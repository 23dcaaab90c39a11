"""Average precision: by hand, equal to pycocotools', over images that count more than once."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd.formats.coco_results import Detections, Truth, read_detections, read_truth
from kd.metrics.coco_ap import Floats, MeanAP, summary


def meter_of(truth: Truth, found: Detections) -> MeanAP:
    """The evaluator of two files."""
    return MeanAP(truth.boxes, found.boxes, len(truth.image_ids), len(truth.class_names))


def published(annotations: Path, detections: Path) -> Floats:
    """(A, T, C) of COCOeval, NaN where a class has no object."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotations))
        evaluation = COCOeval(coco, coco.loadRes(str(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # (T, R, C, A)
    return np.asarray(np.where(precision > -1, precision, np.nan).mean(axis=1).transpose(2, 0, 1))


def random_data_set(folder: Path, seed: int) -> tuple[Path, Path]:
    """Crowds, equal scores, all three sizes, over a hundred boxes of a class, empty images."""
    random = np.random.default_rng(seed)
    images = [
        {"id": 5 + 3 * i, "file_name": f"{i}.png", "width": 200, "height": 200} for i in range(6)
    ]
    categories = [{"id": i, "name": f"c{i}"} for i in (2, 3, 9)]
    objects: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in images[:-1]:
        for _ in range(12):
            side = random.choice([14.0, 50.0, 120.0], 2) * random.uniform(0.7, 1.3, 2)
            box = [*random.uniform(0, 80, 2), *side]
            category = int(random.choice([2, 3]))
            objects.append({"id": len(objects) + 1, "image_id": image["id"], "bbox": box,
                            "category_id": category, "area": 0.8 * box[2] * box[3],
                            "iscrowd": int(random.random() < 0.15)})  # fmt: skip
            for _ in range(int(random.integers(0, 30))):
                near = np.asarray(box) * random.uniform(0.85, 1.2, 4)
                score = round(float(random.random()), 1)
                name = int(random.choice([2, 2, 2, 3, 9]))
                results.append({"image_id": image["id"], "category_id": name,
                                "bbox": near.tolist(), "score": score})  # fmt: skip
    paths = folder / "truth.json", folder / "results.json"
    content = {"images": images[::-1], "categories": categories, "annotations": objects}
    paths[0].write_text(json.dumps(content))
    paths[1].write_text(json.dumps(results))
    return paths


@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocotools_on_random_boxes(tmp_path: Path, seed: int) -> None:
    annotations, detections = random_data_set(tmp_path, seed)
    truth = read_truth(annotations)
    found = read_detections(detections, truth)
    meter = meter_of(truth, found)
    ours = meter.average(meter.match(found.scores))[0]
    np.testing.assert_allclose(ours, published(annotations, detections), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_recall_equals_pycocotools_average_recall(tmp_path: Path, seed: int) -> None:
    annotations, detections = random_data_set(tmp_path, seed)
    truth = read_truth(annotations)
    found = read_detections(detections, truth)
    meter = meter_of(truth, found)
    ours = meter.recall(meter.match(found.scores))[0]  # (T, C)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotations))
        evaluation = COCOeval(coco, coco.loadRes(str(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    theirs = evaluation.eval["recall"][:, :, 0, -1]
    np.testing.assert_allclose(ours, np.where(theirs > -1, theirs, np.nan), rtol=0, atol=1e-12)
    assert np.nanmean(ours) == pytest.approx(evaluation.stats[8])


def test_is_that_of_a_real_detector(coco_mini: Path) -> None:
    truth = read_truth(coco_mini / "annotations" / "instances_val2017.json")
    found = read_detections(coco_mini / "detections" / "nanodet_m_val2017.json", truth)
    meter = meter_of(truth, found)
    numbers = summary(meter.average(meter.match(found.scores)))
    # The dataset's README; pycocotools' own digits.
    assert numbers["AP"][0] == pytest.approx(0.25305111, abs=1e-8)
    assert numbers["AP50"][0] == pytest.approx(0.40859352, abs=1e-8)
    assert numbers["AP75"][0] == pytest.approx(0.26538962, abs=1e-8)
    assert numbers["small"][0] == pytest.approx(0.13230055, abs=1e-8)
    assert numbers["medium"][0] == pytest.approx(0.3287701, abs=1e-7)
    assert numbers["large"][0] == pytest.approx(0.4930072, abs=1e-7)


def one_class(folder: Path, results: list[tuple[int, float, float]]) -> MeanAP:
    """Two images, one 10 x 10 object each at 0, 0; results are (image, left, score)."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 50, "height": 50} for i in (1, 2)]
    box = [0.0, 0.0, 10.0, 10.0]
    objects = [{"id": i, "image_id": i, "category_id": 1, "bbox": box, "area": 100} for i in (1, 2)]
    content = {"images": images, "categories": [{"id": 1, "name": "a"}], "annotations": objects}
    entries = [
        {"image_id": i, "category_id": 1, "bbox": [left, 0.0, 10.0, 10.0], "score": score}
        for i, left, score in results
    ]
    (folder / "truth.json").write_text(json.dumps(content))
    (folder / "results.json").write_text(json.dumps(entries))
    truth = read_truth(folder / "truth.json")
    return meter_of(truth, read_detections(folder / "results.json", truth))


def test_a_value_by_hand(tmp_path: Path) -> None:
    """Right, wrong, right: precision 1 up to recall 1/2 (51 of 101 points), then 2/3."""
    meter = one_class(tmp_path, [(1, 0.0, 0.9), (1, 30.0, 0.8), (2, 0.0, 0.7)])
    numbers = summary(meter.average(meter.match(np.array([0.9, 0.8, 0.7]))))
    assert numbers["AP"][0] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert np.isnan(numbers["large"][0])
    # The wrong one last: nothing is lost.
    assert summary(meter.average(meter.match(np.array([0.9, 0.1, 0.7]))))["AP"][0] == 1


def test_an_image_counted_twice_is_the_image_there_twice(tmp_path: Path) -> None:
    annotations, detections = random_data_set(tmp_path, 7)
    # Scores that differ, so that the copies of one box stand together in the order.
    entries = json.loads(detections.read_text())
    for place, entry in enumerate(np.random.default_rng(0).permutation(entries).tolist()):
        entry["score"] = (place + 1) / (len(entries) + 1)
    detections.write_text(json.dumps(entries))
    truth = read_truth(annotations)
    found = read_detections(detections, truth)
    meter = meter_of(truth, found)
    weights = np.array([[2, 0, 1, 3, 1, 1]])
    weighed = meter.average(meter.match(found.scores), weights)[0]

    content, results = json.loads(annotations.read_text()), json.loads(detections.read_text())
    ids = truth.image_ids.tolist()
    copies = [(image, copy) for image, n in zip(ids, weights[0], strict=True) for copy in range(n)]
    new = {key: number + 1 for number, key in enumerate(copies)}

    def again(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {**entry, "image_id": number}
            for (image, _), number in new.items()
            for entry in entries
            if entry["image_id"] == image
        ]

    content["images"] = [{**content["images"][0], "id": number} for number in new.values()]
    content["annotations"] = [
        {**entry, "id": place + 1} for place, entry in enumerate(again(content["annotations"]))
    ]
    (tmp_path / "more.json").write_text(json.dumps(content))
    (tmp_path / "more_results.json").write_text(json.dumps(again(results)))
    more = published(tmp_path / "more.json", tmp_path / "more_results.json")
    np.testing.assert_allclose(weighed, more, rtol=0, atol=1e-12)


def test_images_that_do_not_count_have_no_say(tmp_path: Path) -> None:
    meter = one_class(tmp_path, [(1, 0.0, 0.5), (2, 30.0, 0.9)])
    scores = np.array([0.5, 0.9])
    first = meter.average(meter.match(scores), np.array([[1, 0], [0, 1], [1, 1]]))
    # Alone, the first image is perfect and the second finds nothing; together one of two, second.
    assert summary(first)["AP"].tolist() == pytest.approx([1.0, 0.0, 51 * 0.5 / 101])
