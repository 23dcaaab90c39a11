"""VOC and KITTI opened as they were unpacked: JSONs made once, rebuilt when something changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel

from kd.data.loader import collate
from kd.data.open_files import split_paths
from kd.errors import UserError
from kd.formats import LAYOUTS
from kd.formats import box_annotations as boxed
from kd.formats import to_coco as box_layouts
from kd.formats.to_coco import coco_split
from kd.formats.voc import voc_to_coco
from kd.problems.base import Sampling
from kd.problems.detection.data import open_detection
from kd.problems.detection.task import Detection
from kd.problems.objects.data import ObjectsDataset, open_objects
from kd.problems.objects.problem import PROBLEM
from kd.problems.objects.schema import ObjectsSection
from kd.problems.saliency.schema import SaliencySection
from kd.problems.segmentation.schema import SegmentationSection
from kd.runs.build import open_data

SIZE = (40, 60)
SPACE = "1.5 1.6 3.9 0.1 1.5 20.0 0.0"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))


def paint(path: Path, box: tuple[int, int, int, int]) -> None:
    """A black image with a white box, x1, y1, x2, y2."""
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    Image.fromarray(pixels).save(path)


def xml(box: tuple[int, int, int, int], difficult: int = 0, name: str = "dog") -> str:
    """VOC counts from 1 and includes the last pixel."""
    x1, y1, x2, y2 = box
    return (
        f"<annotation><size><width>{SIZE[1]}</width><height>{SIZE[0]}</height></size>"
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
        f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        "</bndbox></object></annotation>"
    )


def write_voc(root: Path) -> Path:
    """`VOCdevkit`: of trainval one dog and one that is difficult, of test one dog."""
    folder = root / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for number, difficult in ((1, 0), (2, 1), (3, 0)):
        box = (4 * number, 5, 4 * number + 20, 30)
        paint(folder / "JPEGImages" / f"00000{number}.png", box)
        (folder / "Annotations" / f"00000{number}.xml").write_text(xml(box, difficult))
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("000001\n000002\n")
    (folder / "ImageSets" / "Main" / "test.txt").write_text("000003\n")
    return root


def write_kitti(root: Path) -> Path:
    """Of train a car beside a region that nobody looked at, of val a cyclist."""
    for name in ("training/image_2", "training/label_2", "ImageSets"):
        (root / name).mkdir(parents=True)
    region = "DontCare -1 -1 -10 40.0 3.0 55.0 9.0 -1 -1 -1 -1000 -1000 -1000 -10\n"
    for number, kind, more in ((0, "Car", region), (1, "Cyclist", "")):
        paint(root / "training" / "image_2" / f"00000{number}.png", (8, 5, 28, 30))
        line = f"{kind} 0.00 0 -1.57 8 5 28 30 {SPACE}\n"
        (root / "training" / "label_2" / f"00000{number}.txt").write_text(line + more)
    (root / "ImageSets" / "train.txt").write_text("000000\n")
    (root / "ImageSets" / "val.txt").write_text("000001\n")
    return root


def section(root: Path, layout: str) -> ObjectsSection:
    splits = {
        "voc": {"train": "VOC2007/trainval", "val": "VOC2007/test"},
        "kitti": {"train": "train", "val": "val"},
    }
    return ObjectsSection.model_validate(
        {"root": str(root), "name": layout, "layout": layout, "size": 64, **splits[layout]}
    )


def opened(root: Path, layout: str) -> ObjectsDataset:
    return open_objects(section(root, layout))


@pytest.mark.parametrize(("layout", "write"), [("voc", write_voc), ("kitti", write_kitti)])
def test_boxes_match_the_objects_in_the_images(
    tmp_path: Path, layout: str, write: Callable[[Path], Path]
) -> None:
    data = opened(write(tmp_path / "data"), layout)
    for dataset in (
        open_detection(data.section).samples("train"),
        open_detection(data.section).samples("val"),
    ):
        for place in range(len(dataset)):
            sample = dataset[0, place]
            for box in sample["boxes"]:
                scale = (sample["own_sizes"] / sample["sizes"]).flip(0).repeat(2)
                x1, y1, x2, y2 = (box * scale).round().int().tolist()
                picture = np.asarray(Image.open(data_file(data, int(sample["image_ids"]))))
                rows, columns = np.nonzero(picture[:, :, 0])
                edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert [x1, y1, x2, y2] == [int(edge) for edge in edges]


def data_file(data: ObjectsDataset, image_id: int) -> Path:
    for index in (data.train, data.val):
        for place in np.flatnonzero(index.image_ids == image_id):
            return index.path(int(place))
    raise AssertionError(image_id)


def test_voc_has_difficult_objects_as_crowds(tmp_path: Path) -> None:
    data = opened(write_voc(tmp_path), "voc")
    assert data.num_classes == 20 and data.class_names[11] == "dog"
    whole = open_detection(data.section).samples("train")
    batch = collate([whole[0, place] for place in range(len(whole))])
    assert batch["image_ids"].tolist() == [1, 2] and batch["labels"].tolist() == [11]
    assert batch["crowd_of"].tolist() == [1]
    torch.testing.assert_close(batch["crowds"] * SIZE[1] / 64, torch.tensor([[8.0, 5, 28, 30]]),
                               rtol=0.02, atol=0.1)  # fmt: skip
    assert data.val.annotation_file == (
        tmp_path / "VOC2007" / "annotations" / "instances_voc2007_test.json"
    )
    assert len(open_detection(data.section).samples("train", train=True)) == 2


def test_kitti_has_regions_as_crowds(tmp_path: Path) -> None:
    data = opened(write_kitti(tmp_path), "kitti")
    assert data.class_names == ("car", "pedestrian", "cyclist")
    sample = open_detection(data.section).samples("train")[0, 0]
    assert sample["labels"].tolist() == [0] and len(sample["crowds"]) == 3
    assert open_detection(data.section).samples("val")[0, 0]["labels"].tolist() == [2]
    everything = coco_split("kitti", tmp_path, "all")[0]
    assert everything.name == "instances_kitti_all.json"


def test_detectors_on_kitti_are_scored_by_difficulty(tmp_path: Path) -> None:
    data = open_detection(opened(write_kitti(tmp_path), "kitti").section)
    batch = collate([data.samples("val")[0, 0]])
    found = torch.cat([batch["boxes"][0], torch.tensor([0.9, 2.0])])
    metric = Detection(num_classes=3).metric(data.class_info())
    metric.take(found[None, None], batch)
    numbers = metric.compute()
    assert numbers["AP"] == pytest.approx(1.0)
    # Of fewer than 40 objects KITTI's kit gives less than 1, here 0.
    assert {"KITTI_moderate", "KITTI_hard"} <= numbers.keys()
    voc = open_detection(opened(write_voc(tmp_path / "voc"), "voc").section)
    truth = voc.class_info().truth
    assert truth is not None and truth()[1] is None


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by each reading of VOC's annotations."""
    reads: list[str] = []
    real = voc_to_coco

    def counted(folder: Path, split: str, **options: Any) -> boxed.Json:
        reads.append(split)
        return real(folder, split, **options)

    monkeypatch.setattr(box_layouts, "voc_to_coco", counted)
    return reads


