"""The simulated detector of the embedded scenes: it sees looks and ignores context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd.formats.coco_results import read_detections, read_truth
from kd.scenes import detector as scene_detector


def test_results_are_valid_and_deterministic(small_scenes: Path, tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        flags = ["--scenes", str(small_scenes), "--out", str(tmp_path / name)]
        assert scene_detector.main(flags) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    truth = read_truth(small_scenes / "annotations" / "instances_val.json")
    found = read_detections(tmp_path / "a.json", truth)
    low, sides = found.boxes.xywh[:, :2], found.boxes.xywh[:, 2:]
    assert (low >= 0).all()
    assert (low + sides <= 64.01).all()


def test_detections_list_all_confusable_classes(small_scenes: Path) -> None:
    """Swapping the classes of one look in the truth changes nothing that the detector says."""
    content = json.loads((small_scenes / "annotations" / "instances_train.json").read_text())
    looks = {c["id"]: c["look"] for c in content["categories"]}
    partner = {
        one: other
        for one in looks
        for other in looks
        if one != other and looks[one] == looks[other]
    }
    assert partner  # five looks have two classes
    before = scene_detector.detect(content)
    for annotation in content["annotations"]:
        name = annotation["category_id"]
        annotation["category_id"] = partner.get(name, name)
    assert scene_detector.detect(content) == before
    scores: dict[Any, list[float]] = {}
    for entry in before:
        key = entry["image_id"], tuple(entry["bbox"]), looks[entry["category_id"]]
        scores.setdefault(key, []).append(entry["score"])
    pairs = np.array([pair for pair in scores.values() if len(pair) == 2])
    assert len(pairs) > 10
    assert np.abs(np.log(pairs[:, 0] / pairs[:, 1])).mean() < 1.0  # nearly equal


def test_other_data_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "annotations"
    folder.mkdir()
    (folder / "instances_val.json").write_text('{"categories": [{"id": 1, "name": "a"}]}')
    flags = ["--scenes", str(tmp_path), "--out", str(tmp_path / "r.json")]
    assert scene_detector.main(flags) == 2
    assert "not embedded scenes" in capsys.readouterr().err
