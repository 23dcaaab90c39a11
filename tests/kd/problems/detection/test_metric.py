"""What detectors are scored by: numbers of a results file, ranks, padding, images seen twice."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from kd.errors import UserError
from kd.formats.coco_results import Truth, read_detections, read_truth
from kd.metrics.kitti_ap import KittiTruth
from kd.problems.base import Classes
from kd.problems.detection.evaluation import DetectionResults
from kd.problems.detection.metric import FoundBoxes
from kd.problems.detection.scores import per_class
from kd.problems.detection.task import Detection
from kd.runs.read import read_predictions

ROOT = Path(__file__).resolve().parents[4]
FRAME = 160
# Height and width of the files: one is as large as the frame, others are shown at half, or double.
FILES = [(160, 160), (320, 200), (80, 60), (160, 120), (200, 320)]


def small_truth(folder: Path) -> Truth:
    """Three classes, crowds, areas below the boxes', an image without objects."""
    random = np.random.default_rng(4)
    images = [
        {"id": 40 - 3 * i, "file_name": f"{i}.png", "height": h, "width": w}
        for i, (h, w) in enumerate(FILES)
    ]
    objects: list[dict[str, Any]] = []
    for image in images[:-1]:
        for _ in range(9):
            side = np.array([image["width"], image["height"]]) * random.uniform(0.05, 0.5, 2)
            box = [*(random.uniform(0, 0.5, 2) * [image["width"], image["height"]]), *side]
            one = {"id": len(objects) + 1, "image_id": image["id"], "bbox": box}
            kind = {"category_id": int(random.choice([2, 5])), "iscrowd": len(objects) % 9 == 8}
            objects.append({**one, **kind, "area": 0.7 * side.prod()})
    categories = [{"id": i, "name": n} for i, n in ((2, "cup"), (5, "mug"), (7, "jar"))]
    path = folder / "truth.json"
    content = {"images": images, "categories": categories, "annotations": objects}
    path.write_text(json.dumps(content))
    return read_truth(path)


def asked(truth: Truth) -> tuple[Tensor, dict[str, Tensor]]:
    """Noisy copies of the objects in the frame's pixels, 30 rows an image, the last ones padding.

    The batch has the images in an order of their own.
    """
    random = np.random.default_rng(8)
    order = np.array([3, 0, 4, 1, 2])
    own = truth.sizes[order]
    sizes = np.round(own * FRAME / own.max(axis=1, keepdims=True)).astype(np.int64)
    found = np.zeros((len(order), 30, 6), np.float32)
    for row, image in enumerate(order.tolist()):
        xywh = truth.boxes.xywh[truth.boxes.image == image]
        scale = np.tile(sizes[row][::-1] / own[row][::-1], 2)
        for place in range(25):
            box = np.array([5.0, 5.0, 40.0, 30.0])
            if len(xywh):
                box = xywh[place % len(xywh)] * scale * random.uniform(0.9, 1.1, 4)
            limit = np.tile(sizes[row][::-1], 2)
            corners = np.clip(np.concatenate([box[:2], box[:2] + box[2:]]), 0, limit)
            found[row, place] = [*corners, random.uniform(0.1, 1), random.integers(3)]
    batch = {"image_ids": truth.image_ids[order], "sizes": sizes, "own_sizes": own}
    return torch.from_numpy(found), {name: torch.from_numpy(part) for name, part in batch.items()}


def part(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in batch.items()}


def metric_of(truth: Truth, **more: Any) -> FoundBoxes:
    return FoundBoxes(truth, truth.class_names, **more)


