"""What networks cost is measured at the size that their runs were evaluated at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml

from kd.cli import run_command
from kd.compare import main
from kd.errors import UserError
from kd.evaluation.cost import cost_table, measured
from kd.problems import problem
from kd.runs.read import read_distill, read_run
from kd.runs.setup import count_parameters

pytestmark = pytest.mark.slow
TEACHER = {"name": "pspnet", "options": {"trunk": "mobilenet_v2", "width": 0.25, "weights": "no"}}
TASK = {"name": "segmentation"}
STUDENT = {"name": "espnet_c", "options": {}}


@pytest.fixture
def data(small_scenes: Path) -> Mapping[str, object]:
    """The section of tiny scenes, seen at 48 pixels."""
    splits = {
        split: {"annotations": f"annotations/instances_{split}.json", "images": split}
        for split in ("train", "val")
    }
    made = {"train": 24, "val": 8, "size": 64, "seed": 0}
    return {"name": "scenes_maps", "layout": "coco", "root": str(small_scenes), **splits,
            "generate": made, "size": 48, "crop": [32, 32], "workers": 0}  # fmt: skip


def make_run(folder: Path, config: Mapping[str, object], right: int) -> Path:
    """A finished run on two images."""
    folder.mkdir(parents=True)
    confusion = np.zeros((2, 23, 23), np.int64)
    confusion[:, 0, 0], confusion[:, 0, 1] = right, 100 - right
    np.savez(folder / "predictions.npz", image_ids=np.arange(2), confusion=confusion)
    (folder / "summary.json").write_text("{}")
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    return folder


def distillation(folder: Path, data: Mapping[str, object], student: Mapping[str, object]) -> Path:
    """Two seeds of two variants."""
    for seed in (0, 1):
        for variant, right in (("plain", 50), ("all", 70)):
            config = {
                "data": data,
                "task": TASK,
                "student": student,
                "variant": variant,
                "seed": seed,
            }
            make_run(folder / f"seed{seed}" / variant, config, right + 10 * seed)
    return folder


def test_every_variant_and_the_teacher_become_points(
    tmp_path: Path, data: Mapping[str, object]
) -> None:
    student = distillation(tmp_path / "espnet", data, STUDENT)
    teacher = make_run(tmp_path / "teacher", {"data": data, "task": TASK, "teacher": TEACHER}, 90)
    costs = measured([read_distill(student)], [read_run(teacher)])
    assert [(cost.name, cost.variant, cost.kind) for cost in costs] == [
        ("espnet_c", "plain", "plain"), ("espnet_c", "all", "distilled"),
        ("pspnet_mobilenet_v2", "teacher", "teacher"),
    ]  # fmt: skip
    plain, taught, above = costs
    assert {cost.sides for cost in costs} == {(48, 48)}
    expected = count_parameters(
        problem("segmentation").named_student("espnet_c", {}, num_classes=23)
    )
    assert plain.parameters == taught.parameters == expected != above.parameters
    assert plain.latency == taught.latency > 0 and plain.multiply_adds > 1e6
    assert plain.mean_iou == pytest.approx((50 / 100 + 60 / 100) / 4)  # of two classes, one at 0
    assert above.mean_iou == pytest.approx(0.45)
    rows = cost_table(costs).groups[0]
    assert sorted(row[:3] for row in rows) == [
        ("espnet_c", "all", "48 x 48"), ("espnet_c", "plain", "48 x 48"),
        ("pspnet_mobilenet_v2", "teacher", "48 x 48"),
    ]  # fmt: skip


def test_networks_of_one_name_are_called_by_their_folders(
    tmp_path: Path, data: Mapping[str, object]
) -> None:
    light = {"name": "pspnet", "options": {"trunk": "mobilenet_v2", "width": 0.25}}
    student = distillation(tmp_path / "small", data, light)
    teacher = make_run(tmp_path / "large", {"data": data, "task": TASK, "teacher": TEACHER}, 90)
    variant = read_run(student / "seed0" / "plain")
    costs = measured([read_distill(student)], [variant, read_run(teacher)])
    assert [cost.name for cost in costs] == ["small", "small", "small", "large"]


def test_the_command_draws_and_prints_them(
    tmp_path: Path, data: Mapping[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    student = distillation(tmp_path / "espnet", data, STUDENT)
    figure = tmp_path / "cost.png"
    assert main([str(student), "--cost", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert "all - plain" in printed and "multiply-adds (G)" in printed
    assert figure.stat().st_size > 5000


def test_runs_about_objects_or_other_images_are_refused(
    tmp_path: Path, data: Mapping[str, object], small_teacher: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run_command(main, [str(small_teacher), "--cost", str(tmp_path / "x.png")]) == 2
    assert "predicts objects; --cost is for label maps" in capsys.readouterr().err
    teacher = make_run(tmp_path / "teacher", {"data": data, "task": TASK, "teacher": TEACHER}, 90)
    other = make_run(tmp_path / "other", {"data": data, "task": TASK, "teacher": TEACHER}, 90)
    confusion = np.ones((2, 23, 23), np.int64)
    np.savez(other / "predictions.npz", image_ids=np.arange(2), confusion=confusion)
    with pytest.raises(UserError, match="different label maps for 2 images"):
        measured([], [read_run(teacher), read_run(other)])
