"""Detectors' answers from run folders and results files to tables, figures and images."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from kd import compare, evaluate
from kd.errors import UserError
from kd.evaluation.predict import results_files
from kd.evaluation.write import stored_records
from kd.formats.coco import load_coco
from kd.metrics.records import Records, save_records
from kd.problems.detection.evaluation import DetectionResults
from kd.problems.detection.scores import VOC
from kd.runs.read import read_predictions

DETECTIONS = DetectionResults()


def results_of(root: Path, file: Path, *, off: float, seed: int = 0) -> Path:
    """Results on the tiny dataset's val split: its objects, moved by `off` of their sides."""
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    random = np.random.default_rng(seed)
    entries = []
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        for _ in range(3):
            shift = random.uniform(-off, off, 2) * [w, h]
            box = [x + shift[0], y + shift[1], w, h]
            found = {"image_id": entry["image_id"], "category_id": entry["category_id"]}
            entries.append({**found, "bbox": box, "score": float(random.random())})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entries))
    return file


@pytest.fixture
def data(tiny_coco: Callable[..., Path]) -> Path:
    return tiny_coco(images=6)


def records_of(root: Path, *, off: float, seed: int = 0) -> Records:
    file = results_of(root, root / f"{off}-{seed}.json", off=off, seed=seed)
    return DETECTIONS.read_file(root / "annotations" / "instances_val2017.json", file)


def run_folder(folder: Path, records: Records, root: Path) -> Path:
    """A finished run of a detector, as its training leaves it."""
    folder.mkdir(parents=True)
    splits = {
        split: {"annotations": f"annotations/instances_{split}2017.json", "images": f"{split}2017"}
        for split in ("train", "val")
    }
    config = {
        "data": {"name": "tiny", "root": str(root), **splits},
        "task": {"name": "detection"},
        "train": {},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "classes.json").write_text(json.dumps({"names": ["ball", "box", "tent", "kite"]}))
    save_records(records, folder / "predictions.npz", compressed=True)
    (folder / "summary.json").write_text(json.dumps({"steps": 3}))
    return folder


