"""Find a dataset's folder; open and check its train and val splits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kd.config.datasets import Generate, Split
from kd.data.scenes import categories, generate_scenes
from kd.errors import UserError, raise_first
from kd.formats import LAYOUTS
from kd.formats.coco import CocoIndex, check_images_decode, load_coco
from kd.formats.splits import Layout
from kd.formats.to_coco import coco_split
from kd.registry import is_foreign, resolve

DATASETS = Path("datasets")  # default folder of datasets, relative to the working directory
DECODED_FIRST = 2000  # splits up to this size are decoded before training, in two seconds


class AnnotatedSection(Protocol):
    """Config section of an annotated dataset; each split is a COCO JSON and images, or a name."""

    @property
    def name(self) -> str: ...
    @property
    def root(self) -> str | None: ...
    @property
    def generate(self) -> Generate | None: ...
    @property
    def train(self) -> str | Split: ...
    @property
    def val(self) -> str | Split: ...


def open_annotated(
    section: AnnotatedSection,
    *,
    layout: str = "coco",
    classes: Sequence[str] | None = None,
    images: bool = True,
) -> tuple[CocoIndex, CocoIndex]:
    """Open and check the train and val split of a dataset of annotated objects.

    Missing embedded scenes are rendered; other layouts are converted to COCO JSONs. `layout` is
    "coco", a name in `kd.formats.LAYOUTS` or `package.module:attribute`. `classes` are custom class
    names, if the layout allows them. Set `images=False` if only annotations are needed.
    """
    if section.generate is not None:
        made = section.generate
        generate_scenes(
            root_of(section, holds=_known_by(section, layout)), train=made.train, val=made.val,
            size=made.size, seed=made.seed, workers=os.cpu_count() or 1, progress=True,
        )  # fmt: skip
    train, val = (
        split_paths(section, split, layout=layout, classes=classes)
        for split in (section.train, section.val)
    )
    first = load_coco(*train, check_images=images)
    second = load_coco(*val, check_images=images, categories_from=first)
    if section.generate is None and images:  # generated images need no check
        for index in (first, second):
            if len(index) <= DECODED_FIRST:  # else training may fail halfway
                raise_first(check_images_decode(index))
    return first, second


def split_paths(
    section: AnnotatedSection,
    split: str | Split,
    *,
    layout: str = "coco",
    classes: Sequence[str] | None = None,
) -> tuple[Path, Path]:
    """Paths of a split's COCO JSON, converted if in another layout, and of its image folder."""
    root = root_of(section, holds=_known_by(section, layout))
    if isinstance(split, Split):
        return root / split.annotations, root / split.images
    return coco_split(layout, root, split, classes)


def train_annotations(
    section: AnnotatedSection, *, layout: str = "coco", classes: Sequence[str] | None = None
) -> Path | None:
    """Path of the train split's COCO JSON; None if it is missing or cannot be converted."""
    try:
        path = split_paths(section, section.train, layout=layout, classes=classes)[0]
    except UserError:
        return None
    return path if path.is_file() else None


def class_names(
    section: AnnotatedSection, *, layout: str = "coco", classes: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Class names of a dataset, read without its images."""
    if section.generate is not None:
        return tuple(entry["name"] for entry in categories())
    paths = split_paths(section, section.train, layout=layout, classes=classes)
    return load_coco(*paths, check_images=False).class_names


def _known_by(section: AnnotatedSection, layout: str) -> str:
    """Relative path by which the dataset's folder is recognised."""
    if isinstance(section.train, Split):
        return section.train.annotations
    return layout_holds(layout, section.train)


def layout_holds(layout: str, split: str) -> str:
    """Relative path that a folder in this layout must contain; empty for a custom layout."""
    if is_foreign(layout):
        return ""
    found: Layout = resolve(LAYOUTS, layout, what="layout")
    return found.known_by(split)


def root_of(section: AnnotatedSection, *, holds: str) -> Path:
    """Folder of a dataset: the section's root, or the first default folder that has `holds`."""
    if section.root is not None:
        return Path(os.path.expandvars(section.root)).expanduser()
    if section.generate is not None:
        made = section.generate
        return DATASETS / f"scenes-{made.size}px-{made.train}-{made.val}-seed{made.seed}"
    tried = [Path(os.environ["KD_DATA"])] if "KD_DATA" in os.environ else []
    tried += [DATASETS, Path("../shared/data")]
    for folder in tried:
        if (folder / section.name / holds).exists():
            return folder / section.name
    raise UserError(
        f"dataset {section.name}: not found in {', '.join(map(str, tried))}; set its folder with "
        "--set data.root=DIR"
    )
