"""Label maps in the layouts that they are published in: what is read, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd.errors import UserError
from kd.formats.coco import load_coco
from kd.formats.segmentation import LabelMapSplit, coco_label_maps, open_label_maps
from kd.problems.segmentation.data import open_maps
from kd.problems.segmentation.schema import SegmentationSection
from kd.utils.images import VOID

WIDTH = 8
Numbers = np.ndarray[tuple[int, int], np.dtype[np.uint8]]
# Numbers of a file to classes, of each layout; what is not here is void.
MEANT = {
    "camvid": {number: number for number in range(11)},
    "cityscapes": {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10,
                   24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18},
    "ade20k": {number: number - 1 for number in range(1, 151)},
    "voc2012": {number: number for number in range(21)},
}  # fmt: skip
VOIDS = {
    "camvid": [11, 255],
    "cityscapes": [*sorted(set(range(34)) - set(MEANT["cityscapes"])), 255],
    "ade20k": [0],
    "voc2012": [255],
}
every_layout = pytest.mark.parametrize("layout", MEANT)


def numbers_of(layout: str) -> Numbers:
    """A map in which every number that the layout knows occurs."""
    every = [*MEANT[layout], *VOIDS[layout]]
    return np.resize(np.array(every, np.uint8), (-(-len(every) // WIDTH), WIDTH))


def write_pair(image: Path, labels: Path, numbers: Numbers) -> None:
    for path in (image, labels):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", numbers.shape[::-1], (90, 120, 40)).save(image)
    Image.fromarray(numbers).save(labels)


def paths(root: Path, layout: str, split: str, name: str) -> tuple[Path, Path]:
    """Where an image and its map lie."""
    folder = {"train": "training", "val": "validation"}[split] if layout == "ade20k" else split
    images, maps = {
        "camvid": (f"{split}/{name}.png", f"{split}annot/{name}.png"),
        "cityscapes": (
            f"leftImg8bit/{split}/bonn/{name}_leftImg8bit.png",
            f"gtFine/{split}/bonn/{name}_gtFine_labelIds.png",
        ),
        "ade20k": (f"images/{folder}/{name}.jpg", f"annotations/{folder}/{name}.png"),
        "voc2012": (f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png"),
    }[layout]
    if layout == "voc2012":
        listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        with listing.open("a") as file:
            file.write(f"{name}\n")
    return root / images, root / maps


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a dataset of a layout: two images a split, and returns its folder."""

    def write(layout: str) -> Path:
        for name in ("train_a", "train_b", "val_a", "val_b"):
            pair = paths(tmp_path / layout, layout, name.split("_")[0], name)
            write_pair(*pair, numbers_of(layout))
        return tmp_path / layout

    return write


def map_files(split: LabelMapSplit) -> tuple[Path, ...]:
    """The files that the split's maps are read from."""
    assert isinstance(split.label_map, partial)
    files: tuple[Path, ...] = split.label_map.args[0]
    return files


def section(root: Path, layout: str) -> SegmentationSection:
    return SegmentationSection(name=layout, root=str(root), layout=layout, crop=(8, 8))


@every_layout
def test_a_published_folder_gives_its_classes(layout: str, written: Callable[..., Path]) -> None:
    split = open_label_maps(layout, written(layout), "val")
    assert tuple(path.stem.removesuffix("_leftImg8bit") for path in split.images) == (
        "val_a",
        "val_b",
    )
    assert all(path.is_file() for path in (*split.images, *map_files(split)))
    assert len(split.class_names) == len(MEANT[layout]) == len(set(split.class_names))
    numbers = numbers_of(layout)
    labels = split.label_map(1, numbers.shape)
    expected = [[MEANT[layout].get(int(one), VOID) for one in row] for row in numbers]
    assert labels.dtype == torch.uint8 and labels.tolist() == expected


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("camvid", {0: "sky", 3: "road", 10: "cyclist"}),
        ("cityscapes", {7: "road", 23: "sky", 33: "bicycle"}),
        ("voc2012", {0: "background", 1: "aeroplane", 15: "person", 20: "tvmonitor"}),
    ],
)
def test_class_names_match_ids(
    layout: str, names: dict[int, str], written: Callable[..., Path]
) -> None:
    known = open_label_maps(layout, written(layout), "train").class_names
    assert {number: known[MEANT[layout][number]] for number in names} == names


