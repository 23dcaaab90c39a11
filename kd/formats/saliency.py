"""Fixation datasets in their published layouts.

salicon  `images/train/*.jpg`, `fixations/train/*.mat`, `maps/train/*.png`; `val` likewise
mit1003  `ALLSTIMULI/*.jpeg`, `ALLFIXATIONMAPS/*_fixPts.jpg` and `*_fixMap.jpg`
cat2000  `trainSet/Stimuli/CATEGORY/*.jpg`, `trainSet/FIXATIONLOCS/CATEGORY/*.mat`,
         `trainSet/FIXATIONMAPS/CATEGORY/*.jpg`
osie     `stimuli/*.jpg` and `fixations.npz`: `columns` image, subject, x, y, ... and `data`

SALICON and OSIE identify observers. The others have no split with public fixations: theirs is drawn
from the image names, see `random_split`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kd.errors import UserError
from kd.formats import LAYOUTS
from kd.formats.fixations import (
    FixationReader,
    GazeSplit,
    MatPoints,
    PointMaps,
    SaliconGaze,
    read_table,
)  # fmt: skip
from kd.formats.splits import Layout, check_files, images_in, random_split
from kd.registry import resolve


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How a split is opened.

    Attributes:
        degree: Pixels of the files per degree of visual angle.
        published: Use the published density maps instead of drawing them from fixations.
        val_fraction: Fraction of the images in a random val split.
        seed: Seed of a random split.
    """

    degree: float
    published: bool = False
    val_fraction: float = 0.2
    seed: int = 0


def open_gaze(layout: str, root: Path, split: str, options: SplitOptions) -> GazeSplit:
    """Open a split of a published dataset: `train` or `val`, or a folder's name of SALICON."""
    found: Layout = resolve(LAYOUTS, layout, what="layout")
    found.check(root, layout, split)
    opened: GazeSplit = found.open(root, split, options)
    return opened


def _salicon(root: Path, split: str, options: SplitOptions) -> GazeSplit:
    images = images_in(root / "images" / split)
    gaze = {name: root / "fixations" / split / f"{name}.mat" for name in images}
    maps = {name: root / "maps" / split / f"{name}.png" for name in images}
    reader = SaliconGaze(tuple(gaze.values()))
    return _split(root / "images" / split, images, gaze, maps, reader, options)


def _mit1003(root: Path, split: str, options: SplitOptions) -> GazeSplit:
    images = _random(images_in(root / "ALLSTIMULI"), split, options)
    folder = root / "ALLFIXATIONMAPS"
    points = {name: folder / f"{name}_fixPts.jpg" for name in images}
    maps = {name: folder / f"{name}_fixMap.jpg" for name in images}
    return _split(root, images, points, maps, PointMaps(tuple(points.values())), options)


def _cat2000(root: Path, split: str, options: SplitOptions) -> GazeSplit:
    folder = root / "trainSet"
    found: dict[str, Path] = {}
    for category in sorted(path for path in (folder / "Stimuli").iterdir() if path.is_dir()):
        images = images_in(category)  # skips its subfolder Output
        found |= {f"{category.name}/{name}": path for name, path in images.items()}
    images = _random(found, split, options)
    points = {name: folder / "FIXATIONLOCS" / f"{name}.mat" for name in images}
    maps = {name: folder / "FIXATIONMAPS" / f"{name}.jpg" for name in images}
    return _split(root, images, points, maps, MatPoints(tuple(points.values())), options)


def _osie(root: Path, split: str, options: SplitOptions) -> GazeSplit:
    if options.published:
        raise UserError(f"{root}: osie has no density maps; --set data.maps=fixations draws them")
    images = _random(images_in(root / "stimuli"), split, options)
    table = read_table(root / "fixations.npz", list(images))
    return _split(root, images, {}, {}, table, options)


def _folders(root: Path) -> list[str]:
    return [path.name for path in (root / "images").glob("*") if path.is_dir()]


SALICON = Layout(_salicon, "fixations", _folders)
MIT1003 = Layout(_mit1003, "ALLFIXATIONMAPS")
CAT2000 = Layout(_cat2000, "trainSet/FIXATIONLOCS")
OSIE = Layout(_osie, "fixations.npz")


def _random(images: dict[str, Path], split: str, options: SplitOptions) -> dict[str, Path]:
    val = random_split(list(images), options.val_fraction, options.seed)
    return {name: path for name, path in images.items() if (name in val) is (split == "val")}


def _split(
    where: Path,
    images: dict[str, Path],
    points: dict[str, Path],
    maps: dict[str, Path],
    reader: FixationReader,
    options: SplitOptions,
) -> GazeSplit:
    if not images:
        raise UserError(f"{where}: empty split: no images")
    published = tuple(maps.values()) if options.published else ()
    check_files({"file of fixations": tuple(points.values()), "density map": published})
    return GazeSplit(
        str(where), tuple(images), tuple(images.values()), reader, options.degree, published
    )
