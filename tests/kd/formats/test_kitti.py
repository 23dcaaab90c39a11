"""KITTI's boxes as COCO JSONs: neighbours, regions, fields, and mistakes by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from kd.errors import UserError
from kd.formats.box_annotations import instances_file
from kd.formats.coco import load_coco
from kd.formats.coco_results import read_truth
from kd.formats.kitti import CLASSES, kitti_to_coco, kitti_truth


def kitti_file(root: Path, split: str) -> Path:
    return instances_file(kitti_to_coco(root, split), root, f"kitti_{split}")


SPACE = "1.5 1.6 3.9 0.1 1.5 20.0 0.0"


def label(kind: str, box: str, truncated: str = "0.00", occluded: str = "0") -> str:
    return f"{kind} {truncated} {occluded} -1.57 {box} {SPACE}\n"


CAR = label("Car", "10.5 20.0 30.5 28.25", "0.25", "2")
VAN, SITTING = label("Van", "1 2 9 8"), label("Person_sitting", "1 2 9 8")
TRUCK, CYCLIST = label("Truck", "1 2 9 8"), label("Cyclist", "0 0 5 9")
REGION = "DontCare -1 -1 -10 40.0 3.0 55.0 9.0 -1 -1 -1 -1000 -1000 -1000 -10\n"


def write_kitti(root: Path, **labels: str) -> Path:
    """`training` with an image for each label file, and a split `train` of all of them."""
    for name in ("training/image_2", "training/label_2", "ImageSets"):
        (root / name).mkdir(parents=True)
    for key, text in labels.items():
        name = key.removeprefix("n")
        Image.new("RGB", (60, 40)).save(root / "training" / "image_2" / f"{name}.png")
        (root / "training" / "label_2" / f"{name}.txt").write_text(text)
    names = "\n".join(key.removeprefix("n") for key in labels)
    (root / "ImageSets" / "train.txt").write_text(names)
    return root


def test_objects_neighbours_and_regions_are_annotations(tmp_path: Path) -> None:
    root = write_kitti(tmp_path, n000003=CAR + VAN + SITTING + TRUCK + CYCLIST + REGION)
    content = kitti_to_coco(root, "train")
    assert content["images"] == [{"id": 3, "file_name": "000003.png", "height": 40, "width": 60}]
    found = [
        (one["type"], CLASSES[one["category_id"] - 1], one["iscrowd"])
        for one in content["annotations"]
    ]
    assert found == [
        ("Car", "car", 0),
        ("Van", "car", 1),
        ("Person_sitting", "pedestrian", 1),
        ("Cyclist", "cyclist", 0),
        ("DontCare", "car", 1),
        ("DontCare", "pedestrian", 1),
        ("DontCare", "cyclist", 1),
    ]
    assert content["annotations"][0] == {
        "id": 1, "image_id": 3, "category_id": 1, "bbox": [10.5, 20.0, 20.0, 8.25],
        "area": 165.0, "iscrowd": 0, "truncated": 0.25, "occluded": 2, "type": "Car",
    }  # fmt: skip


def test_the_file_is_read_as_any_coco_json(tmp_path: Path) -> None:
    root = write_kitti(tmp_path, n000000=REGION + CAR, n000001="")
    path = kitti_file(root, "train")
    assert path == root / "annotations" / "instances_kitti_train.json"
    index = load_coco(path, root / "training" / "image_2")
    assert len(index) == 2 and index.boxes.tolist() == [[10.5, 20.0, 30.5, 28.25]]
    assert index.skipped == {"crowd": 3} and index.class_names == CLASSES
    truth = kitti_truth(read_truth(path))
    assert truth.region.tolist() == truth.boxes.crowd.tolist() == [True, True, True, False]
    assert truth.truncated.tolist() == [-1, -1, -1, 0.25] and truth.occluded.tolist()[3] == 2


def test_evaluation_distinguishes_neighbour_classes_and_regions(tmp_path: Path) -> None:
    path = kitti_file(write_kitti(tmp_path, n1=CAR + VAN + REGION), "train")
    truth = kitti_truth(read_truth(path))
    assert truth.neighbour.tolist() == [False, True, False, False, False]
    assert truth.region.tolist() == [False, False, True, True, True]
    assert truth.occluded[:2].tolist() == [2, 0] and truth.truncated[0] == 0.25
    path.write_text(path.read_text().replace('"Van"', '"Bus"'))
    with pytest.raises(UserError, match="not from KITTI: an annotation has type 'Bus'"):
        kitti_truth(read_truth(path))
    path.write_text(path.read_text().replace('"Bus"', '"Van"').replace("0.25", '"much"'))
    with pytest.raises(UserError, match="annotation 1: 'truncated' is 'much', expected a number"):
        kitti_truth(read_truth(path))


def test_all_images_with_labels_are_a_split_of_their_own(tmp_path: Path) -> None:
    root = write_kitti(tmp_path, n000000=CAR, n000001=CYCLIST, n000002=TRUCK)
    (root / "ImageSets" / "train.txt").write_text("000001\n")
    assert [one["id"] for one in kitti_to_coco(root, "all")["images"]] == [0, 1, 2]
    assert [one["id"] for one in kitti_to_coco(root, "train")["images"]] == [1]


def test_a_region_without_an_area_covers_nothing(tmp_path: Path) -> None:
    root = write_kitti(tmp_path, n1=CAR + REGION.replace("55.0", "40.0"))
    assert len(kitti_to_coco(root, "train")["annotations"]) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Car 0 0 -1.57 1 2 3 4\n", r"1\.txt:2: 8 fields, expected 15: type, truncated"),
        (CAR.strip() + " 0.9\n", r"1\.txt:2: 16 fields, expected 15"),
        (label("Bus", "1 2 9 8"), r"1\.txt:2: unknown type 'Bus'"),
        (label("Pedestrain", "1 2 9 8"), r"unknown type 'Pedestrain'; did you mean 'Pedestrian'"),
        (label("Car", "1 2 x 8"), r"1\.txt:2: 'x' is not a finite number"),
        (label("Car", "1 2 inf 8"), r"1\.txt:2: 'inf' is not a finite number"),
        (label("Car", "1 2 9 8", occluded="4"), r"1\.txt:2: occluded is 4, expected 0, 1, 2 or 3"),
        (label("Car", "9 2 9 8"), r"1\.txt:2: this box has no area: x 9 to 9, y 2 to 8"),
        (label("Van", "1 8 9 2"), r"1\.txt:2: this box has no area"),
    ],
)
def test_bad_labels_are_reported_with_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    root = write_kitti(tmp_path, n1=CAR + line)
    with pytest.raises(UserError, match=said):
        kitti_to_coco(root, "train")


def test_a_bad_split_is_reported(tmp_path: Path) -> None:
    root = write_kitti(tmp_path, n1=CAR, n2=TRUCK)
    lists = root / "ImageSets"
    for text, said in (
        ("", r"some\.txt: empty split"),
        ("2", r"some\.txt: no object of a known class in 1 images"),
        ("1\n3", r"some\.txt:2: no image .*image_2/3\.png"),
    ):
        (lists / "some.txt").write_text(text)
        with pytest.raises(UserError, match=said):
            kitti_to_coco(root, "some")
    with pytest.raises(UserError, match=r"none\.txt: no such split; there are some, train"):
        kitti_to_coco(root, "none")
    (root / "training" / "label_2" / "2.txt").unlink()
    with pytest.raises(
        UserError, match=r"train\.txt:2: no label file .*2\.txt; the labels of the test set"
    ):
        kitti_to_coco(root, "train")
    (root / "training" / "image_2" / "1.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"1\.png: cannot read this image"):
        kitti_to_coco(root, "train")
    (root / "training" / "label_2" / "1.txt").unlink()
    with pytest.raises(UserError, match="label_2: empty split: it contains no label files"):
        kitti_to_coco(root, "all")
    with pytest.raises(UserError, match="label_2: no such folder"):
        kitti_to_coco(tmp_path / "elsewhere", "train")