def published(annotated: Path, results: Path) -> list[float]:
    """AP, AP50, AP75, small, medium, large, and AR of 100 at place 8."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotated))
        evaluation = COCOeval(coco, coco.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(one) for one in evaluation.stats]


NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def test_numbers_are_those_of_pycocotools_on_the_file_that_is_written(tmp_path: Path) -> None:
    truth = small_truth(tmp_path)
    found, batch = asked(truth)
    metric = metric_of(truth)
    metric.take(found, batch)
    metric.save_predictions(tmp_path / "run" / "predictions.npz")
    theirs = published(truth.path, tmp_path / "run" / "detections.json")
    values = metric.compute()
    assert 0.1 < values["AP"] < 0.9
    assert [values[name] for name in NAMES] == pytest.approx(theirs[:6], abs=1e-12)
    assert values["AR100"] == pytest.approx(theirs[8], abs=1e-12)
    assert values["count"] == 5
    # Read back, the file is what this package's own reader takes, and the records say the same.
    results = read_detections(tmp_path / "run" / "detections.json", truth)
    records = read_predictions(tmp_path / "run" / "predictions.npz", DetectionResults())
    assert np.array_equal(records["found_boxes"], results.boxes.xywh)
    assert np.array_equal(records["found_scores"], results.scores)
    assert records["found_boxes"].dtype == np.float32
    assert [str(name) for name in records["names"]] == ["cup", "mug", "jar"]
    rows = per_class(metric.records())
    cups, mugs, _ = np.bincount(truth.boxes.label[~truth.boxes.crowd], minlength=3).tolist()
    assert cups < mugs  # no jar is there, and crowds are no objects
    assert [(row.label, row.objects) for row in rows] == [(1, mugs), (0, cups)]
    assert np.mean([row.numbers["AP"] for row in rows]) == pytest.approx(values["AP"])


def test_boxes_go_back_to_the_files_pixels(tmp_path: Path) -> None:
    truth = small_truth(tmp_path)
    metric = metric_of(truth)
    found = torch.zeros(1, 3, 6)
    found[0, 0] = torch.tensor([10.0, 20.0, 40.0, 60.0, 0.9, 1.0])
    found[0, 1] = torch.tensor([0.0, 0.0, 100.01, 160.0, 0.5, 2.0])  # rounding, beyond the image
    batch = {
        "image_ids": torch.tensor([37]),
        "sizes": torch.tensor([[160, 100]]),
        "own_sizes": torch.tensor([[320, 200]]),
    }
    metric.take(found, batch)
    records = metric.records()
    assert records["found_boxes"].tolist() == [[20, 40, 60, 80], [0, 0, 200, 320]]
    assert records["found_labels"].tolist() == [1, 2]
    assert records["image_ids"].tolist() == [37]  # the others were not asked about
    assert len(records["truth_boxes"]) == 9
    # What is taken is copied: a compiled model may write over its output.
    metric = metric_of(truth)
    metric.take(found, batch)
    found.zero_()
    assert len(metric.records()["found_boxes"]) == 2


def test_neither_batches_nor_repetition_change_a_digit(tmp_path: Path) -> None:
    truth = small_truth(tmp_path)
    found, batch = asked(truth)
    whole, parts = metric_of(truth), metric_of(truth)
    whole.take(found, batch)
    for rows in (slice(3, 5), slice(0, 2), slice(1, 4)):
        parts.take(found[rows], part(batch, rows))
    expected, records = whole.records(), parts.records()
    assert expected.keys() == records.keys()
    assert all(np.array_equal(expected[name], records[name]) for name in expected)


def test_a_network_that_finds_nothing_scores_nothing(tmp_path: Path) -> None:
    truth = small_truth(tmp_path)
    _, batch = asked(truth)
    metric = metric_of(truth)
    metric.take(torch.zeros(5, 0, 6), batch)
    values = metric.compute()
    assert values["AP"] == values["AP50"] == values["AR100"] == values["VOC_mAP"] == 0
    metric.save_predictions(tmp_path / "predictions.npz")
    assert json.loads((tmp_path / "detections.json").read_text()) == []
    assert read_predictions(tmp_path / "predictions.npz", DetectionResults())[
        "found_boxes"
    ].shape == (0, 4)


def test_mistakes_are_named(tmp_path: Path) -> None:
    truth = small_truth(tmp_path)
    found, batch = asked(truth)
    with pytest.raises(UserError, match="2 class names for 3 categories"):
        FoundBoxes(truth, ("a", "b"))
    with pytest.raises(UserError, match="1 confusable groups for 3 categories"):
        metric_of(truth, confusable=[None])
    with pytest.raises(ValueError, match=r"detections: \(5, 30, 5\), expected \(5, K, 6\)"):
        metric_of(truth).take(found[..., :5], batch)
    with pytest.raises(UserError, match=r"^runs/x: the annotations have no objects"):
        metric_of(truth, where="runs/x").compute()
    metric = metric_of(truth, where="runs/x")
    metric.take(found, {**batch, "image_ids": batch["image_ids"] + 100})
    with pytest.raises(UserError, match=r"^runs/x: image 128 has no annotations"):
        metric.compute()
    for column, message in ((4, "found_scores"), (2, "found_boxes")):
        broken = found.clone()
        broken[0, 3, column] = torch.nan
        metric = metric_of(truth)
        metric.take(broken, batch)
        where = rf"{message}\[.*\] on image {batch['image_ids'][0]} is not finite"
        with pytest.raises(UserError, match=where):
            metric.compute()
    with pytest.raises(UserError, match="here: the dataset has no annotated boxes"):
        Detection(num_classes=1).metric(Classes(("a",), where="here"))


def test_a_task_gets_it_from_the_classes(tmp_path: Path) -> None:
    truth = small_truth(tmp_path)
    found, batch = asked(truth)
    confusable = ("drink", "drink", None)
    classes = Classes(truth.class_names, None, confusable, truth=lambda: (truth, None))
    metric = Detection(num_classes=3).metric(classes)
    metric.take(found, batch)
    values = metric.compute()
    assert values["confusable_AP50"] == pytest.approx(values["AP50"])  # jars are not there
    assert "KITTI_easy" not in values
    count = len(truth.boxes)
    kitti = KittiTruth(
        truth.boxes,
        np.zeros(count),
        np.zeros(count, np.int64),
        np.zeros(count, np.bool_),
        truth.boxes.crowd,
    )
    metric = Detection(num_classes=3).metric(classes._replace(truth=lambda: (truth, kitti)))
    assert isinstance(metric, FoundBoxes)
    metric.take(found[1:], part(batch, slice(1, 5)))
    assert set(metric.records()["truth_roles"].tolist()) == {0, 2}
    assert 0 < metric.compute()["KITTI_moderate"] < 1


OTHER_RANK = """
import sys, pathlib, torch, torch.distributed as dist
from kd.formats.coco_results import read_truth
from kd.problems.detection.evaluation import DetectionResults
from kd.problems.detection.scores import per_class
from kd.problems.detection.metric import FoundBoxes
folder = pathlib.Path(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=1, world_size=2)
truth = read_truth(folder / "truth.json")
metric = FoundBoxes(truth, truth.class_names)
batch = torch.load(folder / "batch.pt", weights_only=True)
metric.take(batch.pop("found"), batch)
metric.gather()
metric.save_predictions(folder / "rank1.npz")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_hold_the_union(tmp_path: Path) -> None:
    truth = small_truth(tmp_path)
    found, batch = asked(truth)
    expected = metric_of(truth)
    expected.take(found, batch)
    # The third image is on both ranks, as a sampler that pads would give it.
    torch.save({**part(batch, slice(2, 5)), "found": found[2:]}, tmp_path / "batch.pt")
    metric = metric_of(truth)
    metric.take(found[:3], part(batch, slice(0, 3)))
    child = subprocess.Popen([sys.executable, "-c", OTHER_RANK, str(tmp_path)], cwd=ROOT)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=2)
    try:
        metric.gather()
        assert child.wait(timeout=60) == 0
    finally:
        dist.destroy_process_group()
        child.kill()
    there = read_predictions(tmp_path / "rank1.npz", DetectionResults())
    for name, values in expected.records().items():
        assert np.array_equal(metric.records()[name], values)
        assert np.array_equal(there[name], values)


def test_images_of_the_truth_that_were_not_asked_about_do_not_count(tmp_path: Path) -> None:
    truth = small_truth(tmp_path)
    found, batch = asked(truth)
    metric = metric_of(truth)
    metric.take(found[:2], part(batch, slice(0, 2)))
    kept = np.isin(truth.image_ids, batch["image_ids"][:2].numpy())
    content = json.loads(truth.path.read_text())
    ids = set(truth.image_ids[kept].tolist())
    content["images"] = [image for image in content["images"] if image["id"] in ids]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in ids]
    (tmp_path / "two.json").write_text(json.dumps(content))
    alone = metric_of(read_truth(tmp_path / "two.json"))
    alone.take(found[:2], part(batch, slice(0, 2)))
    assert metric.compute() == alone.compute()
