"""Detectors through the commands: the embedded scenes, tiny runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd import distill, evaluate, train_teacher
from kd.errors import UserError

pytestmark = pytest.mark.slow

SMALL = (
    "options={trunk: resnet18, width: 0.25, levels: [2, 3], channels: 16, scales: [2.0], "
    "canonical: 32.0, hidden: 32, region_size: 3, candidates: [50, 50], proposals: [40, 20], "
    "sampled_anchors: 32, sampled_regions: 32, least_score: 0.0}"
)
ARMS = {"plain", "F", "G", "I", "D", "ID"}
TRAIN = "train={epochs: 1, batch_size: 8, pictures: 2, precision: fp32, evaluate_every: 0}"


def flags(settings: list[str]) -> list[str]:
    return [text for setting in settings for text in ("--set", setting)]


@pytest.fixture(scope="module")
def scenes(small_scenes: Path) -> list[str]:
    return [
        f"data.root={small_scenes}",
        "data.generate={train: 24, val: 8, size: 64, seed: 0}",
        "data.workers=0",
        TRAIN,
    ]


@pytest.fixture(scope="module")
def finder(scenes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Faster R-CNN trained for three steps."""
    out = tmp_path_factory.mktemp("boxes") / "teacher"
    given = flags([*scenes, f"teacher.{SMALL}"])
    command = ["--teacher", "fasterrcnn_resnet50", "--data", "scenes", *given, "--out", str(out)]
    assert train_teacher.main(command) == 0
    return out


def test_a_teacher_is_scored_as_pycocotools_scores_its_results(
    finder: Path, small_scenes: Path
) -> None:
    summary = json.loads((finder / "summary.json").read_text())
    truth = COCO(small_scenes / "annotations" / "instances_val.json")
    scored = COCOeval(truth, truth.loadRes(str(finder / "detections.json")), "bbox")
    scored.evaluate()
    scored.accumulate()
    scored.summarize()
    for name, place in (("AP", 0), ("AP50", 1), ("AP75", 2)):
        assert summary[name] == pytest.approx(scored.stats[place], abs=1e-6)


def test_an_ablation_fills_one_table_and_draws_boxes_and_masks(
    scenes: list[str], finder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "students"
    given = flags([*scenes, f"student.{SMALL}", "seeds=[0]"])
    command = ["--student", "fasterrcnn_resnet18", "--data", "scenes", "--teacher", str(finder),
               "--ablation", "imitation", *given, "--out", str(out)]  # fmt: skip
    assert distill.main(command) == 0
    assert {path.parent.name for path in out.glob("seed0/*/summary.json")} == ARMS
    assert "AP50 (%)" in (out / "table.md").read_text()
    for name in ("overlays/0.png", "overlays/1.png", "masks/0.png", "masks/1.png"):
        assert (out / name).is_file()
    curves = (out / "seed0" / "ID" / "metrics.jsonl").read_text()
    for term in ("near_0", "object_logits", "object_boxes", "objectness"):
        assert f'"loss/{term}"' in curves
    assert '"loss/near_0"' not in (out / "seed0" / "G" / "metrics.jsonl").read_text()
    # Asked again, a student answers as it did.
    run = out / "seed0" / "ID"
    assert evaluate.main([str(run)]) == 0
    again = json.loads((run / "evaluation" / "metrics.json").read_text())["runs"]
    (numbers,) = again.values()
    assert numbers["AP"] == pytest.approx(json.loads((run / "summary.json").read_text())["AP"])
    assert (run / "evaluation" / "boxes_0.png").is_file()


def test_stored_answers_of_a_detector_are_refused(scenes: list[str], finder: Path) -> None:
    given = flags([*scenes, f"student.{SMALL}", "soft_targets.kind=stored"])
    command = ["--student", "fasterrcnn_resnet18", "--data", "scenes", "--teacher", str(finder)]
    with pytest.raises(UserError, match=r"taught in each step; --set soft_targets\.kind=live"):
        distill.main([*command, *given])
