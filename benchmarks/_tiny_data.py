"""Write tiny random datasets in every layout that recipes read; equal seeds write equal files.

Each image contains a few regular polygons whose colour shows their class. Boxes, label maps and
fixations are derived from the same shapes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.io import savemat
from scipy.ndimage import gaussian_filter

TRAIN, VAL = 40, 8  # images
COCO_IDS = (1, 3, 7, 18, 44, 90)  # with gaps, like COCO's
VOC_NAMES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus")
KITTI_NAMES = ("Car", "Pedestrian", "Cyclist", "Van", "Person_sitting", "Truck", "DontCare")
CAMVID = tuple(range(12))  # ids in label maps, including void
CITYSCAPES = tuple(range(34))
ADE20K = tuple(range(151))
VOC2012 = (*range(21), 255)
ONE_SIZE, MANY_SIZES = ((96, 128),), ((96, 128), (128, 96), (112, 112))  # height, width

Point = tuple[float, float]


@dataclass(frozen=True)
class Shapes:
    """An image and its shapes, each with a class and corners."""

    number: int
    image: Image.Image
    objects: list[tuple[int, list[Point]]]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.height, self.image.width

    def boxes(self) -> Iterator[tuple[int, tuple[float, float, float, float]]]:
        """Class and x1, y1, x2, y2 of each shape."""
        for label, corners in self.objects:
            xs, ys = zip(*corners, strict=True)
            yield label, (min(xs), min(ys), max(xs), max(ys))

    def label_map(self, ids: Sequence[int]) -> Image.Image:
        """Draw the id of each pixel's class; the first id is the background's."""
        drawn = Image.new("L", self.image.size, ids[0])
        for label, corners in self.objects:
            ImageDraw.Draw(drawn).polygon(corners, fill=ids[label])
        return drawn

    def looked_at(self) -> NDArray[np.int64]:
        """Draw four people's fixations, most of them on shapes: rows of person, x, y in pixels."""
        random, rows = np.random.default_rng(10_000 + self.number), []
        centres = [np.mean(corners, axis=0) for _, corners in self.objects]
        for person in range(4):
            for centre in centres:
                rows.append([person, *(centre + random.normal(0, 4, 2))])
            rows.append([person, *(random.uniform(0, 1, 2) * self.image.size)])
        limits = [3, self.image.width - 1, self.image.height - 1]
        return np.clip(np.array(rows), 0, limits).astype(np.int64)

    def density(self) -> Image.Image:
        """Blur the fixations and scale them to a maximum of 255."""
        there = np.zeros(self.size)
        for _, x, y in self.looked_at().tolist():
            there[y, x] += 1
        blurred = gaussian_filter(there, 6.0)
        return Image.fromarray((255 * blurred / blurred.max()).astype(np.uint8))


