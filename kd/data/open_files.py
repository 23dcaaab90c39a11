"""Where a data set lies: its folder found, its two splits read and checked."""

from __future__ import annotations

import os
from pathlib import Path

from kd.config.datasets import Split
from kd.data.scenes import categories, generate_scenes
from kd.errors import UserError
from kd.formats.coco import CocoIndex, check_images_decode, load_coco
from kd.formats.to_coco import LAYOUTS, made_split
from kd.problems.objects.schema import ObjectsSection
from kd.problems.saliency.schema import SaliencySection
from kd.problems.segmentation.schema import SegmentationSection

# Where data sets made here, and the small real one, are looked for below the working folder.
DATASETS = Path("datasets")
# Images of a split that are all decoded before training starts: two seconds for so many.
DECODED_FIRST = 2000


def open_annotated(
    section: ObjectsSection | SegmentationSection | SaliencySection, *, images: bool = True
) -> tuple[CocoIndex, CocoIndex]:
    """Both splits of a data set of annotated objects, checked.

    The scenes are made where they are not there, COCO JSONs where the layout is another.

    Args:
        section: Of objects, or of label maps or gaze that follow from annotations.
        images: Whether images are needed.

    Raises:
        UserError: What `load_coco`, `generate_scenes` and `made_split` raise, or no root.
    """
    if section.generate is not None:
        made = section.generate
        generate_scenes(
            root_of(section, holds=_known_by(section)), train=made.train, val=made.val,
            size=made.size, seed=made.seed, workers=os.cpu_count() or 1, progress=True,
        )  # fmt: skip
    first = load_coco(*split_paths(section, section.train), check_images=images)
    second = load_coco(
        *split_paths(section, section.val), check_images=images, categories_from=first
    )
    if section.generate is None and images:  # what was made here is whole
        for index in (first, second):
            _check_decode(index)
    return first, second


def split_paths(
    section: ObjectsSection | SegmentationSection | SaliencySection, split: str | Split
) -> tuple[Path, Path]:
    """A split's COCO JSON, made if its layout is another, and the folder of its images.

    Raises:
        UserError: The data set is not there, or what `made_split` raises.
    """
    root = root_of(section, holds=_known_by(section))
    if isinstance(split, Split):
        return root / split.annotations, root / split.images
    classes = section.classes if isinstance(section, ObjectsSection) else None
    return made_split(_layout_of(section), root, split, classes)


def train_annotations(section: ObjectsSection) -> Path | None:
    """The JSON of the train split; None where it is not, or no longer, there."""
    try:
        path = split_paths(section, section.train)[0]
    except UserError:
        return None
    return path if path.is_file() else None


def _known_by(section: ObjectsSection | SegmentationSection | SaliencySection) -> str:
    """A path below its root that a data set has."""
    if isinstance(section.train, Split):
        return section.train.annotations
    return LAYOUTS[_layout_of(section)].holds(section.train)


def _layout_of(section: ObjectsSection | SegmentationSection | SaliencySection) -> str:
    """Of boxes that are no COCO JSON; the schema sees to it that only such splits are names."""
    assert isinstance(section, ObjectsSection) and section.made_from is not None
    return section.made_from


def class_names(section: ObjectsSection) -> tuple[str, ...]:
    """The class names of a data set, without its images.

    Raises:
        UserError: It is not there.
    """
    if section.generate is not None:
        return tuple(entry["name"] for entry in categories())
    return load_coco(*split_paths(section, section.train), check_images=False).class_names


def _check_decode(index: CocoIndex) -> None:
    """Decode every image of a small data set now, rather than stop in the middle of training."""
    if len(index) > DECODED_FIRST:
        return
    if broken := check_images_decode(index):
        more = f"\n... and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UserError("\n".join(broken[:5]) + more)


def root_of(section: ObjectsSection | SegmentationSection | SaliencySection, *, holds: str) -> Path:
    """The folder of a data set: the one that is named, or one that has something in it.

    Args:
        section: The data set.
        holds: A path in the folder by which it is known.

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
        f"data set {section.name}: not found in {', '.join(map(str, tried))}; name its folder with "
        "--set data.root=DIR"
    )