def test_a_json_is_written_once_and_rewritten_on_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, reads = write_voc(tmp_path), count_reads(monkeypatch)
    folder = root / "VOC2007"

    def boxes() -> list[list[float]]:
        return [[round(x) for x in row] for row in opened(root, "voc").train.boxes.tolist()]

    first = [[4, 5, 24, 30]]
    assert boxes() == first and boxes() == first
    assert sorted(reads) == ["test", "trainval"]
    annotation = folder / "Annotations" / "000001.xml"
    annotation.write_text(xml((6, 5, 24, 30)))
    assert boxes() == [[6, 5, 24, 30]]
    annotation.write_text(xml((4, 5, 24, 30)))
    os.utime(annotation, ns=(1, 1))  # of the same size as before, an older copy say
    assert boxes() == first
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("000001\n000003\n")
    assert boxes() == [*first, [12, 5, 32, 30]]
    made = folder / "annotations" / "instances_voc2007_trainval.json"
    made.write_text(made.read_text().replace("12.0", "13.0"))  # by hand, or half a copy
    assert boxes() == [*first, [12, 5, 32, 30]]
    reads.clear()
    (folder / "annotations" / "instances_voc2007_trainval.made").unlink()
    before = made.stat().st_mtime_ns
    boxes()
    assert reads == ["trainval"] and made.stat().st_mtime_ns == before
    (folder / "JPEGImages" / "000003.png").unlink()
    with pytest.raises(UserError, match=r"trainval\.txt:2: no image .*000003"):
        boxes()