def shapes(number: int, classes: int, sizes: Sequence[tuple[int, int]] = ONE_SIZE) -> Shapes:
    """Generate image `number`, with two to four shapes that do not overlap."""
    random = np.random.default_rng(number)
    height, width = sizes[number % len(sizes)]
    ground = random.integers(90, 160, 3) + random.integers(-20, 20, (height, width, 1))
    image = Image.fromarray(ground.astype(np.uint8))
    objects: list[tuple[int, list[Point]]] = []
    for quarter in random.permutation(4)[: random.integers(2, 5)].tolist():
        label = int(random.integers(classes))
        radius = random.uniform(0.12, 0.22) * min(height, width)
        x, y = width * (0.25 + 0.5 * (quarter % 2)), height * (0.25 + 0.5 * (quarter // 2))
        corners = 3 + label % 6
        angles = random.uniform(0, np.pi) + np.arange(corners) * 2 * np.pi / corners
        outline = [
            (round(x + radius * float(np.cos(a)), 2), round(y + radius * float(np.sin(a)), 2))
            for a in angles
        ]
        colour = tuple(np.random.default_rng(label).integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).polygon(outline, fill=colour)
        objects.append((label, outline))
    return Shapes(number, image, objects)


def several(
    split: int, count: int, classes: int, sizes: Sequence[tuple[int, int]] = ONE_SIZE
) -> list[Shapes]:
    """Generate all images of a split; no two splits share a number."""
    return [shapes(1000 * (split + 1) + place, classes, sizes) for place in range(count)]


def save(image: Image.Image, path: Path) -> None:
    """Write an image, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)  # PNG ignores `quality`


def write(path: Path, lines: Sequence[str]) -> None:
    """Write lines of text, and create the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def coco(root: Path) -> None:
    """Write COCO 2017: polygons, and a crowd on every tenth image."""
    for split, (name, count) in enumerate({"train2017": TRAIN, "val2017": VAL}.items()):
        images, objects = [], []
        for one in several(split, count, len(COCO_IDS), MANY_SIZES):
            file = f"{one.number:012d}.jpg"
            save(one.image, root / name / file)
            height, width = one.size
            images.append({"id": one.number, "file_name": file, "height": height, "width": width})
            objects += coco_objects(one)
        kinds = [{"id": n, "name": f"kind {n}", "supercategory": "shape"} for n in COCO_IDS]
        content = {"info": {}, "images": images, "annotations": objects, "categories": kinds}
        write(root / "annotations" / f"instances_{name}.json", [json.dumps(content)])


def coco_objects(one: Shapes) -> list[dict[str, Any]]:
    """Return the annotations of an image."""
    found = []
    for place, ((label, corners), (_, (x1, y1, x2, y2))) in enumerate(
        zip(one.objects, one.boxes(), strict=True)
    ):
        xs, ys = np.array(corners).T
        crowd = place == 0 and one.number % 10 == 0
        outline: Any = [[value for point in corners for value in point]]
        if crowd:
            outline = {"size": list(one.size), "counts": runs(one.label_map([0] + [1] * 90))}
        found.append({
            "id": 10 * one.number + place, "image_id": one.number, "category_id": COCO_IDS[label],
            "iscrowd": int(crowd), "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": outline,
            "area": 0.5 * abs(float(xs @ np.roll(ys, -1) - ys @ np.roll(xs, -1))),
        })  # fmt: skip
    return found


def runs(mask: Image.Image) -> list[int]:
    """Return COCO's run lengths of a mask: zeros first, in column order."""
    flat = np.concatenate([[0], np.asarray(mask).flatten(order="F"), [2]])
    return np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist()  # type: ignore[no-any-return]


def camvid(root: Path) -> None:
    """CamVid in the layout of SegNet's copy."""
    for split, (name, count) in enumerate({"train": TRAIN, "val": VAL, "test": VAL}.items()):
        for one in several(split, count, len(CAMVID)):
            save(one.image, root / name / f"{one.number}.png")
            save(one.label_map(CAMVID), root / f"{name}annot" / f"{one.number}.png")


def cityscapes(root: Path) -> None:
    """Cityscapes as published, one city."""
    for split, (name, count) in enumerate({"train": TRAIN, "val": VAL}.items()):
        for one in several(split, count, len(CITYSCAPES)):
            images, maps = (root / part / name / "town" for part in ("leftImg8bit", "gtFine"))
            save(one.image, images / f"town_{one.number}_leftImg8bit.png")
            save(one.label_map(CITYSCAPES), maps / f"town_{one.number}_gtFine_labelIds.png")


def ade20k(root: Path) -> None:
    """ADE20K's scene parsing benchmark."""
    for split, (name, count) in enumerate({"training": TRAIN, "validation": VAL}.items()):
        for one in several(split, count, len(ADE20K), MANY_SIZES):
            save(one.image, root / "images" / name / f"{one.number}.jpg")
            save(one.label_map(ADE20K), root / "annotations" / name / f"{one.number}.png")


def voc2012(root: Path) -> None:
    """Pascal VOC's label maps."""
    for split, (name, count) in enumerate({"train": TRAIN, "val": VAL}.items()):
        made = several(split, count, len(VOC2012), MANY_SIZES)
        for one in made:
            save(one.image, root / "JPEGImages" / f"{one.number}.jpg")
            save(one.label_map(VOC2012), root / "SegmentationClass" / f"{one.number}.png")
        names = [str(one.number) for one in made]
        write(root / "ImageSets" / "Segmentation" / f"{name}.txt", names)


def voc(root: Path) -> None:
    """Pascal VOC's boxes of two years, some of them difficult."""
    parts = (("VOC2007", "trainval", TRAIN), ("VOC2007", "test", VAL), ("VOC2012", "trainval", 8))
    for split, (year, name, count) in enumerate(parts):
        made = several(split, count, len(VOC_NAMES), MANY_SIZES)
        for one in made:
            save(one.image, root / year / "JPEGImages" / f"{one.number:06d}.jpg")
            height, width = one.size
            lines = [
                "<annotation>",
                f"<size><width>{width}</width><height>{height}</height></size>",
            ]
            for place, (label, box) in enumerate(one.boxes()):
                sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
                corners = "".join(f"<{side}>{round(value) + 1}</{side}>" for side, value in sides)
                hard = int(place == 0 and one.number % 10 == 0)
                lines += [f"<object><name>{VOC_NAMES[label]}</name><difficult>{hard}</difficult>",
                          f"<bndbox>{corners}</bndbox></object>"]  # fmt: skip
            annotations = root / year / "Annotations"
            write(annotations / f"{one.number:06d}.xml", [*lines, "</annotation>"])
        names = [f"{one.number:06d}" for one in made]
        write(root / year / "ImageSets" / "Main" / f"{name}.txt", names)


def kitti(root: Path) -> None:
    """Write KITTI's boxes, with some `DontCare` regions."""
    for split, (name, count) in enumerate({"train": TRAIN, "val": VAL}.items()):
        made = several(split, count, len(KITTI_NAMES))
        for one in made:
            save(one.image, root / "training" / "image_2" / f"{one.number:06d}.png")
            lines = [
                f"Car 0 0 0 {2 + split} 2 20 24 1 1 1 1 1 1 0"
            ]  # at least one object has a class
            for label, box in one.boxes():
                sides = " ".join(f"{value:.2f}" for value in box)
                lines.append(f"{KITTI_NAMES[label]} 0 0 0 {sides} 1 1 1 1 1 1 0")
            write(root / "training" / "label_2" / f"{one.number:06d}.txt", lines)
        write(root / "ImageSets" / f"{name}.txt", [f"{one.number:06d}" for one in made])


def osie(root: Path) -> None:
    """OSIE: one table of all fixations."""
    rows = []
    for one in several(0, TRAIN + VAL, 6):
        save(one.image, root / "stimuli" / f"{one.number}.jpg")
        rows += [[one.number, *row] for row in one.looked_at().tolist()]
    columns = np.array(["image", "subject", "x", "y"])
    np.savez(root / "fixations.npz", columns=columns, data=np.array(rows, np.float64))


def salicon(root: Path) -> None:
    """SALICON: fixations by person, and published maps."""
    for split, (name, count) in enumerate({"train": TRAIN, "val": VAL}.items()):
        for one in several(split, count, 6):
            save(one.image, root / "images" / name / f"{one.number}.jpg")
            save(one.density(), root / "maps" / name / f"{one.number}.png")
            seen = one.looked_at()
            gaze = np.empty((4, 1), dtype=[("fixations", object)])
            for person in range(4):
                gaze[person, 0]["fixations"] = seen[seen[:, 0] == person, 1:] + 1.0
            file = root / "fixations" / name / f"{one.number}.mat"
            file.parent.mkdir(parents=True, exist_ok=True)
            savemat(file, {"gaze": gaze, "resolution": np.array([one.size], np.float64)})


def mit1003(root: Path) -> None:
    """MIT1003: fixations as white points."""
    for one in several(0, TRAIN + VAL, 6):
        save(one.image, root / "ALLSTIMULI" / f"{one.number}.jpeg")
        points = Image.fromarray((255 * fixated(one)).astype(np.uint8))
        save(points, root / "ALLFIXATIONMAPS" / f"{one.number}_fixPts.jpg")
        save(one.density(), root / "ALLFIXATIONMAPS" / f"{one.number}_fixMap.jpg")


def cat2000(root: Path) -> None:
    """CAT2000: fixations as matrices, images in two categories."""
    folder = root / "trainSet"
    for one in several(0, TRAIN + VAL, 6):
        name = f"{('Action', 'Indoor')[one.number % 2]}/{one.number}"
        save(one.image, folder / "Stimuli" / f"{name}.jpg")
        save(one.density(), folder / "FIXATIONMAPS" / f"{name}.jpg")
        file = folder / "FIXATIONLOCS" / f"{name}.mat"
        file.parent.mkdir(parents=True, exist_ok=True)
        savemat(file, {"fixLocs": fixated(one).astype(np.uint8)})


def fixated(one: Shapes) -> NDArray[np.bool_]:
    """Return a mask of the fixated pixels, (H, W)."""
    there = np.zeros(one.size, bool)
    _, x, y = one.looked_at().T
    there[y, x] = True
    return there


# Writers by the recipes' dataset names; coco and coco_mini share a layout, as do voc and voc0712.
LAYOUTS: dict[str, Callable[[Path], None]] = {
    "coco": coco, "coco_mini": coco, "camvid": camvid, "cityscapes": cityscapes, "ade20k": ade20k,
    "voc2012": voc2012, "voc": voc, "voc0712": voc, "kitti": kitti, "osie": osie,
    "salicon": salicon, "mit1003": mit1003, "cat2000": cat2000,
}  # fmt: skip
