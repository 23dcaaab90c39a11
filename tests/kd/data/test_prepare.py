"""The resized copy: annotations follow, it resumes, it is atomic, it says what was bad."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as run_lengths

from kd.data.prepare import PreparedCopy, main, prepare, scale_annotations
from kd.errors import UserError
from kd.formats.coco import load_coco
from kd.problems.objects.data import ObjectSamples


@pytest.fixture
def source(tiny_coco: Callable[..., Path]) -> tuple[Path, Path]:
    root = tiny_coco(images=5, size=(96, 128), splits=("train2017",))
    return root / "annotations" / "instances_train2017.json", root / "train2017"


def test_the_copy_trains_like_the_original(source: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert prepare(*source, out, size=64) == []
    options = {"size": 64, "mode": "all", "train": False, "shape": "segment"}
    original = ObjectSamples(load_coco(*source), **options)  # type: ignore[arg-type]
    with_copy = ObjectSamples(load_coco(*source), prepared=out, **options)  # type: ignore[arg-type]
    index = load_coco(out / "annotations.json", out / "images")
    same_door = ObjectSamples(index, **options)  # type: ignore[arg-type]
    for position in range(len(original)):
        first = original[0, position]
        for other in (with_copy[0, position], same_door[0, position]):
            for key in ("sizes", "labels", "object_ids", "usable", "hidden"):
                assert torch.equal(first[key], other[key]), key
            torch.testing.assert_close(first["boxes"], other["boxes"], atol=2e-3, rtol=0)
            torch.testing.assert_close(
                first["area_fractions"], other["area_fractions"], atol=1e-4, rtol=0
            )
            assert (first["segments"] != other["segments"]).float().mean() < 1e-3
            assert (
                first["images"].int() - other["images"].int()
            ).abs().float().mean() < 4  # flat shapes with sharp edges: the worst for JPEG


def test_small_images_are_copied_as_they_are(source: tuple[Path, Path], tmp_path: Path) -> None:
    prepare(*source, tmp_path / "same", size=500)
    for path in source[1].iterdir():
        assert (tmp_path / "same" / "images" / path.name).read_bytes() == path.read_bytes()
    content = json.loads((tmp_path / "same" / "annotations.json").read_text())
    assert content["images"] == json.loads(source[0].read_text())["images"]


def test_pngs_become_jpegs_that_keep_apart_from_namesakes(
    source: tuple[Path, Path], tmp_path: Path
) -> None:
    content = json.loads(source[0].read_text())
    name = content["images"][0]["file_name"]
    png = Path(name).with_suffix(".png").name
    with Image.open(source[1] / name) as picture:
        picture.save(source[1] / png)
    content["images"][1]["file_name"] = png
    source[0].write_text(json.dumps(content))
    out = tmp_path / "small"
    prepare(*source, out, size=64)
    with Image.open(out / "images" / f"{png}.jpg") as copied:
        assert copied.format == "JPEG"
    assert (out / "images" / name).is_file()
    load_coco(out / "annotations.json", out / "images")


def test_a_second_call_does_only_what_is_missing(source: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "small"
    prepare(*source, out, size=64)
    first, second, third = sorted((out / "images").iterdir())[:3]
    whole = first.read_bytes()
    first.unlink()
    second.write_bytes(b"finished before")
    os.utime(third, (1, 1))  # older than its source, which must have changed
    third.write_bytes(b"stale")
    os.utime(third, (1, 1))
    prepare(*source, out, size=64)
    assert first.read_bytes() == whole
    assert second.read_bytes() == b"finished before"
    assert third.read_bytes() != b"stale"
    assert not list(out.rglob("*.part"))


def test_bad_images_are_counted_named_and_left_out(
    source: tuple[Path, Path], tmp_path: Path
) -> None:
    paths = sorted(source[1].iterdir())
    paths[0].write_bytes(paths[0].read_bytes()[:200])
    paths[3].unlink()
    out = tmp_path / "small"
    messages = prepare(*source, out, size=64)
    assert [str(paths[0]) in messages[0], str(paths[3]) in messages[1]] == [True, True]
    index = load_coco(out / "annotations.json", out / "images")
    assert len(index) == 3


def test_nothing_readable_is_an_error(source: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no image could be read.*not found"):
        prepare(source[0], tmp_path, tmp_path / "out", size=64)


def test_a_folder_of_something_else_is_left_alone(
    source: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and not a prepared copy"):
        prepare(*source, tmp_path / "mine", size=64)
    prepare(*source, tmp_path / "small", size=64)
    with pytest.raises(UserError, match="is a copy of 64 pixels"):
        prepare(*source, tmp_path / "small", size=32)


def test_a_file_name_cannot_leave_the_folder(source: tuple[Path, Path], tmp_path: Path) -> None:
    content = json.loads(source[0].read_text())
    content["images"][0]["file_name"] = "../../escaped.jpg"
    source[0].write_text(json.dumps(content))
    with pytest.raises(UserError, match="escaped"):
        prepare(*source, tmp_path / "small", size=64)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: (out / "prepared.json").unlink(), "is not a prepared copy"),
        (lambda out: (out / "annotations.json").unlink(), "unfinished"),
        (lambda out: (out / "prepared.json").write_text("{"), "cannot be read"),
        (lambda out: (out / "prepared.json").write_text("{}"), "another version"),
        (lambda out: None, "prepared at 64 pixels, but 65 are required"),
    ],
)
def test_an_unfit_copy_is_refused(
    source: tuple[Path, Path],
    tmp_path: Path,
    spoil: Callable[[Path], object],
    message: str,
) -> None:
    out = tmp_path / "small"
    prepare(*source, out, size=64)
    spoil(out)
    with pytest.raises(UserError, match=message):
        PreparedCopy.open(out, at_least=65, fingerprint=load_coco(*source).fingerprint)


def test_a_copy_of_another_splits_images_is_refused(
    tiny_coco: Callable[..., Path], tmp_path: Path
) -> None:
    """Splits may use the same file names; the copy of one must not stand in for the other's."""
    root = tiny_coco(images=2)
    splits = [
        (root / "annotations" / f"instances_{split}.json", root / split)
        for split in ("train2017", "val2017")
    ]
    out = tmp_path / "small"
    prepare(*splits[0], out, size=32)
    with pytest.raises(UserError, match="prepared from other annotations"):
        ObjectSamples(load_coco(*splits[1]), size=32, prepared=out)
    with pytest.raises(UserError, match="choose another folder"):
        prepare(*splits[1], out, size=32)


