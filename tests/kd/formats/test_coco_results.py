"""Results files: read as they are, refused by file and entry, written with new scores alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd.errors import UserError
from kd.formats.coco_results import read_detections, read_truth, write_detections

GOOD = {"image_id": 1, "category_id": 3, "bbox": [1.0, 2.0, 10.0, 8.0], "score": 0.5}


def truth_file(tiny_coco: Callable[..., Path]) -> Path:
    """Images 1 to 4, categories 1, 3, 7, 18."""
    return tiny_coco(splits=("train2017",)) / "annotations" / "instances_train2017.json"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 77}, "image_id 77 is not in"),
        ({"category_id": 2}, "category_id 2 is not in"),
        ({"category_id": "ball"}, "category_id 'ball' is not in"),
        ({"score": float("nan")}, "score is nan"),
        ({"score": float("inf")}, "score is inf"),
        ({"score": None}, "score is None"),
        ({"bbox": [1, 2, 3]}, "expected 4 finite numbers"),
        ({"bbox": [1, 2, 5, -1e-9]}, "has a negative side"),
        ({"bbox": [1, 2, -3, 5]}, "has a negative side"),
        ({"bbox": [1, 2, 0, float("nan")]}, "expected 4 finite numbers"),
        ({"bbox": [1, 2, float("inf"), 5]}, "expected 4 finite numbers"),
    ],
)
def test_a_bad_entry_is_reported(
    tmp_path: Path, tiny_coco: Callable[..., Path], change: dict[str, Any], words: str
) -> None:
    truth = read_truth(truth_file(tiny_coco))
    path = tmp_path / "results.json"
    path.write_text(json.dumps([GOOD, {**GOOD, **change}]))
    with pytest.raises(UserError, match=r"results\.json: result 1: ") as caught:
        read_detections(path, truth)
    assert words in str(caught.value)


def test_many_mistakes_are_counted_and_a_few_listed(
    tmp_path: Path, tiny_coco: Callable[..., Path]
) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{**GOOD, "image_id": 50 + i} for i in range(8)]))
    with pytest.raises(UserError) as caught:
        read_detections(path, read_truth(truth_file(tiny_coco)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert lines[-1] == "... and 3 more"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "is empty"),
        ('{"images": []}', "not COCO results"),
        ("[3]", "expected an object"),
        ('[{"image_id": 1}]', "no 'category_id'"),
        ('[{"image_id": 1', "cut off"),
    ],
)
def test_a_file_without_results_is_rejected(
    tmp_path: Path, tiny_coco: Callable[..., Path], text: str, words: str
) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_detections(path, read_truth(truth_file(tiny_coco)))


def test_arrays_follow_the_file(tmp_path: Path, tiny_coco: Callable[..., Path]) -> None:
    truth = read_truth(truth_file(tiny_coco))
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{**GOOD, "image_id": 4, "category_id": 18}, GOOD]))
    found = read_detections(path, truth)
    assert truth.image_ids.tolist() == [1, 2, 3, 4]
    assert found.boxes.image.tolist() == [3, 0]
    assert found.boxes.label.tolist() == [3, 1]  # 0..C-1 by ascending category id
    assert found.boxes.areas.tolist() == [80.0, 80.0]


def test_boxes_without_an_area_stay_and_are_counted_once(
    tmp_path: Path, tiny_coco: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    truth = read_truth(truth_file(tiny_coco))
    path = tmp_path / "results.json"
    flat = [{**GOOD, "bbox": box} for box in ([0, 2, 0, 5], [1, 2, 3, 0.0], [1, 2, 0, 0])]
    path.write_text(json.dumps([GOOD, *flat]))
    with caplog.at_level(logging.WARNING, logger="kd"):
        found = read_detections(path, truth)
    assert found.boxes.areas.tolist() == [80.0, 0.0, 0.0, 0.0]
    (said,) = caplog.messages
    assert said.startswith(f"{path}: 3 of 4 results have a box without an area")
    caplog.clear()
    path.write_text(json.dumps([GOOD]))
    read_detections(path, truth)
    assert not caplog.messages


def test_scores_are_any_numbers_unless_probabilities_are_needed(
    tmp_path: Path, tiny_coco: Callable[..., Path]
) -> None:
    truth = read_truth(truth_file(tiny_coco))
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{**GOOD, "score": score} for score in (0, 1, 7.5, -2)]))
    assert read_detections(path, truth).scores.tolist() == [0, 1, 7.5, -2]
    with pytest.raises(UserError) as caught:
        read_detections(path, truth, probabilities=True)
    first, second = str(caught.value).splitlines()
    assert "result 2: score is 7.5, expected a probability" in first and "result 3" in second


def test_rescoring_changes_only_scores(tmp_path: Path, tiny_coco: Callable[..., Path]) -> None:
    truth = read_truth(truth_file(tiny_coco))
    entries = [{**GOOD, "score": 0.1 + 0.2, "note": "kept"}, {**GOOD, "image_id": 2}]
    (tmp_path / "in.json").write_text(json.dumps(entries))
    found = read_detections(tmp_path / "in.json", truth)
    write_detections(tmp_path / "out.json", found.entries, [found.scores[0].item(), 0.25])
    again = json.loads((tmp_path / "out.json").read_text())
    assert again == [entries[0], {**entries[1], "score": 0.25}]
    assert [list(entry) for entry in again] == [list(entry) for entry in entries]


def test_crowds_stay_for_evaluation(tmp_path: Path, tiny_coco: Callable[..., Path]) -> None:
    path = truth_file(tiny_coco)
    content = json.loads(path.read_text())
    content["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    boxes = read_truth(path).boxes
    assert np.flatnonzero(boxes.crowd).tolist() == [0]
    assert len(boxes) == len(content["annotations"])
