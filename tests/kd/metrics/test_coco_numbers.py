"""COCO's twelve numbers are those of an implementation that shares no code with ours."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools.coco import COCO as PublishedCOCO
from pycocotools.cocoeval import COCOeval

from kd.errors import UserError
from kd.problems.detection import scores as box_scores
from kd.problems.detection.evaluation import DetectionResults

# In the order of COCOeval's stats.
TWELVE = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
          "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")  # fmt: skip


def faster(annotations: Path, results: Path) -> list[float]:
    """The twelve of faster-coco-eval, which is written in C++."""
    truth = COCO(str(annotations))
    evaluation = COCOeval_faster(truth, truth.loadRes(str(results)), "bbox")
    evaluation.run()
    return [float(number) for number in evaluation.stats[:12]]


def published(annotations: Path, results: Path) -> list[float]:
    """The twelve of pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = PublishedCOCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(number) for number in evaluation.stats]


def ours(annotations: Path, results: Path) -> list[float]:
    records = DetectionResults().read_file(annotations, results)
    values = box_scores.evaluate(records)
    assert values["AR10"] == box_scores.value(records, "AR10")
    return [values[name] for name in TWELVE]


def small_files(folder: Path, seed: int) -> tuple[Path, Path]:
    """Objects of all sizes, crowds, equal scores, over a hundred boxes of a class on an image."""
    random = np.random.default_rng(seed)
    images = [{"id": n, "file_name": f"{n}.png", "width": 300, "height": 300} for n in (7, 3, 11)]
    objects: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in images:
        for _ in range(14):
            side = random.choice([15.0, 50.0, 130.0]) * random.uniform(0.8, 1.25, 2)
            box = [*random.uniform(0, 150, 2), *side]
            one = {"id": len(objects) + 1, "image_id": image["id"], "bbox": box,
                   "area": side.prod(), "category_id": int(random.choice([2, 5])),
                   "iscrowd": int(random.random() < 0.1)}  # fmt: skip
            objects.append(one)
            for _ in range(int(random.integers(4, 25))):
                near = (np.asarray(box) * random.uniform(0.9, 1.1, 4)).tolist()
                kind = int(random.choice([2, 2, 5, 8]))
                results.append({"image_id": image["id"], "category_id": kind, "bbox": near,
                                "score": round(float(random.random()), 2)})  # fmt: skip
    categories = [{"id": n, "name": str(n)} for n in (2, 5, 8)]
    content = {"images": images, "categories": categories, "annotations": objects}
    paths = folder / "truth.json", folder / "results.json"
    paths[0].write_text(json.dumps(content))
    paths[1].write_text(json.dumps(results))
    counts = np.unique([r["image_id"] * 10 + r["category_id"] for r in results], return_counts=True)
    assert counts[1].max() > 100  # so that the limit has something to leave out
    return paths


@pytest.mark.parametrize("seed", range(3))
def test_twelve_numbers_of_a_small_case(tmp_path: Path, seed: int) -> None:
    files = small_files(tmp_path, seed)
    found = ours(*files)
    assert all(0 < number < 1 for number in found) and len(set(found)) == 12
    assert found == pytest.approx(published(*files), abs=1e-12)
    assert found == pytest.approx(faster(*files), abs=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_twelve_numbers_with_boxes_without_an_area_and_logits_for_scores(
    tmp_path: Path, seed: int
) -> None:
    """What detectors write that clip boxes to the image, some of them the surest of all."""
    annotations, results = small_files(tmp_path, seed)
    whole = ours(annotations, results)
    entries = json.loads(results.read_text())
    random = np.random.default_rng(seed)
    for entry in entries:
        entry["score"] = round(12 * entry["score"] - 6, 1)
        if random.random() < 0.2:
            entry["bbox"][2 + int(random.integers(2))] = 0
            entry["score"] += 3
    results.write_text(json.dumps(entries))
    assert min(one["score"] for one in entries) < 0 and max(one["score"] for one in entries) > 6
    found = ours(annotations, results)
    assert found != whole
    assert found == pytest.approx(published(annotations, results), abs=1e-12)
    assert found == pytest.approx(faster(annotations, results), abs=1e-12)


def test_twelve_numbers_of_a_real_detector(coco_mini: Path) -> None:
    files = (
        coco_mini / "annotations" / "instances_val2017.json",
        coco_mini / "detections" / "nanodet_m_val2017.json",
    )
    found = ours(*files)
    assert found[0] == pytest.approx(0.25305111, abs=1e-8)
    assert found == pytest.approx(published(*files), abs=1e-12)
    assert found == pytest.approx(faster(*files), abs=1e-12)


def test_recalls_have_intervals_and_classes_as_other_numbers(tmp_path: Path) -> None:
    records = DetectionResults().read_file(*small_files(tmp_path, 0))
    for name in ("AR1", "AR_small", "AR_large/5"):
        bounds = box_scores.interval(records, name)
        assert bounds is not None and bounds.low <= bounds.mean <= bounds.high
        assert bounds.mean == box_scores.value(records, name)
    with pytest.raises(UserError, match=r"AR1000.: unknown; .* AR100, .* AR1, AR10, AR_small"):
        box_scores.value(records, "AR1000")
