"""The embedded scenes on disk, and how they are painted."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from kd.data import scenes
from kd.errors import UserError
from kd.scenes import generative_model as scene_model
from kd.scenes.render import paint_object, paint_scene
from kd.scenes.vocabulary import CLASSES


def make(out: Path, **options: Any) -> Path:
    return scenes.generate_scenes(out, **{"train": 6, "val": 3, **options})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "scenes")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def coco(folder: Path, split: str = "train") -> Any:
    return json.loads((folder / f"annotations/instances_{split}.json").read_text())


def test_the_same_arguments_give_the_same_bytes_with_any_number_of_workers(
    made: Path, tmp_path: Path
) -> None:
    again = make(tmp_path / "again", workers=2)
    assert contents(again) == contents(made)
    other = make(tmp_path / "other", seed=1)
    assert (other / "train/000001.png").read_bytes() != (made / "train/000001.png").read_bytes()


def test_a_longer_set_begins_with_the_shorter_one(made: Path, tmp_path: Path) -> None:
    longer = make(tmp_path / "longer", train=8, val=3)
    short, long = coco(made), coco(longer)
    assert long["images"][:6] == short["images"]
    assert long["annotations"][: len(short["annotations"])] == short["annotations"]
    for i in range(1, 7):
        name = f"train/{i:06d}.png"
        assert (longer / name).read_bytes() == (made / name).read_bytes()


def test_splits_share_neither_scenes_nor_ids(made: Path) -> None:
    train, val = coco(made), coco(made, "val")
    for part in ("images", "annotations"):
        assert not {x["id"] for x in train[part]} & {x["id"] for x in val[part]}
    assert (made / "train/000001.png").read_bytes() != (made / "val/000001.png").read_bytes()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools'
def test_pycocotools_reads_the_set_and_finds_masks_inside_the_boxes(made: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        read = COCO(made / "annotations/instances_train.json")
    assert len(read.getImgIds()) == 6
    assert [c["name"] for c in read.loadCats(read.getCatIds())] == list(CLASSES)
    for annotation in read.loadAnns(read.getAnnIds()):
        x, y, width, height = annotation["bbox"]
        mask = read.annToMask(annotation)
        assert mask.shape == (64, 64)
        inside = int(mask[y : y + height, x : x + width].sum())
        # pycocotools rounds outwards by up to a pixel; the drawing itself never leaves its box.
        around = mask[max(y - 1, 0) : y + height + 1, max(x - 1, 0) : x + width + 1].sum()
        assert around == mask.sum()
        assert inside == pytest.approx(annotation["area"], rel=0.3)
        assert 0 < annotation["area"] <= width * height
        assert annotation["iscrowd"] == 0


def scene_of(image: dict[str, Any], annotations: list[dict[str, Any]]) -> scene_model.Scene:
    """The scene of a 64-pixel image, from its COCO entries."""
    return scene_model.Scene(
        kind=scene_model.WORLD.kinds.index(image["scene"]["kind"]),
        horizon=image["scene"]["horizon"],
        classes=np.array([a["category_id"] - 1 for a in annotations]),
        boxes=np.array([a["bbox"] for a in annotations]),
    )


def test_stored_posteriors_agree_with_the_scenes_read_back(made: Path) -> None:
    for split in ("train", "val"):
        content = coco(made, split)
        stored = np.load(made / f"annotations/posteriors_{split}.npz")
        assert stored["object_ids"].tolist() == [a["id"] for a in content["annotations"]]
        start = 0
        for image in content["images"]:
            mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            scene = scene_of(image, mine)
            for given in ("pixels", "annotations"):
                log_probs = stored[f"log_probs_{given}"][start : start + len(mine)]
                assert log_probs.dtype == np.float32
                expected = np.log(scene_model.exact_posteriors(scene, given=given))
                np.testing.assert_allclose(log_probs, expected, rtol=1e-5, atol=1e-6)
            start += len(mine)
        assert start == len(stored["object_ids"])


def test_confusable_classes_are_painted_identically() -> None:
    world = scene_model.WORLD
    checked = 0
    for seed in range(25):
        scene = scene_model.sample_scene(np.random.default_rng([1, seed]))
        for i, c in enumerate(scene.classes):
            twins = np.flatnonzero((world.looks == world.looks[c]) & (np.arange(22) != c))
            for twin in twins:
                classes = scene.classes.copy()
                classes[i] = twin
                swapped = scene_model.Scene(scene.kind, scene.horizon, classes, scene.boxes)
                first, second = paint_scene(scene, seed), paint_scene(swapped, seed)
                np.testing.assert_array_equal(first.image, second.image)
                assert first.outlines == second.outlines
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("size", [64, 128])
def test_nothing_of_an_object_leaks_outside_its_box(size: int) -> None:
    scale = size // 64
    for seed in range(12):
        scene = scene_model.sample_scene(np.random.default_rng([2, seed]))
        whole = paint_scene(scene, seed, size=size).image
        for i, (x, y, width, height) in enumerate(scene.boxes * scale):
            without = paint_scene(scene, seed, size=size, omit={i}).image
            changed = (whole != without).any(axis=2)
            assert changed.any()
            changed[y : y + height, x : x + width] = False
            assert not changed.any()


def test_every_look_fills_its_box_to_the_edges_or_nearly() -> None:
    for look, _ in CLASSES.values():
        _, cover, outlines = paint_object(look, 16, 16, np.random.default_rng(0))
        rows, columns = np.nonzero(cover > 0.3)
        assert rows.min() <= 1 and columns.min() <= 1
        assert rows.max() >= 14 and columns.max() >= 14
        assert all(0 <= v <= 16 for flat in outlines for v in flat)


def test_images_match_the_annotations(made: Path) -> None:
    content = coco(made)
    assert [c["look"] for c in content["categories"]] == [look for look, _ in CLASSES.values()]
    for image in content["images"]:
        with Image.open(made / "train" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (64, 64)
            assert picture.mode == "RGB"
        assert image["scene"]["kind"] in scene_model.WORLD.kinds
        assert 0 < image["scene"]["horizon"] < 64


def test_larger_images_show_the_same_scenes(made: Path, tmp_path: Path) -> None:
    large = make(tmp_path / "large", size=128)
    for small_one, large_one in zip(
        coco(made)["annotations"], coco(large)["annotations"], strict=True
    ):
        assert large_one["bbox"] == [2 * v for v in small_one["bbox"]]
        assert large_one["category_id"] == small_one["category_id"]


def test_an_existing_dataset_is_reused_and_another_rejected(made: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    assert make(made) == made
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*")} == before
    with pytest.raises(UserError, match=r"contains other scenes \(train is 6, expected 7"):
        make(made, train=7, val=3)


def test_other_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(UserError, match="contains other files"):
        make(tmp_path / "mine")
    with pytest.raises(UserError, match="is a file"):
        make(tmp_path / "mine/letter.txt")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/scenes.json").write_text('{"version":')
    with pytest.raises(UserError, match=r"scenes\.json: cannot be read"):
        make(tmp_path / "broken")
    with pytest.raises(UserError, match="cannot create this folder"):
        make(tmp_path / "mine/letter.txt/below")
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", train=1, val=1)
    assert (tmp_path / "empty/scenes.json").is_file()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"train": 0}, "train must be at least 1, got 0"),
        ({"val": -1}, "val must be at least 1, got -1"),
        ({"size": 96}, "size: got 96, expected a multiple of 64"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_an_argument_out_of_range_is_reported(
    argument: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path / "x", **argument)
    assert not any(tmp_path.iterdir())


def test_an_error_leaves_no_partial_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="No space left on device"):
        make(tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_a_kill_leaves_no_partial_dataset(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    command = [sys.executable, "-m", "kd.data.scenes", "--out", str(out), "--workers", "1"]
    root = Path(scenes.__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".scenes.*.partial/train/000020.png")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not out.exists()
    make(out)
    assert coco(out)["images"]


def test_the_command_reports_success_and_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "s"), "--train", "2", "--val", "1", "--workers", "1"]
    assert scenes.main(arguments) == 0
    assert "2 train and 1 val scenes" in capsys.readouterr().out
    assert scenes.main([*arguments, "--size", "100"]) == 2
    assert capsys.readouterr().err == "error: size: got 100, expected a multiple of 64\n"