def test_the_json_of_a_read_only_dataset_is_stored_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, reads = write_voc(tmp_path / "data"), count_reads(monkeypatch)
    folder = root / "VOC2007"
    folder.chmod(0o555)
    try:
        path, images = coco_split("voc", root, "VOC2007/test")
        assert path.parent == tmp_path / "cache" / "boxed" and images == folder / "JPEGImages"
        assert coco_split("voc", root, "VOC2007/test")[0] == path
        assert reads == ["test"] and not (folder / "annotations").exists()
    finally:
        folder.chmod(0o755)


def test_custom_classes_are_set_in_the_section(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    for path in (root / "VOC2007" / "Annotations").glob("*.xml"):
        path.write_text(path.read_text().replace("dog", "fox"))
    with pytest.raises(UserError, match=r"\.xml:1: unknown class 'fox'.*`classes: \[\.\.\.\]`"):
        open_objects(section(root, "voc"))
    mine = section(root, "voc").model_copy(update={"classes": ("owl", "fox")})
    data = open_detection(mine)
    assert data.class_names == ("owl", "fox") == PROBLEM.class_names(mine)
    assert set(data.train.labels.tolist()) == {1}
    # In another order nothing of what was made holds.
    other = open_detection(mine.model_copy(update={"classes": ("fox", "owl")}))
    assert set(other.train.labels.tolist()) == {0}


@pytest.mark.parametrize("own", [True, False])
def test_several_years_of_voc_form_one_split(tmp_path: Path, own: bool) -> None:
    root = write_voc(tmp_path)
    second = write_voc(tmp_path / "more") / "VOC2007"
    if own:  # names of its own, as published; else ids would meet
        for path in [*second.glob("*/*.png"), *second.glob("*/*.xml")]:
            path.rename(path.with_name(f"2008_{path.name}"))
        for path in second.glob("ImageSets/Main/*.txt"):
            lines = path.read_text().split()
            path.write_text("".join(f"2008_{line}\n" for line in lines))
    second.rename(root / "VOC2012")
    both = section(root, "voc").model_copy(update={"train": "VOC2007/trainval+VOC2012/trainval"})
    path, images = split_paths(both, both.train, layout=both.layout, classes=both.classes)
    assert images == root and path == root / "annotations" / (
        "instances_voc2007_trainval+voc2012_trainval.json"
    )
    data = open_objects(both)
    dataset = open_detection(data.section).samples("train")
    assert len(dataset) == 4 and len(open_detection(data.section).samples("val")) == 1
    content = json.loads(path.read_text())
    names = [image["file_name"] for image in content["images"]]
    head = "2008_" if own else ""
    assert names == [f"VOC2007/JPEGImages/00000{n}.png" for n in (1, 2)] + [
        f"VOC2012/JPEGImages/{head}00000{n}.png" for n in (1, 2)
    ]
    ids = [image["id"] for image in content["images"]]
    assert ids == ([1, 2, 2008000001, 2008000002] if own else [1, 2, 3, 4])
    assert [one["image_id"] for one in content["annotations"]] == ids
    assert [one["id"] for one in content["annotations"]] == [1, 2, 3, 4]
    # Found again, and refused where a part is there twice or not at all.
    assert PROBLEM.train_annotations(both) == path
    with pytest.raises(UserError, match="has voc2007_test twice"):
        coco_split("voc", root, "VOC2007/test+VOC2007/test")
    with pytest.raises(UserError, match="VOC2010: has no Annotations folder"):
        coco_split("voc", root, "VOC2007/test+VOC2010/trainval")


def test_the_folder_of_a_year_may_be_the_root(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    path = coco_split("voc", root, "VOC2007/test")[0]
    assert coco_split("voc", root / "VOC2007", "test") == (path, root / "VOC2007" / "JPEGImages")


def test_a_section_resolves_to_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_voc(tmp_path / "voc")
    named = section(root, "voc")
    assert PROBLEM.class_names(named)[:2] == ("aeroplane", "bicycle")
    path, images = split_paths(named, named.train, layout=named.layout, classes=named.classes)
    assert PROBLEM.train_annotations(named) == path and images == root / "VOC2007" / "JPEGImages"
    # Without a root it is looked for by what it holds.
    found = named.model_copy(update={"root": None})
    monkeypatch.setenv("KD_DATA", str(tmp_path))
    assert split_paths(found, found.train, layout=found.layout, classes=found.classes) == (
        path,
        images,
    )
    lost = named.model_copy(update={"root": str(tmp_path / "elsewhere")})
    assert PROBLEM.train_annotations(lost) is None


@pytest.mark.parametrize(
    ("layout", "split", "message"),
    [
        ("voc", "VOC2012/train", r"VOC2012: has no Annotations folder; set data.root to VOCdevkit"),
        ("voc", "trainval", r"has no Annotations folder; .* VOC2007/trainval"),
        ("voc", "VOC2007/val", r"val\.txt: no such split; there are test, trainval"),
        ("kitti", "train", r"label_2: no such folder; expected the folder of KITTI's"),
        ("coco", "train", "unknown layout 'coco'"),
    ],
)
def test_missing_files_are_reported_with_a_remedy(
    tmp_path: Path, layout: str, split: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        coco_split(layout, write_voc(tmp_path), split)


def test_a_missing_kitti_list_is_reported(tmp_path: Path) -> None:
    root = write_kitti(tmp_path)
    with pytest.raises(UserError, match=r"ImageSets/valid\.txt: no such split; there are train, v"):
        coco_split("kitti", root, "valid")
    for path in (root / "ImageSets").iterdir():  # as downloaded
        path.unlink()
    words = r"ImageSets/train\.txt: no such split; .* not part of KITTI's .* per line, such"
    with pytest.raises(UserError, match=words):
        coco_split("kitti", root, "train")
    (root / "ImageSets").rmdir()
    with pytest.raises(UserError, match=words):
        coco_split("kitti", root, "train")


def test_every_layout_is_there_and_its_section_offers_it() -> None:
    sections: dict[str, type[BaseModel]] = {
        "objects": ObjectsSection, "segmentation": SegmentationSection, "saliency": SaliencySection
    }  # fmt: skip
    for name, layout in LAYOUTS.items():
        assert callable(layout.load().open)
        assert name in (sections[layout.problem].model_fields["layout"].examples or ())


def boxes_of_mine(root: Path, split: str) -> tuple[dict[str, Any], Path]:
    """A layout of the user's own: a line for each image, its boxes after its name."""
    images: list[Any] = []
    annotations: list[Any] = []
    for number, line in enumerate((root / f"{split}.txt").read_text().splitlines()):
        name, *boxes = line.split()
        with Image.open(root / "photos" / name) as image:
            size = {"width": image.width, "height": image.height}
        images.append({"id": number, "file_name": name, **size})
        for box in boxes:
            kind, *xywh = (int(part) for part in box.split(","))
            identity = {"id": len(annotations) + 1, "image_id": number, "category_id": kind}
            annotations.append({**identity, "bbox": xywh})
    categories = [{"id": 1, "name": "fox"}, {"id": 2, "name": "owl"}]
    content = {"images": images, "categories": categories, "annotations": annotations}
    return content, root / "photos"


def test_boxes_in_a_layout_of_ones_own_are_opened_by_its_function(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "train.txt").write_text("0.png 1,2,3,20,10 2,5,5,9,9\n1.png 2,0,0,40,30\n")
    (tmp_path / "val.txt").write_text("2.png 1,4,4,8,8\n")
    values = {"name": "mine", "root": str(tmp_path), "layout": f"{__name__}:boxes_of_mine",
              "train": "train", "val": "val", "max_fraction": 1.0}  # fmt: skip
    section = ObjectsSection.model_validate(values)
    data = open_data(section, "classification")
    assert data.class_names == ("fox", "owl") and data.num_classes == 2
    sample = data.problem.training(data, Sampling(seed=0))[0, 0]
    assert sorted(sample["labels"].tolist()) == [0, 1]
    assert data.problem.class_names(section) == ("fox", "owl")
    found = open_data(section, "detection").problem.evaluation(open_data(section, "detection"))
    torch.testing.assert_close(
        found[0, 0]["boxes"] * (40 / found[0, 0]["sizes"][1]), torch.tensor([[4.0, 4, 12, 12]])
    )
    (tmp_path / "val.txt").write_text("2.png 2,4,4,8,8\n")  # read again: it may have changed
    assert PROBLEM.open(section).val.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "vco"}, r"unknown layout 'vco'.*voc"),
        ({"layout": "camvid"}, r"unknown layout 'camvid'.*kitti"),
        ({"layout": "nowhere:boxes"}, "no module 'nowhere'"),
    ],
)
def test_a_layout_that_is_none_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    values = {"name": "mine", "root": str(tmp_path), "train": "train", "val": "val", **changes}
    with pytest.raises(ValueError, match=message):
        open_data(ObjectsSection.model_validate(values), "classification")
