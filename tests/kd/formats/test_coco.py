"""COCO index: values against the JSON and pycocotools, bad input, staleness, sharing."""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pycocotools import mask as rle_masks
from pycocotools.coco import COCO

from kd.errors import UserError
from kd.formats import coco_index as coco_files
from kd.formats.coco import CocoIndex, check_images_decode, load_coco

Json = dict[str, Any]

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


def annotation(number: int, image: int, category: int, box: list[Any], **more: Any) -> Json:
    """One annotation, whose polygon is its box unless told otherwise."""
    entry = {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0}
    if len(box) == 4:
        x, y, w, h = box
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        entry["area"] = w * h
    return entry | more


def small() -> Json:
    """Three images (the second without objects), three categories with gaps, four objects."""
    return {
        "images": [
            {"id": 30, "file_name": "b.jpg", "width": 64, "height": 48},
            {"id": 10, "file_name": "a.jpg", "width": 40, "height": 40},
            {"id": 20, "file_name": "inner/çé.jpg", "width": 100, "height": 50},
        ],
        "categories": [
            {"id": 90, "name": "cup", "look": "round"},
            {"id": 1, "name": "person"},
            {"id": 44, "name": "ball", "look": "round"},
        ],
        "annotations": [
            annotation(7, 20, 44, [10, 10, 20, 20]),
            annotation(5, 30, 90, [4, 4, 8, 6]),
            annotation(9, 20, 1, [50.5, 0, 30, 40.25]),
            annotation(6, 30, 1, [20, 20, 20, 20], area=123.5),
        ],
    }


def write(folder: Path, dataset: Any, name: str = "instances_x.json") -> Path:
    """Write a JSON and grey images for it."""
    path = folder / name
    path.write_text(json.dumps(dataset), encoding="utf-8")
    images = folder / "images"
    (images / "inner").mkdir(parents=True, exist_ok=True)
    if isinstance(dataset, dict):
        for entry in dataset.get("images", []):
            if "width" in entry and entry["width"] and entry["width"] > 0:
                Image.new("RGB", (entry["width"], entry["height"])).save(
                    images / entry["file_name"]
                )
    return path


def load(folder: Path, dataset: Any, **options: Any) -> CocoIndex:
    """Write and load."""
    return load_coco(write(folder, dataset), folder / "images", **options)


def refused(folder: Path, dataset: Any, **options: Any) -> str:
    """The message of a dataset that must be refused; it names the file."""
    with pytest.raises(UserError) as caught:
        load(folder, dataset, **options)
    assert "instances_x.json" in str(caught.value)
    assert not list(folder.glob(".*")), "a draft of the index was left behind"
    return str(caught.value)


