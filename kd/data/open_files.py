"""Find a dataset's folder; read and check its two splits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kd.config.datasets import Generate, Split
from kd.data.scenes import categories, generate_scenes
from kd.errors import UserError
from kd.formats import LAYOUTS
from kd.formats.coco import CocoIndex, check_images_decode, load_coco
from kd.formats.to_coco import coco_split
from kd.registry import is_foreign, resolve

# Where generated datasets and the small real one are looked for, below the working directory.
DATASETS = Path("datasets")
# Images of a split that are all decoded before training starts: two seconds for so many.
DECODED_FIRST = 2000


class AnnotatedSection(Protocol):
    """A data section whose splits are COCO JSONs, or names in another layout."""

    @property
    def name(self) -> str:
        """The dataset's."""
        ...

    @property
    def root(self) -> str | None:
        """Its folder."""
        ...

    @property
    def generate(self) -> Generate | None:
        """Of the embedded scenes: what is rendered."""
        ...

    @property
    def train(self) -> str | Split:
        """The train split."""
        ...

    @property
    def val(self) -> str | Split:
        """The val split."""
        ...


def open_annotated(
    section: AnnotatedSection,
    *,
    layout: str = "coco",
    classes: Sequence[str] | None = None,
    images: bool = True,
) -> tuple[CocoIndex, CocoIndex]:
    """Open both splits of a dataset of annotated objects and check them.

    The embedded scenes are rendered if they are missing; COCO JSONs are written for other layouts.

    Args:
        section: Where the dataset lies.
        layout: "coco", one of `kd.formats.LAYOUTS` or `package.module:attribute`.
        classes: The user's own class names, for layouts that allow them.
        images: Whether images are needed.

    Raises:
        UserError: The dataset is not found, or a file of it is missing or damaged.
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
    if section.generate is None and images:  # generated files are intact
        for index in (first, second):
            _check_decode(index)
    return first, second


def split_paths(
    section: AnnotatedSection,
    split: str | Split,
    *,
    layout: str = "coco",
    classes: Sequence[str] | None = None,
) -> tuple[Path, Path]:
    """A split's COCO JSON, written if its layout is another, and the folder of its images.

    Raises:
        UserError: The dataset is not found, or what `coco_split` raises.
    """
    root = root_of(section, holds=_known_by(section, layout))
    if isinstance(split, Split):
        return root / split.annotations, root / split.images
    return coco_split(layout, root, split, classes)


def train_annotations(
    section: AnnotatedSection, *, layout: str = "coco", classes: Sequence[str] | None = None
) -> Path | None:
    """The JSON of the train split; None where it is missing."""
    try:
        path = split_paths(section, section.train, layout=layout, classes=classes)[0]
    except UserError:
        return None
    return path if path.is_file() else None


def class_names(
    section: AnnotatedSection, *, layout: str = "coco", classes: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The class names of a dataset, read without its images.

    Raises:
        UserError: The dataset is not found.
    """
    if section.generate is not None:
        return tuple(entry["name"] for entry in categories())
    paths = split_paths(section, section.train, layout=layout, classes=classes)
    return load_coco(*paths, check_images=False).class_names


def _known_by(section: AnnotatedSection, layout: str) -> str:
    """A path in its folder by which a dataset is recognised."""
    if isinstance(section.train, Split):
        return section.train.annotations
    return layout_holds(layout, section.train)


def layout_holds(layout: str, split: str) -> str:
    """A path that a folder in some layout has; empty for a layout of the user's own."""
    if is_foreign(layout):
        return ""
    holds = resolve(LAYOUTS, layout, what="layout").holds
    return str(holds(split) if callable(holds) else holds)


def _check_decode(index: CocoIndex) -> None:
    """Decode every image of a small dataset now, rather than fail in the middle of training."""
    if len(index) > DECODED_FIRST:
        return
    if broken := check_images_decode(index):
        more = f"\n... and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UserError("\n".join(broken[:5]) + more)


def root_of(section: AnnotatedSection, *, holds: str) -> Path:
    """The folder of a dataset: the one that is named, or one in the usual places.

    Args:
        section: The dataset's.
        holds: A path in the folder by which it is recognised.

    Raises:
        UserError: None is named, and there is none in the usual places.
    """
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
        f"dataset {section.name}: not found in {', '.join(map(str, tried))}; name its folder with "
        "--set data.root=DIR"
    )