def test_a_results_file_is_evaluated_by_the_command(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = results_of(data, tmp_path / "results.json", off=0.2), tmp_path / "out"
    annotations = data / "annotations" / "instances_val2017.json"
    flags = ["--annotations", str(annotations), "--per-class", "--out", str(out)]
    assert evaluate.main([str(file), *flags]) == 0
    said = capsys.readouterr().out
    objects = len(json.loads(annotations.read_text())["annotations"])
    assert f"instances_val2017: {objects} objects in 6 images" in said
    assert "AP50 (%)" in said and "AP (%) by size" in said and "By class" in said
    numbers = json.loads((out / "metrics.json").read_text())
    known = DETECTIONS.value(DETECTIONS.read_file(annotations, file), "AP75")
    run = numbers["runs"]["results"]
    assert run["AP75"] == known and run["intervals"]["AP"][0] < run["AP"]
    assert {row["name"] for row in run["classes"]} <= {"ball", "box", "tent", "kite"}
    assert set(VOC) <= run.keys()
    assert "| AP50 (%) |" in (out / "table.md").read_text()
    for name in ("class_ap.png", "size_ap.png"):
        with Image.open(out / name) as image:
            assert image.size[0] > 500


def test_of_a_results_file_nothing_is_written_unless_a_folder_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert "default: RUN/evaluation; none with --all or --annotations" in help_text
    own = tmp_path / "own"
    file = results_of(data, own / "results.json", off=0.2)
    monkeypatch.chdir(own)
    annotations = data / "annotations" / "instances_val2017.json"
    assert evaluate.main([file.name, "--annotations", str(annotations)]) == 0
    assert "AP50 (%)" in capsys.readouterr().out
    assert list(own.iterdir()) == [file]


def test_several_results_files_stand_side_by_side(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = results_of(data, tmp_path / "good.json", off=0.02)
    bad = results_of(data, tmp_path / "bad.json", off=0.4)
    annotations = data / "annotations" / "instances_val2017.json"
    assert evaluate.main([str(good), str(bad), "--annotations", str(annotations)]) == 0
    lines = capsys.readouterr().out.splitlines()
    good_ap, bad_ap = (
        float(next(line for line in lines if line.startswith(name)).split()[1])
        for name in ("good", "bad")
    )
    assert good_ap > bad_ap
    both = results_files(annotations, [good, bad])
    assert both.class_table().header == ("class", "objects", "good", "bad")
    with pytest.raises(UserError, match="the same results twice"):
        results_files(annotations, [good, good])
    with pytest.raises(UserError, match=r"bad\.json: not COCO results"):
        bad.write_text("{}")
        results_files(annotations, [bad])


def test_runs_are_compared_without_their_data(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "moved"
    for seed in (0, 1):
        for variant, off in (("plain", 0.35), ("distilled", 0.05)):
            place = tmp_path / "run" / f"seed{seed}" / variant
            run_folder(place, records_of(data, off=off, seed=seed), nowhere)
    figure = tmp_path / "bars.png"
    flags = ["--metrics", "AP,AP50,AP/ball", "--figure", str(figure)]
    assert compare.main([str(tmp_path / "run"), *flags]) == 0
    said = capsys.readouterr().out
    assert "AP/ball (%), seed 1" in said and figure.is_file()
    single = [str(tmp_path / "run" / "seed0" / variant) for variant in ("plain", "distilled")]
    assert compare.main(single) == 0
    said = capsys.readouterr().out
    assert " objects in 6 images" in said.splitlines()[0] and "AP_small (%)" in said
    assert "confusable" not in said and "KITTI" not in said
    assert evaluate.main(["--all", *single, "--out", str(tmp_path / "both")]) == 0
    assert "tiny val: " in capsys.readouterr().out
    numbers = json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert numbers["runs"]["distilled"]["AP"] > numbers["runs"]["plain"]["AP"]


def test_one_run_has_its_class_table_in_full(data: Path) -> None:
    records = records_of(data, off=0.1)
    evaluation = DETECTIONS.evaluation("title", {"run": records}, {"name": "tiny"})
    table = evaluation.class_table()
    assert table.header[:4] == ("class", "objects", "AP", "95 % interval")
    support = np.bincount(records["truth_labels"], minlength=4)
    assert [int(row[1]) for row in table.groups[0]] == sorted(support[support > 0].tolist())[::-1]
    assert [table.title for table in evaluation.all_tables()] == [
        "title", "AP (%) by size", "By class"]  # fmt: skip


def test_predictions_keep_their_own_class_names_unless_the_run_has_others(
    data: Path, tmp_path: Path
) -> None:
    records = records_of(data, off=0.1)
    folder = run_folder(tmp_path / "run", records, data)
    read = read_predictions(folder / "predictions.npz", DETECTIONS)
    assert all(np.array_equal(read[name], part) for name, part in records.items())
    other = read_predictions(folder / "predictions.npz", DETECTIONS, ["a", "b", "c", "d"])
    assert other["names"].tolist() == ["a", "b", "c", "d"]
    broken = {**records, "found_labels": records["found_labels"] + 9}
    save_records(broken, folder / "predictions.npz")
    with pytest.raises(UserError, match=r"predictions\.npz: found_labels\[0\] is \d+, expected 0"):
        read_predictions(folder / "predictions.npz", DETECTIONS)


def test_images_show_every_run_that_saw_them(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = load_coco(data / "annotations" / "instances_val2017.json", data / "val2017")
    folders = {
        name: run_folder(tmp_path / name, records_of(data, off=off), data)
        for name, off in (("plain", 0.3), ("distilled", 0.1))
    }
    other = dict(records_of(data, off=0.1))
    other["image_ids"] = other["image_ids"] + 1
    folders["teacher"] = run_folder(tmp_path / "teacher", other, data)
    with caplog.at_level(logging.WARNING):
        runs = stored_records(folders, DETECTIONS)
    assert list(runs) == ["plain", "distilled"]
    assert "not drawn: " in caplog.text and "teacher" in caplog.text
    dataset: Any = SimpleNamespace(val=index)
    unused: Any = None
    drawn = DETECTIONS.draw(dataset, {}, runs, count=2, accelerator=unused)
    titles = [[axes.get_title().split(",")[0] for axes in figure.axes] for figure in drawn]
    assert titles == [["truth", "plain", "distilled"]] * 2
    with pytest.raises(UserError, match="no such file"):
        stored_records({"plain": tmp_path / "none"}, DETECTIONS)