def test_camvid_lists_select_and_order_images(
    written: Callable[..., Path],
) -> None:
    root = written("camvid")
    listing = root / "train.txt"
    for text in (
        "train_b\ntrain_a\n",
        "/SegNet/CamVid/train/train_b.png /SegNet/CamVid/trainannot/train_b.png\n  \n"
        "/SegNet/CamVid/train/train_a.png /SegNet/CamVid/trainannot/train_a.png\n",
    ):
        listing.write_text(text)
        images = open_label_maps("camvid", root, "train").images
        assert [path.stem for path in images] == ["train_b", "train_a"]
    listing.write_text("train_b\n")
    split = open_label_maps("camvid", root, "train")
    assert [path.name for path in (*split.images, *map_files(split))] == ["train_b.png"] * 2
    listing.write_text("train_c\ntrain_b\ntrain_d\n")
    with pytest.raises(
        UserError, match=r"train.txt: 2 of its images, such as train_c.*, are not in .*/train"
    ):
        open_label_maps("camvid", root, "train")


def test_class_names_of_ade20k_come_from_its_list(written: Callable[..., Path]) -> None:
    root = written("ade20k")
    assert open_label_maps("ade20k", root, "train").class_names[::149] == ("class 1", "class 150")
    # As published: some lines end in a blank, some numbers too; names have others behind them.
    rows = [f"{n} \t0.01\t7\t3\tthing {n}, object {n} " for n in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows, ""]))
    assert open_label_maps("ade20k", root, "train").class_names == tuple(
        f"thing {n}" for n in range(1, 151)
    )
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows[1:]]))
    with pytest.raises(UserError, match=r"objectInfo150.txt: 149 classes, expected 150"):
        open_label_maps("ade20k", root, "train")


def test_the_palette_is_ignored(written: Callable[..., Path]) -> None:
    split = open_label_maps("voc2012", written("voc2012"), "train")
    size = numbers_of("voc2012").shape
    plain = split.label_map(0, size)
    with Image.open(map_files(split)[0]) as picture:
        coloured = picture.convert("L")
    coloured.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    assert coloured.mode == "P"
    coloured.save(map_files(split)[0])
    assert torch.equal(split.label_map(0, size), plain)


def smaller(path: Path) -> None:
    Image.fromarray(np.zeros((7, 8), np.uint8)).save(path)


def out_of_range(path: Path) -> None:
    with Image.open(path) as picture:
        numbers = np.array(picture)
    numbers[1, 3] = 200
    Image.fromarray(numbers).save(path)


def deep(path: Path) -> None:
    with Image.open(path) as picture:
        Image.fromarray(np.array(picture).astype(np.uint16) * 257).save(path)


def coloured(path: Path) -> None:
    with Image.open(path) as picture:
        picture.convert("RGB").save(path)


@every_layout
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            smaller,
            r"the label map is 8 x 7, but its image is 8 x \d+; scale it without interpolation",
        ),
        (out_of_range, r"1 pixels have ids that .*: 200; the first is at x 3, y 1"),
        (deep, r"a label map of 16 bits; save it with 8"),
        (coloured, r"an image of colours \(RGB\), not of class ids; save it as a grey or"),
        (Path.unlink, r"this label map is missing \(1 of 2 are\)"),
    ],
)
def test_a_wrong_map_is_reported_with_a_remedy(
    layout: str, spoil: Callable[[Path], None], message: str, written: Callable[..., Path]
) -> None:
    root = written(layout)
    path = map_files(open_label_maps(layout, root, "val"))[1]
    spoil(path)
    with pytest.raises(UserError, match=rf"^{path}: {message}"):
        open_maps(section(root, layout))


def test_a_missing_or_broken_image_is_reported(written: Callable[..., Path]) -> None:
    root = written("voc2012")
    image = open_label_maps("voc2012", root, "train").images[1]
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(UserError, match=rf"^{image}: cannot read this image"):
        open_maps(section(root, "voc2012"))
    image.unlink()
    with pytest.raises(UserError, match=rf"^{image}: this image is missing \(1 of 2 are\)"):
        open_maps(section(root, "voc2012"))


@every_layout
def test_a_split_or_folder_that_is_not_there_is_reported(
    layout: str, written: Callable[..., Path], tmp_path: Path
) -> None:
    root = written(layout)
    with pytest.raises(
        UserError, match=rf"^{root}: {layout} has no split 'tryout' there; it has train, val"
    ):
        open_label_maps(layout, root, "tryout")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(
        UserError, match=rf"^{elsewhere}: no .* folder of {layout}; .*data.root=DIR"
    ):
        open_label_maps(layout, elsewhere, "train")


@every_layout
def test_an_empty_split_is_an_error(layout: str, written: Callable[..., Path]) -> None:
    root = written(layout)
    if layout == "voc2012":
        (root / "ImageSets" / "Segmentation" / "train.txt").write_text("\n")
    else:
        for path in open_label_maps(layout, root, "train").images:
            path.unlink()
    with pytest.raises(UserError, match=r"train.*: empty split: no images"):
        open_label_maps(layout, root, "train")