def test_run_lengths_follow_and_broken_segments_do_no_harm() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 30:50] = 1
    packed = run_lengths.encode(np.asfortranarray(mask))
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    segments = [
        {"size": [40, 60], "counts": packed["counts"].decode()},
        {"size": [40, 60], "counts": counts},
        {"size": [40, 60]},
        [[1, 2, "three"]],
    ]
    dataset = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 40, "width": 60}],
        "annotations": [
            {"id": number, "image_id": 1, "bbox": [30, 10, 20, 10], "area": 200, "segmentation": s}
            for number, s in enumerate(segments)
        ],
    }
    scaled = scale_annotations(
        dataset, leave_out=(), rescale=lambda h, w: (h // 2, w // 2), rename=str
    )
    for entry in scaled["annotations"][:2]:
        assert entry["bbox"] == [15, 5, 10, 5]
        assert entry["area"] == 50
        assert np.array_equal(run_lengths.decode(entry["segmentation"]), mask[::2, ::2])
    assert "segmentation" not in scaled["annotations"][2]
    assert scaled["annotations"][3]["segmentation"] == segments[3]


@pytest.mark.slow
def test_the_command_works_in_processes_and_says_what_was_bad(
    source: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    next(source[1].iterdir()).write_bytes(b"no image")
    out = tmp_path / "small"
    flags = ["--annotations", source[0], "--images", source[1], "--out", out, "--size", "64"]
    with caplog.at_level(logging.INFO, logger="kd"):
        assert main([*map(str, flags), "--workers", "1"]) == 1
    assert "cannot read this image" in caplog.text
    assert "1 images left out" in caplog.text
    assert len(list((out / "images").iterdir())) == 4


def test_a_mistake_ends_in_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--annotations", tmp_path / "none.json", "--images", tmp_path, "--out", tmp_path / "o"]
    assert main([*map(str, flags), "--workers", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
