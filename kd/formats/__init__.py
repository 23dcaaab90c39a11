"""Readers and writers of dataset files: COCO, VOC, KITTI, label maps, fixations.

`LAYOUTS` registers the published layouts without importing torch. A custom layout is named
`package.module:attribute` and is a function that opens one split of the dataset in folder `root`:

- boxes: (root, split) -> the content of a COCO instances JSON, and the image folder;
- label maps: (root, split) -> `kd.formats.segmentation.LabelMapSplit`;
- fixations: (root, split, options) -> `kd.formats.fixations.GazeSplit`.
"""

from __future__ import annotations

from kd.registry import Entry, all_names, is_foreign

_BOXES, _MAPS, _GAZE = (f"kd.formats.{name}" for name in ("to_coco", "segmentation", "saliency"))
LAYOUTS: dict[str, Entry] = {
    "voc": Entry(f"{_BOXES}:VOC", "Pascal VOC's XML files", "objects"),
    "kitti": Entry(f"{_BOXES}:KITTI", "KITTI's object detection", "objects"),
    "camvid": Entry(f"{_MAPS}:CAMVID", "CamVid's frames, 11 classes", "segmentation"),
    "cityscapes": Entry(f"{_MAPS}:CITYSCAPES", "Cityscapes, 19 classes", "segmentation"),
    "ade20k": Entry(f"{_MAPS}:ADE20K", "ADE20K's 150 classes", "segmentation"),
    "voc2012": Entry(
        f"{_MAPS}:VOC2012", "Pascal VOC 2012's label maps, 21 classes", "segmentation"
    ),
    "salicon": Entry(f"{_GAZE}:SALICON", "SALICON, mouse tracking", "saliency"),
    "mit1003": Entry(f"{_GAZE}:MIT1003", "MIT1003", "saliency"),
    "cat2000": Entry(f"{_GAZE}:CAT2000", "CAT2000's train set", "saliency"),
    "osie": Entry(f"{_GAZE}:OSIE", "OSIE", "saliency"),
}


def check_layout(name: str, problem: str, *, annotated: str) -> str:
    """Return `name` if it is a layout for `problem`; `annotated` is the name of the COCO layout."""
    known = [annotated, *(one for one, entry in LAYOUTS.items() if entry.problem == problem)]
    if name not in known and not is_foreign(name):
        raise ValueError(f"unknown layout {name!r}{all_names(name, known)}")
    return name