def test_mistakes_of_both_splits_are_reported_together(written: Callable[..., Path]) -> None:
    root = written("camvid")
    train, val = (open_label_maps("camvid", root, split) for split in ("train", "val"))
    spoiled = [(train, 0, deep), (train, 1, smaller), (val, 0, coloured), (val, 1, out_of_range)]
    for split, number, spoil in spoiled:
        spoil(map_files(split)[number])
    train.images[0].write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        open_maps(section(root, "camvid"))
    lines = str(caught.value).splitlines()
    said = [train.images[0], map_files(train)[1], *map_files(val)]
    assert [line.split(": ")[0] for line in lines] == [str(path) for path in said]


def test_of_many_mistakes_five_are_listed(written: Callable[..., Path]) -> None:
    root = written("camvid")
    for number in range(6):
        write_pair(*paths(root, "camvid", "val", f"more{number}"), numbers_of("camvid"))
    for path in (root / "valannot").iterdir():
        coloured(path)
    with pytest.raises(UserError) as caught:
        open_maps(section(root, "camvid"))
    assert str(caught.value).splitlines()[5:] == ["... and 3 more"]


def test_coco_maps_have_smaller_objects_on_top(tiny_coco: Callable[..., Path]) -> None:
    root = tiny_coco(images=2, size=(48, 64))
    file = root / "annotations" / "instances_train2017.json"
    index = load_coco(file, root / "train2017")
    split = coco_label_maps(index)
    assert split.class_names == ("background", "ball", "box", "tent", "kite")
    assert len(split.images) == 2 and split.where == str(file)
    for image in range(2):
        expected = np.zeros((48, 64), np.uint8)
        rows = range(int(index.first[image]), int(index.first[image + 1]))
        for row in sorted(rows, key=lambda row: -float(index.areas[row])):
            expected[index.mask_of(row, (48, 64))] = 1 + index.labels[row]
        assert expected.any() and not expected.all()
        assert np.array_equal(split.label_map(image, (48, 64)).numpy(), expected)
    with pytest.raises(UserError, match=r"is 64 x 40 pixels, .*instances_train2017.json says 64 x"):
        split.label_map(0, (40, 64))


def test_crowds_are_void_where_no_object_lies_on_them(tiny_coco: Callable[..., Path]) -> None:
    root = tiny_coco(images=2, size=(48, 64))
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    first = content["images"][0]["id"]
    before = coco_label_maps(load_coco(file, root / "train2017"))
    maps = [before.label_map(image, (48, 64)) for image in range(2)]
    content["annotations"].append(
        {"id": 900, "image_id": first, "category_id": 3, "iscrowd": 1, "area": 480.0,
         "bbox": [0, 0, 10, 48],  # its upper half, column by column, 48 pixels each
         "segmentation": {"size": [48, 64], "counts": [0, *[24, 24] * 9, 24, 24 + 48 * 54]}}
    )  # fmt: skip
    file.write_text(json.dumps(content))
    split = coco_label_maps(load_coco(file, root / "train2017"))
    drawn = split.label_map(0, (48, 64))
    crowd = torch.zeros(48, 64, dtype=torch.bool)
    crowd[:24, :10] = True
    void = crowd & (maps[0] == 0)
    assert void.any()
    assert torch.equal(drawn == VOID, void)
    assert torch.equal(drawn[~void], maps[0][~void])
    assert torch.equal(split.label_map(1, (48, 64)), maps[1])


def test_coco_maps_are_not_all_drawn_before_training(
    tiny_coco: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(*_: object) -> None:
        raise AssertionError

    root = tiny_coco(images=2)
    splits = {
        name: {"annotations": f"annotations/instances_{name}2017.json", "images": f"{name}2017"}
        for name in ("train", "val")
    }
    values = {"root": str(root), "layout": "coco", "crop": (32, 32), **splits}
    monkeypatch.setattr("kd.formats.segmentation.draw_class_map", drawn)
    opened = open_maps(SegmentationSection.model_validate(values))
    assert opened.num_classes == 5
    Image.new("RGB", (5, 6)).save(opened.val.images[1])
    with pytest.raises(UserError, match=r"is 5 x 6 pixels, but the annotations say 64 x 48"):
        open_maps(SegmentationSection.model_validate(values))


@pytest.mark.slow
def test_the_real_camvid_is_as_published(shared_data: Path) -> None:
    root = shared_data / "camvid"
    if not root.is_dir():
        pytest.skip(f"no camvid in {shared_data}")
    sizes = {"train": 367, "val": 101, "test": 233}
    for name, count in sizes.items():
        split = open_label_maps("camvid", root, name)
        assert len(split.images) == count
        maps = torch.stack([split.label_map(n, (360, 480)) for n in range(0, count, 20)])
        assert 0.005 < (maps == VOID).float().mean() < 0.12
        rows = torch.arange(360)[:, None].expand(360, 480)
        sky, road = (rows[None].expand_as(maps)[maps == c].float().mean() for c in (0, 3))
        assert sky < 180 < road
