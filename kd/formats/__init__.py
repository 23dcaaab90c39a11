"""Readers and writers of dataset files: COCO, VOC, KITTI, label maps, fixations.

`LAYOUTS` registers the published layouts, without importing torch. A custom layout is a function
`package.module:attribute` of the dataset's folder and a split's name:

- of boxes: (root, split) -> the content of a COCO instances JSON and the folder of its images;
- of label maps: (root, split) -> `kd.formats.segmentation.LabelMapSplit`;
- of fixations: (root, split, options) -> `kd.formats.fixations.GazeSplit`.
"""

from __future__ import annotations

from kd.registry import Entry, all_names, is_foreign


def _boxes(target: str, text: str) -> Entry:
    return Entry(f"kd.formats.to_coco:{target}", text, "objects")


def _maps(target: str, text: str) -> Entry:
    return Entry(f"kd.formats.segmentation:{target}", text, "segmentation")


def _fixations(target: str, text: str) -> Entry:
    return Entry(f"kd.formats.saliency:{target}", text, "saliency")


LAYOUTS: dict[str, Entry] = {
    "voc": _boxes("VOC", "Pascal VOC's XML files"),
    "kitti": _boxes("KITTI", "KITTI's object detection"),
    "camvid": _maps("CAMVID", "CamVid's frames, 11 classes"),
    "cityscapes": _maps("CITYSCAPES", "Cityscapes, 19 classes"),
    "ade20k": _maps("ADE20K", "ADE20K's 150 classes"),
    "voc2012": _maps("VOC2012", "Pascal VOC 2012's label maps, 21 classes"),
    "salicon": _fixations("SALICON", "SALICON, mouse tracking"),
    "mit1003": _fixations("MIT1003", "MIT1003"),
    "cat2000": _fixations("CAT2000", "CAT2000's train set"),
    "osie": _fixations("OSIE", "OSIE"),
}


def check_layout(name: str, problem: str, *, annotated: str) -> str:
    """Return a layout's name, which must fit a problem; `annotated` is its COCO-format layout."""
    known = [annotated, *(one for one, entry in LAYOUTS.items() if entry.problem == problem)]
    if name not in known and not is_foreign(name):
        raise ValueError(f"unknown layout {name!r}{all_names(name, known)}")
    return name
