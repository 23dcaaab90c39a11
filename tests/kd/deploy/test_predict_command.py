"""kd.predict writes COCO files, maps and drawings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from kd import evaluate, predict
from kd.errors import UserError

pytestmark = pytest.mark.slow


def truth_of(students: dict[str, Path], problem: str) -> Path:
    [path] = (students[problem].parent / "data" / problem).rglob("instances_val.json")
    return path


def test_detections_are_a_coco_file_and_can_be_scored(
    students: dict[str, Path], val_images: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    truth = truth_of(students, "detection")
    command = [str(students["detection"]), str(val_images["detection"]), "--out", str(tmp_path)]
    assert predict.main([*command, "--annotations", str(truth), "--overlays", "2"]) == 0
    assert str(tmp_path / "predictions.json") in capsys.readouterr().out
    read = COCO(str(tmp_path / "predictions.json"))
    assert len(read.getImgIds()) == 8 and len(read.getAnnIds()) > 0
    results = json.loads((tmp_path / "results.json").read_text())
    loaded = COCO(str(truth)).loadRes(str(tmp_path / "results.json"))
    assert len(loaded.getAnnIds()) == len(results)
    assert evaluate.main([str(tmp_path / "results.json"), "--annotations", str(truth)]) == 0
    scored = capsys.readouterr().out
    summary = json.loads((students["detection"] / "seed0/plain/summary.json").read_text())
    assert f"{100 * summary['AP']:.1f}" in scored
    assert len(list((tmp_path / "overlays").glob("*.png"))) == 2


def test_a_classifier_takes_its_boxes_from_the_annotations(
    students: dict[str, Path], val_images: dict[str, Path], tmp_path: Path
) -> None:
    truth = truth_of(students, "objects")
    command = [str(students["objects"]), str(val_images["objects"]), "--out", str(tmp_path)]
    with pytest.raises(UserError, match=r"--annotations COCO\.json"):
        predict.main(command)
    assert predict.main([*command, "--annotations", str(truth), "--overlays", "0"]) == 0
    predicted = json.loads((tmp_path / "predictions.json").read_text())["annotations"]
    true = json.loads(truth.read_text())["annotations"]
    key = lambda one: (one["image_id"], *np.round(one["bbox"], 1).tolist())  # noqa: E731
    assert sorted(map(key, predicted)) == sorted(map(key, true))
    assert not (tmp_path / "overlays").exists()


def test_maps_have_the_size_of_their_image(
    students: dict[str, Path], val_images: dict[str, Path], tmp_path: Path
) -> None:
    with Image.open(next(val_images["segmentation"].glob("*.png"))) as image:
        image.resize((90, 50)).save(tmp_path / "wide.png")
    for problem in ("segmentation", "saliency"):
        out = tmp_path / problem
        command = [str(students[problem]), str(tmp_path / "wide.png"), "--out", str(out)]
        assert predict.main(command) == 0
        with Image.open(out / "maps" / "wide.png") as written:
            assert written.size == (90, 50)
        assert not (out / "predictions.json").exists()


def test_what_is_missing_is_named(students: dict[str, Path], tmp_path: Path) -> None:
    run = str(students["detection"])
    with pytest.raises(UserError, match="no such image or folder"):
        predict.main([run, str(tmp_path / "none.jpg")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image in this folder"):
        predict.main([run, str(tmp_path / "empty")])
    Image.new("RGB", (20, 20)).save(tmp_path / "other.png")
    truth = str(truth_of(students, "detection"))
    with pytest.raises(UserError, match=r"other\.png: not in .*instances_val.json"):
        predict.main([run, str(tmp_path / "other.png"), "--annotations", truth])
