"""The out-of-context command: its sets from end to end, what they hold, and its messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scipy import ndimage

from kd.cli import run_command
from kd.context.pasting import PasteOptions
from kd.context.pasting.cutout import REACH
from kd.context.pasting.make import open_set
from kd.context.pasting.seams import area_under_roc, seam_features, separability
from kd.context.pasting.write import FIRST_CONTEXT_ID, SETS, moved_annotation, occluded
from kd.errors import UserError
from kd.evaluation.out_of_context import METRICS, report_detections, report_runs
from kd.formats.coco import load_coco
from kd.formats.rle import encode
from kd.out_of_context import main
from kd.problems.objects.data import ObjectSamples

COUNT = 20


def make(out: Path, data: list[str], *more: str) -> int:
    flags = ["--split", "train", "--margin", "0.05", "--count", str(COUNT), *data, *more]
    return run_command(main, ["make", "--data", "scenes", *flags, "--out", str(out)])


@pytest.fixture(scope="module")
def made(small_data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pastes") / "set"
    assert make(out, small_data) == 0
    return out


def content(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (folder / "annotations" / f"instances_{name}.json").read_text()
    )
    return found


def scored(folder: Path, name: str) -> list[dict[str, Any]]:
    return [entry for entry in content(folder, name)["annotations"] if entry["scored"]]


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path).convert("RGB"))


def test_both_sets_have_the_same_objects_and_the_same_scenes(made: Path) -> None:
    about = json.loads((made / "out_of_context.json").read_text())
    inside, outside, home = (scored(made, name) for name in SETS)
    assert 10 <= len(inside) == about["pairs"] <= COUNT
    scenes = [sorted(entry["paste"]["target_image"] for entry in e) for e in (inside, outside)]
    assert scenes[0] == scenes[1]
    for one, other, own in zip(inside, outside, home, strict=True):
        assert one["id"] == other["id"] == own["id"] == one["image_id"]
        assert one["category_id"] == other["category_id"] == own["category_id"]
        assert one["bbox"][1:] == pytest.approx(other["bbox"][1:])  # size and height
        assert one["area"] == other["area"] == own["area"]
        for key in ("source_image", "source_object", "pair"):
            assert one["paste"][key] == other["paste"][key]
        assert other["paste"]["log_lift"] <= -0.05 < 0.05 <= one["paste"]["log_lift"]
        assert other["paste"]["log_prob"] < one["paste"]["log_prob"] <= 0
        places = {e["paste"][k] for e in (one, other) for k in ("source_image", "target_image")}
        assert len(places) == 3
    lifts = {name: [e["paste"]["log_lift"] for e in scored(made, name)] for name in ("in", "out")}
    assert about["mean_log_lift"]["in"] == pytest.approx(np.mean(lifts["in"]), abs=1e-3)


def test_a_paste_changes_only_pixels_near_the_object(made: Path, small_scenes: Path) -> None:
    original = json.loads((small_scenes / "annotations" / "instances_train.json").read_text())
    files = {image["id"]: image["file_name"] for image in original["images"]}
    for name in ("in", "out"):
        index = open_set(made, name)
        for entry in scored(made, name):
            image = pixels(made / name / f"{entry['id']:06d}.png")
            scene = pixels(small_scenes / "train" / files[entry["paste"]["target_image"]])
            row = int(np.flatnonzero(index.object_ids == entry["id"])[0])
            mask = index.mask_of(row, image.shape[:2])
            far = ndimage.distance_transform_edt(~mask) > 1 + REACH * np.sqrt(2)
            assert np.array_equal(image[far], scene[far])
            assert (image[mask] != scene[mask]).any()
    for entry in scored(made, "original"):
        paste = next(e for e in scored(made, "in") if e["id"] == entry["id"])["paste"]
        source = pixels(small_scenes / "train" / files[paste["source_image"]])
        assert np.array_equal(pixels(made / "original" / f"{entry['id']:06d}.png"), source)


def test_pycocotools_reads_the_annotations(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in SETS:
        coco = COCO(str(made / "annotations" / f"instances_{name}.json"))
        assert set(coco.anns) == {e["id"] for e in scored(made, name)} | {
            FIRST_CONTEXT_ID + n for n in range(len(coco.anns) - len(scored(made, name)))
        }
        for image in coco.imgs:
            (own,) = [a for a in coco.imgToAnns[image] if a["scored"]]
            mask = coco.annToMask(own).astype(bool)
            x, y, width, height = own["bbox"]
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            assert rows[0] >= y - 1 and rows[-1] <= y + height
            assert columns[0] >= x - 1 and columns[-1] <= x + width
            if name == "original":
                continue
            for other in coco.imgToAnns[image]:
                if other is not own and isinstance(other["segmentation"], dict):
                    seen = coco.annToMask(other).astype(bool)
                    assert (
                        other["area"] == seen.sum() and not (seen & mask).sum() > 0.1 * seen.sum()
                    )


def test_only_the_pasted_object_is_scored(made: Path) -> None:
    index = open_set(made, "out")
    dataset = ObjectSamples(index, size=64, mode="all", train=False, min_fraction=0, max_fraction=1)
    assert len(dataset) == len(scored(made, "out"))
    for position in range(len(dataset)):
        sample = dataset[0, position]
        assert sample["hidden"].tolist() == sample["usable"].nonzero()[:, 0].tolist()
        assert sample["object_ids"][sample["hidden"]].tolist() == [int(sample["image_ids"])]
        assert len(sample["labels"]) > 1  # its context is there


def test_without_the_key_every_object_is_scored(small_scenes: Path) -> None:
    index = load_coco(small_scenes / "annotations" / "instances_val.json", small_scenes / "val")
    assert index.scored is None


def test_the_same_seed_makes_the_same_bytes(
    made: Path, small_data: list[str], tmp_path: Path
) -> None:
    assert make(tmp_path / "again", small_data) == 0
    files = sorted(p.relative_to(made) for p in made.rglob("*") if p.suffix in (".png", ".json"))
    files = [file for file in files if "kdindex" not in str(file) and file.name != "pairs.png"]
    assert len(files) > 3 * 10
    assert all((tmp_path / "again" / f).read_bytes() == (made / f).read_bytes() for f in files)


def test_a_folder_in_use_is_not_overwritten(
    made: Path, small_data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (made / "out_of_context.json").read_bytes()
    assert make(made, small_data) == 2
    assert "already exists; choose another --out" in capsys.readouterr().err
    assert (made / "out_of_context.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--margin", "50"], "0 of 30 objects have both a probable and an improbable scene"),
        (["--min-fraction", "0.2"], "change --min-fraction or --max-fraction"),
        (["--min-fraction", "0.3", "--max-fraction", "0.2"], "--min-fraction 0.3 must be below"),
        (["--harmony", "2"], "--harmony: got 2.0, expected 0 to 1"),
        (["--count", "0"], "--count must be at least 1"),
    ],
)
def test_impossible_options_are_rejected(
    flags: list[str],
    message: str,
    small_data: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert make(tmp_path / "set", small_data, *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "set").exists() and not list(tmp_path.glob(".set*"))


def test_data_without_outlines_is_refused(
    tiny_coco: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tiny_coco()
    file = root / "annotations" / "instances_val2017.json"
    stripped = json.loads(file.read_text())
    for entry in stripped["annotations"]:
        del entry["segmentation"]
    file.write_text(json.dumps(stripped))
    flags = ["--data", "coco_mini", "--set", f"data.root={root}", "--out", str(tmp_path / "set")]
    assert run_command(main, ["make", *flags]) == 2
    assert "no object has a segmentation" in capsys.readouterr().err


def test_an_annotation_moves_with_its_object() -> None:
    entry = {"bbox": [10, 20, 30, 40], "area": 900, "iscrowd": 0,
             "segmentation": [[10, 20, 40, 20, 40, 60]], "id": 5}  # fmt: skip
    moved = moved_annotation(entry, 0.5, (7, -3), np.zeros((9, 9), np.bool_))
    assert moved["bbox"] == [12, 7, 15, 20] and moved["area"] == 225
    assert moved["segmentation"] == [[12, 7, 27, 7, 27, 27]] and moved["id"] == 5
    assert entry["bbox"] == [10, 20, 30, 40]


def test_occluded_objects_lose_the_covered_part() -> None:
    mask = np.zeros((20, 30), np.bool_)
    mask[:, :10] = True
    square = {"segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]], "bbox": [5, 5, 10, 10], "area": 100}
    left = occluded(square, mask)
    assert left is not None
    assert left["bbox"] == [10, 5, 5, 10] and left["area"] == 50
    assert occluded(square, mask & False) is square
    assert occluded({**square, "segmentation": encode(mask)}, mask) is None
    assert occluded({"bbox": [0, 0, 3, 3]}, mask) == {"bbox": [0, 0, 3, 3]}


def results(folder: Path, name: str, wrong: int, missed: int) -> Path:
    """Detections of the scored objects: some misnamed, some nowhere, and surer ones elsewhere."""
    entries = []
    for place, entry in enumerate(scored(folder, name)):
        category = entry["category_id"]
        if place >= missed:
            named = category % 22 + 1 if place < missed + wrong else category
            box = entry["bbox"]
            entries.append({"image_id": entry["image_id"], "category_id": named, "bbox": box,
                            "score": 0.6})  # fmt: skip
            less_sure = {**entries[-1], "category_id": (named + 3) % 22 + 1, "score": 0.5}
            entries.append(less_sure)
        far = {"image_id": entry["image_id"], "category_id": category, "bbox": [0, 0, 2, 2],
               "score": 0.9}  # fmt: skip
        entries.append(far)
    path = folder.parent / f"{name}.json"
    path.write_text(json.dumps(entries))
    return path


def test_a_detector_is_scored_on_the_pasted_boxes_alone(made: Path) -> None:
    count = len(scored(made, "in"))
    files = results(made, "in", wrong=0, missed=0), results(made, "out", wrong=3, missed=2)
    table = report_detections(made, *files)
    (found, named) = table.groups[0]
    assert found[1:3] == (f"{100 * (count - 2) / count:.1f}", "100.0")
    assert named[1:3] == (f"{100 * (count - 5) / count:.1f}", "100.0")
    assert found[3].startswith(f"+{100 * 2 / count:.1f} [")
    with pytest.raises(UserError, match="result 0: image_id 99 is not in"):
        entry = {"image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}
        files[0].write_text(json.dumps([entry]))
        report_detections(made, *files)


@pytest.mark.slow
def test_a_teacher_is_evaluated_on_all_three_sets(made: Path, small_teacher: Path) -> None:
    (table,) = report_runs(made, [small_teacher], [], variants=None)
    assert table.header == ("metric", "out", "in", "in - out", "original", "original - out",
                            "class prior")  # fmt: skip
    values = {(c.metric.name, c.variant): c for c in table.comparisons}
    assert {metric for metric, _ in values} == set(METRICS)
    inside, outside = values["nll", "in"], values["nll", "out"]
    assert inside.difference is not None
    assert inside.difference.mean == pytest.approx(inside.mean - outside.mean)


def test_the_error_for_another_folder_says_how_to_create_a_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, ["check", str(tmp_path)]) == 2
    assert "out_of_context make --data NAME --out" in capsys.readouterr().err
    assert run_command(main, ["report", str(tmp_path)]) == 2
    assert "expected runs (--runs)" in capsys.readouterr().err


def test_check_prints_the_auc_of_each_pair(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["check", str(made)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [
        "in vs. out", "original vs. in", "original vs. out"
    ]  # fmt: skip


def test_the_area_under_the_curve_by_hand() -> None:
    truth = np.array([0, 0, 1, 1.0])
    assert area_under_roc(np.array([1, 2, 3, 4.0]), truth).auc == 1
    assert area_under_roc(np.array([1, 3, 2, 4.0]), truth).auc == 0.75
    assert area_under_roc(np.ones(4), truth).auc == 0.5


def test_the_seam_classifier_finds_a_hard_edge_and_is_at_chance_without_one() -> None:
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:40, :40]
    disc = np.hypot(rows - 20, columns - 20) < 9

    def outlines(contrast: float, count: int = 40) -> Any:
        shown = [60 + contrast * disc + random.normal(0, 6, (40, 40)) for _ in range(count)]
        grey = [np.clip(p, 0, 255).astype(np.uint8)[:, :, None].repeat(3, axis=2) for p in shown]
        return np.stack([seam_features(image, disc) for image in grey])

    groups = np.arange(40) // 2
    same = separability(outlines(30), outlines(30), groups)
    assert abs(same.auc - 0.5) < 3 * same.error
    assert separability(outlines(30), outlines(60), groups).auc > 0.95


def test_default_options() -> None:
    assert PasteOptions() == PasteOptions("val", 300, 1.0, 0.005, 0.25, 500, 0.3, 0)
