"""Pascal VOC's boxes as COCO JSONs: the convention, the fields, and mistakes by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from kd.errors import UserError
from kd.formats.box_annotations import image_ids, instances_file
from kd.formats.coco import load_coco
from kd.formats.coco_results import corners, read_truth
from kd.formats.voc import CLASSES, voc_to_coco


def voc_file(root: Path, year: str | int, split: str) -> Path:
    folder = root / f"VOC{year}"
    return instances_file(voc_to_coco(folder, split), folder, f"voc{year}_{split}")


HEAD = "<annotation>\n<size><width>60</width><height>40</height><depth>3</depth></size>\n"
DOG = (
    "<object>\n<name>dog</name>\n<truncated>1</truncated>\n<difficult>0</difficult>\n"
    "<bndbox><xmin>1</xmin><ymin>3</ymin><xmax>16</xmax><ymax>22</ymax></bndbox>\n"
    "<part><name>head</name><bndbox><xmin>2</xmin><ymin>4</ymin><xmax>3</xmax><ymax>5</ymax>"
    "</bndbox></part>\n</object>\n"
)
PERSON = (
    "<object>\n<name>person</name>\n<difficult>1</difficult>\n<occluded>1</occluded>\n"
    "<bndbox><xmax>60</xmax><xmin>41.5</xmin><ymax>40</ymax><ymin>40</ymin></bndbox>\n</object>\n"
)


def write_voc(root: Path, year: str = "2007", **annotations: str) -> Path:
    """A folder VOC{year} with an image for each annotation, all of them in the split `train`."""
    folder = root / f"VOC{year}"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for key, text in annotations.items():
        name = key.removeprefix("n")
        Image.new("RGB", (60, 40)).save(folder / "JPEGImages" / f"{name}.jpg")
        (folder / "Annotations" / f"{name}.xml").write_text(text)
    names = "\n".join(key.removeprefix("n") for key in annotations)
    (folder / "ImageSets" / "Main" / "train.txt").write_text(names + "\n")
    return root


def whole(*objects: str) -> str:
    return HEAD + "".join(objects) + "</annotation>\n"


def test_one_based_boxes_become_continuous(tmp_path: Path) -> None:
    root = write_voc(tmp_path, n000007=whole(DOG, PERSON), n000012=whole())
    content = voc_to_coco(root / "VOC2007", "train")
    assert content["images"] == [
        {"id": 7, "file_name": "000007.jpg", "height": 40, "width": 60},
        {"id": 12, "file_name": "000012.jpg", "height": 40, "width": 60},
    ]
    dog, person = content["annotations"]
    assert dog == {
        "id": 1, "image_id": 7, "category_id": CLASSES.index("dog") + 1,
        "bbox": [0.0, 2.0, 16.0, 20.0], "area": 320.0, "iscrowd": 0,
        "difficult": 0, "truncated": 1, "occluded": 0,
    }  # fmt: skip
    # One row of pixels is one pixel high.
    assert person["bbox"] == [40.5, 39.0, 19.5, 1.0]
    assert (person["iscrowd"], person["difficult"], person["occluded"]) == (1, 1, 1)
    assert [entry["name"] for entry in content["categories"]] == list(CLASSES)
    assert len(CLASSES) == 20


def test_the_file_is_read_as_any_coco_json(tmp_path: Path) -> None:
    root = write_voc(tmp_path, "2012", n2007_000027=whole(PERSON, DOG))
    path = voc_file(root, "2012", "train")
    assert path == root / "VOC2012" / "annotations" / "instances_voc2012_train.json"
    index = load_coco(path, root / "VOC2012" / "JPEGImages")
    assert index.image_ids.tolist() == [2007000027] and index.skipped == {"crowd": 1}
    assert index.boxes.tolist() == [[0.0, 2.0, 16.0, 22.0]]
    assert index.class_names[index.labels[0]] == "dog"
    truth = read_truth(path)
    assert corners(truth.boxes.xywh).tolist() == [[40.5, 39.0, 60.0, 40.0], [0.0, 2.0, 16.0, 22.0]]
    assert truth.boxes.crowd.tolist() == [True, False]
    objects = json.loads(path.read_text())["annotations"]
    assert [one["difficult"] for one in objects] == [1, 0]
    assert [(one["truncated"], one["occluded"]) for one in objects] == [(0, 1), (1, 0)]


def test_only_a_changed_file_is_rewritten(tmp_path: Path) -> None:
    root = write_voc(tmp_path, n1=whole(DOG))
    path = voc_file(root, 2007, "train")
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert voc_file(root, 2007, "train") == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    (root / "VOC2007" / "Annotations" / "1.xml").write_text(whole(DOG, PERSON))
    voc_file(root, 2007, "train")
    assert len(json.loads(path.read_text())["annotations"]) == 2


def test_the_file_is_stored_in_the_cache_if_the_dataset_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    root.mkdir()
    (root / "annotations").write_text("a file where the folder should be")
    path = instances_file({"images": []}, root, "x")
    assert path.parent == tmp_path / "cache" / "boxed" and path.read_text() == '{"images":[]}'
    assert instances_file({"images": []}, root, "x") == path
    monkeypatch.setenv("KD_CACHE", str(root / "annotations"))
    with pytest.raises(UserError, match="cannot be written"):
        instances_file({"images": []}, root, "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (whole(DOG)[:-15], r"1\.xml:\d+: not valid XML: no element found"),
        ("", r"1\.xml:1: not valid XML"),
        ("<html></html>", r"1\.xml:1: expected <annotation>, got <html>"),
        ("<annotation>\n</annotation>", r"1\.xml:1: <annotation> has no <size>"),
        (whole(DOG).replace("60<", "0<"), r"1\.xml:2: the image is 0 x 40 pixels"),
        (
            whole(DOG).replace(">dog<", ">dgo<"),
            r"1\.xml:4: unknown class 'dgo'; did you mean 'dog'",
        ),
        (whole(DOG.replace("<name>dog</name>", "")), r"1\.xml:3: <object> has no <name>"),
        (whole(DOG).replace("bndbox", "box"), r"1\.xml:3: <object> has no <bndbox>"),
        (whole(DOG).replace("<xmax>16</xmax>", ""), r"1\.xml:7: <bndbox> has no <xmax>"),
        (whole(DOG).replace(">16<", ">wide<"), r"1\.xml:7: <xmax> is 'wide', expected a number"),
        (whole(DOG).replace(">16<", ">nan<"), r"1\.xml:7: <xmax> is 'nan', expected a number"),
        (whole(DOG).replace(">16<", ">0<"), r"1\.xml:7: this box has no area: x 1 to 0, y 3 to"),
        (whole(DOG).replace("<truncated>1", "<truncated>x"), r"1\.xml:5: <truncated> is 'x'"),
    ],
)
def test_bad_annotations_are_reported_with_file_and_line(
    tmp_path: Path, text: str, said: str
) -> None:
    root = write_voc(tmp_path, n1=text)
    with pytest.raises(UserError, match=said):
        voc_to_coco(root / "VOC2007", "train")


def test_a_bad_split_is_reported(tmp_path: Path) -> None:
    root = write_voc(tmp_path, n1=whole(DOG), n2=whole())
    folder = root / "VOC2007"
    lists = folder / "ImageSets" / "Main"
    for text, said in (
        ("\n\n", r"some\.txt: empty split: no image names"),
        ("1\n\n2 -1\n", r"some\.txt:3: '2 -1', expected one image name"),
        ("1\n2\n1\n", r"some\.txt:3: 1 is also listed on line 1"),
        ("1\n3\n", r"some\.txt:2: no image .*JPEGImages/3\.jpg"),
        ("2\n", r"some\.txt: no object of a known class in 1 images"),
    ):
        (lists / "some.txt").write_text(text)
        with pytest.raises(UserError, match=said):
            voc_to_coco(root / "VOC2007", "some")
    (folder / "Annotations" / "2.xml").unlink()
    with pytest.raises(UserError, match=r"train\.txt:2: no annotation file .*2\.xml; some test"):
        voc_to_coco(root / "VOC2007", "train")
    with pytest.raises(UserError, match=r"none\.txt: no such split; there are some, train"):
        voc_to_coco(root / "VOC2007", "none")


def test_other_classes_can_be_named(tmp_path: Path) -> None:
    root = write_voc(tmp_path, n1=whole(DOG))
    content = voc_to_coco(root / "VOC2007", "train", classes=("cat", "dog"))
    assert content["annotations"][0]["category_id"] == 2
    with pytest.raises(UserError, match="unknown class 'dog'; known: cat"):
        voc_to_coco(root / "VOC2007", "train", classes=("cat",))


def test_ids_come_from_digits_if_unique() -> None:
    assert image_ids(["000005", "2008_000002"]) == [5, 2008000002]
    assert image_ids(["1_0", "10"]) == [1, 2]
    assert image_ids(["a", "7"]) == [1, 2]
    assert image_ids(["9" * 30, "7"]) == [1, 2]
