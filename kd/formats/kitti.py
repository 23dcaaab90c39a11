"""Convert KITTI's object boxes to COCO JSONs (Geiger et al., doi:10.1109/CVPR.2012.6248074).

The dataset's folder contains `training/image_2`, `training/label_2` and, for splits,
`ImageSets/*.txt`. KITTI evaluates cars, pedestrians and cyclists. Vans, seated people and DontCare
regions become crowds, which training skips and `kd.metrics.kitti_ap` ignores.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import numpy as np

from kd.errors import UserError
from kd.formats.box_annotations import CocoContent, Corners, Json, image_ids, split_names
from kd.formats.coco_results import Truth
from kd.formats.coco_validate import is_number, read_json
from kd.formats.splits import images_in
from kd.metrics.kitti_ap import KittiTruth
from kd.registry import suggestion
from kd.utils.images import file_size

CLASSES = ("car", "pedestrian", "cyclist")
ALL = "all"  # name of the split that has all labelled images
REGION = "DontCare"
# A detection of an object of the first type as the second is ignored.
NEIGHBOURS = {"Van": "car", "Person_sitting": "pedestrian"}
_OWN = {"Car": "car", "Pedestrian": "pedestrian", "Cyclist": "cyclist"}
_OTHERS = ("Truck", "Tram", "Misc")
_TYPES = (*_OWN, *NEIGHBOURS, *_OTHERS, REGION)
_FIELDS = 15


def kitti_to_coco(root: str | Path, split: str) -> Json:
    """Convert a KITTI split (a file in `ImageSets`, or "all") to the content of a COCO JSON.

    The classes are car, pedestrian and cyclist. Vans become crowds of class car, seated people
    crowds of class pedestrian, and a DontCare region one crowd of each class. Other objects are
    dropped. Annotations also have `truncated` (0..1) and `occluded` (0..3), both -1 for DontCare,
    and KITTI's class name as `type`.
    """
    root = Path(root)
    labels, images = root / "training" / "label_2", root / "training" / "image_2"
    where, names = _list_split(root, labels, split)
    files = images_in(images)
    content = CocoContent(CLASSES, f"KITTI object detection {split}")
    for image_id, (line, name) in zip(image_ids([name for _, name in names]), names, strict=True):
        if name not in files:
            raise UserError(f"{where}:{line}: no image {images / name}.png")
        height, width = file_size(files[name])
        content.add_image(image_id, files[name].name, height=height, width=width)
        _add(content, labels / f"{name}.txt", f"{where}:{line}")
    return content.done(where)


def kitti_truth(truth: Truth) -> KittiTruth:
    """Convert ground truth, read from a JSON of `kitti_to_coco`, for `kd.metrics.kitti_ap`."""
    objects = read_json(truth.path)[0]["annotations"]
    types = np.array([str(one.get("type", "")) for one in objects])
    if unknown := set(types.tolist()) - set(_TYPES):
        raise UserError(f"{truth.path}: not from KITTI: an annotation has type {min(unknown)!r}")
    for one, name in product(objects, ("truncated", "occluded")):
        if not is_number(one.get(name)):
            raise UserError(
                f"{truth.path}: annotation {one['id']}: '{name}' is {one.get(name)!r}, expected a "
                "number"
            )
    return KittiTruth(
        boxes=truth.boxes,
        truncated=np.array([one["truncated"] for one in objects], np.float64),
        occluded=np.array([one["occluded"] for one in objects], np.int64),
        neighbour=np.isin(types, list(NEIGHBOURS)),
        region=types == REGION,
    )


def _list_split(root: Path, labels: Path, split: str) -> tuple[Path, list[tuple[int, str]]]:
    """Return the file or folder that lists a split, and its (line number, image name) pairs."""
    if not labels.is_dir():
        raise UserError(
            f"{labels}: no such folder; expected the folder of KITTI's object detection, which "
            "contains training/, as data.root"
        )
    if split != ALL:
        where = root / "ImageSets" / f"{split}.txt"
        if not any(where.parent.glob("*.txt")):
            raise UserError(
                f"{where}: no such split; lists of a split's images are not part of KITTI's "
                "download: write one, with an image number per line, such as 000007"
            )
        return where, split_names(where, where.parent)
    names = sorted(path.stem for path in labels.glob("*.txt"))
    if not names:
        raise UserError(f"{labels}: empty split: it contains no label files")
    return labels, list(enumerate(names, start=1))


def _add(content: CocoContent, path: Path, names: str) -> None:
    """Add the objects of one label file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"{names}: no label file {path}; the labels of the test set are not public"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        kind, truncated, occluded, corners = _read(words, f"{path}:{number}")
        if kind in _OTHERS or (kind == REGION and _has_no_area(corners)):
            continue
        for name in CLASSES if kind == REGION else (_OWN.get(kind) or NEIGHBOURS[kind],):
            content.add_object(
                name, corners, crowd=kind not in _OWN, truncated=truncated, occluded=occluded,
                type=kind,
            )  # fmt: skip


def _read(words: list[str], where: str) -> tuple[str, float, int, Corners]:
    """Parse one line of a label file: type, truncated, occluded and box."""
    if len(words) != _FIELDS:
        raise UserError(
            f"{where}: {len(words)} fields, expected {_FIELDS}: type, truncated, occluded, alpha, "
            "4 for the box, 7 for the box in 3D"
        )
    kind = words[0]
    if kind not in _TYPES:
        raise UserError(f"{where}: unknown type {kind!r}{suggestion(kind, _TYPES)}")
    truncated, occluded, _, x1, y1, x2, y2 = (_number(word, where) for word in words[1:8])
    if occluded not in (-1, 0, 1, 2, 3):
        raise UserError(f"{where}: occluded is {words[2]}, expected 0, 1, 2 or 3")
    if kind != REGION and _has_no_area((x1, y1, x2, y2)):
        raise UserError(f"{where}: this box has no area: x {x1:g} to {x2:g}, y {y1:g} to {y2:g}")
    return kind, truncated, int(occluded), (x1, y1, x2, y2)


def _has_no_area(corners: Corners) -> bool:
    x1, y1, x2, y2 = corners
    return x2 <= x1 or y2 <= y1


def _number(word: str, where: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: {word!r} is not a finite number")
    return value