def mask_by_pycocotools(reference: COCO, entry: Json) -> npt.NDArray[np.bool_]:
    """The object's mask at full size; the warning is about NumPy 2's copy keyword."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return np.asarray(reference.annToMask(entry), dtype=bool)


def test_arrays_hold_the_objects_of_each_image_in_turn(tmp_path: Path) -> None:
    index = load(tmp_path, small())
    assert index.image_ids.tolist() == [30, 10, 20]
    assert index.first.tolist() == [0, 2, 2, 4]
    assert index.object_ids.tolist() == [5, 6, 7, 9]
    assert index.labels.tolist() == [2, 0, 1, 0]
    assert index.boxes.tolist()[3] == [50.5, 0, 80.5, 40.25]
    assert index.areas.tolist() == [48, 123.5, 400, 30 * 40.25]
    assert index.heights.tolist() == [48, 40, 50]
    assert [index.image_of(row) for row in range(4)] == [0, 0, 2, 2]
    assert index.skipped == {}
    assert index.notes == {"images_without_object": 1}
    dtypes = [str(a.dtype) for a in (index.image_ids, index.first, index.boxes, index.labels)]
    assert dtypes == ["int64", "int64", "float32", "int16"]


def test_categories_are_ordered_by_id_and_keep_their_look(tmp_path: Path) -> None:
    index = load(tmp_path, small())
    assert index.category_ids == (1, 44, 90)
    assert index.class_names == ("person", "ball", "cup")
    assert index.confusable_groups == (None, "round", "round")
    assert index.num_classes == 3


def test_file_names_survive_the_flat_storage(tmp_path: Path) -> None:
    index = load(tmp_path, small())
    assert len(index) == 3
    assert index.file_name(2) == "inner/çé.jpg"
    assert index.path(0) == tmp_path / "images" / "b.jpg"


def test_arrays_are_read_only_maps(tmp_path: Path) -> None:
    index = load(tmp_path, small())
    assert isinstance(index.boxes.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        index.boxes[0] = 0


def test_polygons_of_returns_every_ring(tmp_path: Path) -> None:
    dataset = small()
    second = [60, 5, 70, 5, 65, 15]
    dataset["annotations"][0]["segmentation"] = [SQUARE, second]
    index = load(tmp_path, dataset)
    rings = index.polygons_of(2)
    assert [ring.ravel().tolist() for ring in rings] == [SQUARE, second]


def test_a_mask_at_full_size_is_that_of_pycocotools(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = small()
    dataset["annotations"][0]["segmentation"] = [[12, 10, 30, 11, 22.5, 33], [60, 5, 70, 5, 65, 15]]
    counts = [20 * 50, 10, 40, 10, 78 * 50 + 40]  # columns 20 and 21, rows 0 to 9
    dataset["annotations"][2]["segmentation"] = {"size": [50, 100], "counts": counts}
    path = write(tmp_path, dataset)
    index = load_coco(path, tmp_path / "images")
    assert capsys.readouterr().out == ""
    reference = COCO(str(path))
    for row, object_id in enumerate(index.object_ids.tolist()):
        image = index.image_of(row)
        mask = index.mask_of(row, (index.heights[image], index.widths[image]))
        expected = mask_by_pycocotools(reference, reference.anns[object_id])
        np.testing.assert_array_equal(mask, expected)
    assert index.mask_of(3, (50, 100))[:, 20:22].sum() == 20


def test_compressed_run_lengths_are_stored_as_they_are(tmp_path: Path) -> None:
    dataset = small()
    counts = [20 * 50, 10, 40, 10, 78 * 50 + 40]
    packed = rle_masks.frPyObjects({"size": [50, 100], "counts": counts}, 50, 100)
    packed["counts"] = packed["counts"].decode()
    dataset["annotations"][2]["segmentation"] = packed
    index = load(tmp_path, dataset)
    assert index.polygons_of(3) == []
    assert index.mask_of(3, (50, 100))[:10, 20:22].all()
    assert index.mask_of(3, (50, 100)).sum() == 20


@pytest.mark.parametrize("run_lengths", [False, True])
def test_a_mask_is_scaled_with_its_image(tmp_path: Path, run_lengths: bool) -> None:
    dataset = small()
    if run_lengths:
        column = [10 * 50 + 10, *[20, 30] * 19, 20, 70 * 50 + 20]
        dataset["annotations"][0]["segmentation"] = {"size": [50, 100], "counts": column}
    index = load(tmp_path, dataset)
    expected = np.zeros((25, 200), bool)
    expected[5:15, 20:60] = True  # box 10..30 with y halved and x doubled
    np.testing.assert_array_equal(index.mask_of(2, (25, 200)), expected)


def test_an_object_without_a_segmentation_gets_its_box(tmp_path: Path) -> None:
    dataset = small()
    del dataset["annotations"][0]["segmentation"]
    dataset["annotations"][1]["segmentation"] = [[1, 2, 3, 4]]  # too short for a polygon
    index = load(tmp_path, dataset)
    assert index.notes["without_segment"] == 2
    assert index.notes["bad_ring"] == 1
    mask = index.mask_of(2, (50, 100))
    assert mask[10:30, 10:30].all()
    assert mask.sum() == 400


@pytest.mark.parametrize(
    "segment",
    [
        {"size": [50, 100], "counts": "0"},  # ends early
        {"size": [50, 100], "counts": "oooo"},  # never ends
        {"size": [50, 100], "counts": "çé"},
        {"size": [50, 100], "counts": [10, 20, 30]},
        {"size": [50, 100], "counts": [6000, -1000]},
        {"size": [50, 100], "counts": ["a"]},
        {"size": [100, 50], "counts": [1000, 4000]},
        {"counts": [1000, 4000]},
        {},
    ],
)
def test_corrupt_run_lengths_are_counted_and_replaced_by_the_box(
    tmp_path: Path, segment: Json
) -> None:
    dataset = small()
    dataset["annotations"][0]["segmentation"] = segment
    index = load(tmp_path, dataset)
    assert index.notes["bad_run_lengths"] == 1
    assert index.mask_of(2, (50, 100))[10:30, 10:30].all()


def test_run_lengths_of_any_shape_are_accepted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dataset = small()
    dataset["annotations"] = []
    masks = [rng.random((50, 100)) < fraction for fraction in (0.001, 0.01, 0.3, 0.9, 0.999, 2)]
    for number, mask in enumerate(masks):
        packed = rle_masks.encode(np.asfortranarray(mask, dtype=np.uint8))
        segment = {"size": [50, 100], "counts": packed["counts"].decode()}
        entry = annotation(number, 20, 1, [0, 0, 100, 50], segmentation=segment)
        dataset["annotations"].append(entry)
    index = load(tmp_path, dataset)
    assert "bad_run_lengths" not in index.notes
    for row, mask in enumerate(masks):
        np.testing.assert_array_equal(index.mask_of(row, (50, 100)), mask)


def test_unusable_objects_are_skipped_with_counts_and_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = small()
    dataset["annotations"] += [
        annotation(100, 10, 1, [0, 0, 10, 10], iscrowd=1),
        annotation(101, 10, 1, [5, 5, 0, 10]),
        annotation(102, 10, 1, [40, 5, 3, 10]),
        annotation(103, 10, 1, [-20, 5, 3, 10]),
        annotation(104, 10, 1, [5, 5, 0.5, 10]),
        annotation(105, 10, 1, [-5, 35, 10, 10]),
    ]
    with caplog.at_level(logging.INFO):
        index = load(tmp_path, dataset)
    assert index.skipped == {"crowd": 1, "zero_area": 1, "outside_image": 2, "tiny": 1}
    assert index.notes == {"clipped": 1}
    assert index.boxes[index.first[1]].tolist() == [0, 35, 5, 40]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "instances_x.json: 3 images, 5 objects" in line
    assert "skipped: 1 crowd, 1 zero area, 2 outside image, 1 tiny; noted: 1 clipped" in line


def test_crowds_are_separate_from_objects(tmp_path: Path) -> None:
    dataset = small()
    crowds = [
        annotation(100, 10, 1, [4, 2, 10, 10], iscrowd=1, asked=False, area=33),
        annotation(101, 20, 1, [500, 5, 10, 10], iscrowd=1),  # outside
    ]
    plain = load(tmp_path, dataset)
    assert plain.crowds is None
    index = load(tmp_path, {**dataset, "annotations": [*crowds, *dataset["annotations"]]})
    np.testing.assert_array_equal(index.object_ids, plain.object_ids)
    np.testing.assert_array_equal(index.first, plain.first)
    assert index.scored is None and index.skipped == {"crowd": 2}
    again = pickle.loads(pickle.dumps(index))
    for kept in (index.crowds, again.crowds):
        assert kept is not None and kept.object_ids.tolist() == [100]
        image = index.image_ids.tolist().index(10)
        assert kept.image_of(0) == image and kept.boxes.tolist() == [[4, 2, 14, 12]]
        assert kept.areas.tolist() == [33]
        size = int(index.heights[image]), int(index.widths[image])
        assert kept.mask_of(0, size)[2:12, 4:14].all() and kept.mask_of(0, size).sum() == 100


def test_a_missing_json_is_reported(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"absent.json: annotation file not found.*kd.data.download"
    ):
        load_coco(tmp_path / "absent.json", tmp_path)


def test_a_truncated_json_reports_the_position(tmp_path: Path) -> None:
    path = write(tmp_path, small())
    text = json.dumps(small(), indent=1)
    for size in (len(text) // 3, len(text) // 2, len(text) - 1):
        path.write_text(text[:size])
        with pytest.raises(UserError, match=rf"cut off at byte {size} \(line \d+\)"):
            load_coco(path, tmp_path / "images")


def test_a_truncated_json_is_reported_from_the_child_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coco_files, "IN_PROCESS_BYTES", 0)
    path = write(tmp_path, small())
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match="cut off at byte 100"):
        load_coco(path, tmp_path / "images")
    assert {entry.name for entry in tmp_path.iterdir() if entry.suffix != ".lock"} == {
        "images", "instances_x.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"images": [1,, 2]}', "not valid JSON: .* at byte 14 of 19"),
        (b"\xff\xd8\xff\xe0 an image", "not UTF-8 text"),
        (b"[]", "a list; is it a file of detection results"),
        (b'{"images": []}', "no 'categories', 'annotations'"),
        (b"3}", "not valid JSON"),
    ],
)
def test_a_file_that_is_not_coco_json_is_rejected(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "instances_x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_coco(path, tmp_path)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_an_empty_section_is_rejected(tmp_path: Path, key: str) -> None:
    assert f"empty dataset: '{key}' has no entry" in refused(tmp_path, small() | {key: []})


def test_a_dataset_with_only_crowds_is_empty(tmp_path: Path) -> None:
    dataset = small()
    for entry in dataset["annotations"]:
        entry["iscrowd"] = 1
    message = refused(tmp_path, dataset)
    assert "no usable object (skipped: 4 crowd)" in message


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("annotations", {"image_id": 77}, "annotation 5: image 77 is not in 'images'"),
        ("annotations", {"category_id": 12}, "annotation 5: category 12 is not in 'categories'"),
        ("annotations", {"category_id": None}, "annotation 5: 'category_id' is None"),
        ("annotations", {"id": 7}, "annotation id 7 is used 2 times"),
        ("annotations", {"id": "7"}, "annotations[1]: no 'id'"),
        ("annotations", {"bbox": [1, 2, 3]}, "annotation 5: 'bbox' is [1, 2, 3]"),
        ("annotations", {"bbox": [1, 2, 3, float("nan")]}, "annotation 5: 'bbox'"),
        ("annotations", {"bbox": [1, 2, 3, float("inf")]}, "annotation 5: 'bbox'"),
        ("annotations", {"bbox": [1, 2, 3, "4"]}, "annotation 5: 'bbox'"),
        ("annotations", {"bbox": [1, 2, 3, 10**400]}, "annotation 5: 'bbox'"),
        ("annotations", {"bbox": None}, "annotation 5: 'bbox' is None"),
        (
            "annotations",
            {"segmentation": [[*SQUARE[:6], 1, float("nan")]]},
            "annotation 5: 'segmentation' has a number that is not finite",
        ),
        ("images", {"id": 30}, "image id 30 is used 2 times"),
        ("images", {"width": 0}, "image 10: 'width' is 0"),
        ("images", {"height": None}, "image 10: 'height' is missing"),
        ("images", {"height": -4}, "image 10: 'height' is -4"),
        ("images", {"file_name": ""}, "image 10: 'file_name' is ''"),
        ("categories", {"id": 90}, "category id 90 is used 2 times"),
        ("categories", {"name": 5}, "category 1: 'name' is 5"),
        ("categories", {"look": 5}, "category 1: 'look' is 5"),
    ],
)
def test_a_bad_entry_is_named_by_id(
    tmp_path: Path, section: str, change: Json, message: str
) -> None:
    good = small()
    write(tmp_path, good)  # its images
    bad = copy.deepcopy(good)
    bad[section][1] |= change
    path = tmp_path / "instances_x.json"
    path.write_text(json.dumps(bad))
    with pytest.raises(UserError) as caught:
        load_coco(path, tmp_path / "images")
    assert str(caught.value).startswith(f"{path}: {message}")


def test_many_mistakes_show_the_first_and_the_count(tmp_path: Path) -> None:
    dataset = small()
    dataset["annotations"] = [annotation(n, 1, 1, [0, 0, 5, 5]) for n in range(20)]
    message = refused(tmp_path, dataset)
    assert "annotation 0: image 1" in message and message.endswith("... and 15 more")
    assert message.count("\n") == 5


def test_missing_images_are_listed_with_their_count(tmp_path: Path) -> None:
    dataset = small()
    path = write(tmp_path, dataset)
    (tmp_path / "images" / "a.jpg").unlink()
    (tmp_path / "images" / "inner" / "çé.jpg").unlink()
    with pytest.raises(UserError, match=r"2 of the 3 images of .*missing: a.jpg, inner/çé.jpg"):
        load_coco(path, tmp_path / "images")
    assert len(load_coco(path, tmp_path / "images", check_images=False)) == 3


def test_a_wrong_image_folder_is_recognised_and_the_right_one_suggested(tmp_path: Path) -> None:
    path = write(tmp_path, small())
    (tmp_path / "others").mkdir()
    with pytest.raises(UserError, match=r"wrong image folder: none of the 3.*mean .*/images\?"):
        load_coco(path, tmp_path / "others")
    with pytest.raises(UserError, match="nowhere: image folder not found"):
        load_coco(path, tmp_path / "nowhere")


def test_categories_of_another_file_must_be_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    train = load(tmp_path / "a", small())
    dataset = small()
    dataset["categories"].reverse()
    assert load(tmp_path / "b", dataset, categories_from=train).class_names == train.class_names
    dataset["categories"][0]["name"] = "globe"
    message = refused(tmp_path / "b", dataset, categories_from=train)
    assert "id 44: globe here, ball there" in message
    assert "id 90" not in message


def inode(folder: Path) -> int:
    """Tells a rebuilt index from a kept one."""
    return (folder / "instances_x.kdindex" / "boxes.npy").stat().st_ino


def test_a_second_start_reads_only_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(tmp_path, small())
    monkeypatch.setattr(coco_files, "build_index", None)  # calling it would fail
    again = load_coco(first.annotation_file, tmp_path / "images")
    assert again.fingerprint == first.fingerprint
    assert again.skipped == first.skipped
    assert again.boxes.tolist() == first.boxes.tolist()


def test_a_touched_json_keeps_its_index_and_a_changed_one_does_not(tmp_path: Path) -> None:
    dataset = small()
    first = load(tmp_path, dataset)
    kept = inode(tmp_path)
    os.utime(first.annotation_file, (1, 1))
    assert load_coco(first.annotation_file, tmp_path / "images").fingerprint == first.fingerprint
    assert inode(tmp_path) == kept
    dataset["annotations"][0]["bbox"][0] = 11  # as many bytes as before
    second = load(tmp_path, dataset)
    assert second.fingerprint != first.fingerprint
    assert second.boxes[2, 0] == 11
    assert first.boxes[2, 0] == 10, "a process that has the old index open keeps it"
    entries = sorted(entry.name for entry in tmp_path.iterdir() if entry.suffix != ".lock")
    assert entries == ["images", "instances_x.json", "instances_x.kdindex"]


@pytest.mark.parametrize("damage", ["cut", "remove", "version", "garbled"])
def test_a_corrupt_or_outdated_index_is_rebuilt(tmp_path: Path, damage: str) -> None:
    folder = load(tmp_path, small()).index_folder
    if damage == "cut":
        os.truncate(folder / "boxes.npy", 140)
    elif damage == "remove":
        (folder / "points.npy").unlink()
    elif damage == "version":
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | {"reader_version": 0}))
    else:
        (folder / "meta.json").write_text("{")
    index = load_coco(tmp_path / "instances_x.json", tmp_path / "images")
    assert index.object_ids.tolist() == [5, 6, 7, 9]
    assert index.boxes.shape == (4, 4)


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    draft = tmp_path / ".instances_x.kdindex.0badcafe"
    draft.mkdir()
    (draft / "boxes.npy").write_bytes(b"half")
    load(tmp_path, small())
    assert not draft.exists()


def test_a_read_only_folder_puts_the_index_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    path = write(data, small())
    data.chmod(0o555)
    index = load_coco(path, data / "images")
    assert index.index_folder.parent == tmp_path / "cache" / "coco"
    assert "read-only folder" in caplog.text
    assert load_coco(path, data / "images").index_folder == index.index_folder
    data.chmod(0o755)


def test_an_index_needs_a_writable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "file"))
    data = tmp_path / "data"
    data.mkdir()
    path = write(data, small())
    data.chmod(0o555)
    with pytest.raises(UserError, match="cannot write an index"):
        load_coco(path, data / "images")
    data.chmod(0o755)


def test_the_child_process_builds_the_same_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = load(tmp_path, small())
    monkeypatch.setattr(coco_files, "IN_PROCESS_BYTES", 0)
    (tmp_path / "other").mkdir()
    there = load(tmp_path / "other", small())
    assert there.fingerprint == here.fingerprint
    for name, value in vars(here).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(there, name))


def test_pickling_sends_paths_only(tmp_path: Path) -> None:
    index = load(tmp_path, small())
    data = pickle.dumps(index)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again.labels.tolist() == index.labels.tolist()
    assert again.class_names == index.class_names
    assert again.path(2) == index.path(2)


def test_a_worker_notices_that_the_data_changed_underneath(tmp_path: Path) -> None:
    dataset = small()
    data = pickle.dumps(load(tmp_path, dataset))
    dataset["annotations"].pop()
    load(tmp_path, dataset)
    with pytest.raises(UserError, match="changed during the run"):
        pickle.loads(data)


def _boxes(index: CocoIndex) -> npt.NDArray[np.float32]:
    return np.array(index.boxes)


def test_a_spawned_worker_reads_the_same_arrays(tmp_path: Path) -> None:
    index = load(tmp_path, small())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(_boxes, (index,)), index.boxes)


def _load_in_process(arguments: tuple[Path, Path]) -> str:
    return load_coco(*arguments).fingerprint


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, small())
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        prints = pool.map(_load_in_process, [(path, tmp_path / "images")] * 4, chunksize=1)
    assert len(set(prints)) == 1
    assert not list(tmp_path.glob(".*"))


def test_decoding_finds_truncated_and_mismatching_images(tmp_path: Path) -> None:
    index = load(tmp_path, small())
    assert check_images_decode(index) == []
    Image.effect_noise((64, 48), 50).save(index.path(0))
    os.truncate(index.path(0), index.path(0).stat().st_size // 2)
    Image.new("RGB", (41, 40)).save(index.path(1))
    index.path(2).write_bytes(b"no image")
    messages = check_images_decode(index)
    assert len(messages) == 3
    assert "b.jpg: cannot read this image: image file is truncated" in messages[0]
    assert "a.jpg: is 41 x 40 pixels, but the annotations say 40 x 40 (image 10" in messages[1]


def test_real_coco_agrees_with_pycocotools(tmp_path: Path) -> None:
    repository = Path(__file__).resolve().parents[3]
    root = Path(os.environ.get("KD_DATA", repository.parent / "shared" / "data")) / "coco_mini"
    if not root.is_dir():
        pytest.skip(f"{root} is missing")
    path = root / "annotations" / "instances_val2017.json"
    index = load_coco(shutil.copy(path, tmp_path), root / "val2017")
    assert (len(index), index.num_classes) == (228, 80)
    assert (index.class_names[0], index.class_names[79]) == ("person", "toothbrush")
    assert index.labels.max() == 79
    reference = COCO(str(path))
    usable = len(reference.anns) - sum(index.skipped.values())
    assert len(index.object_ids) == usable
    for row in range(0, usable, 29):
        entry = reference.anns[int(index.object_ids[row])]
        image = index.image_of(row)
        assert index.image_ids[image] == entry["image_id"]
        assert index.category_ids[index.labels[row]] == entry["category_id"]
        if entry.get("segmentation"):
            mask = index.mask_of(row, (int(index.heights[image]), int(index.widths[image])))
            np.testing.assert_array_equal(mask, mask_by_pycocotools(reference, entry))
