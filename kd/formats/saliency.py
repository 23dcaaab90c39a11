"""Datasets of fixations, in the layouts that they are published in.

salicon  `images/train/*.jpg`, `fixations/train/*.mat`, `maps/train/*.png`; `val` likewise
mit1003  `ALLSTIMULI/*.jpeg`, `ALLFIXATIONMAPS/*_fixPts.jpg` and `*_fixMap.jpg`
cat2000  `trainSet/Stimuli/CATEGORY/*.jpg`, `trainSet/FIXATIONLOCS/CATEGORY/*.mat`,
         `trainSet/FIXATIONMAPS/CATEGORY/*.jpg`
osie     `stimuli/*.jpg` and `fixations.npz`: `columns` image, subject, x, y, ... and `data`

Who looked is known of SALICON and OSIE. The others come without a split whose fixations are all
public: theirs is drawn by the names of the images, see `drawn_split`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
)
from kd.formats.splits import drawn_split
from kd.registry import resolve

SPLITS = ("train", "val")
_PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a split is opened.

    Attributes:
        degree: Pixels of a degree of visual angle in the files.
        published: Whether densities are the published maps; else they are drawn from fixations.
        val_share: Of the images, where a split has to be drawn.
        seed: Of that.
    """

    degree: float
    published: bool = False
    val_share: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Layout:
    """How a published dataset lies in its folder.

    Attributes:
        open: Of the folder, a split's name and how.
        holds: A path in the folder by which it is known.
        splits: Names of its own splits, none where they are drawn.
    """

    open: Callable[[Path, str, Wanted], GazeSplit]
    holds: str
    splits: Callable[[Path], Iterable[str]] | None = None


def open_gaze(layout: str, root: Path, split: str, wanted: Wanted) -> GazeSplit:
    """A split of a published dataset.

    Args:
        layout: `salicon`, `mit1003`, `cat2000` or `osie`.
        root: The folder that the dataset was unpacked to.
        split: `train` or `val`, or a folder's name of SALICON.
        wanted: How.

    Raises:
        UserError: An unknown layout, no such split, no image in it, files that are missing.
    """
    made: Layout = resolve(LAYOUTS, layout, what="layout")
    if not (root / made.holds).exists():
        raise UserError(
            f"{root}: no {made.holds} in it, so it is not the folder of {layout}; name that with "
            "--set data.root=DIR"
        )
    known = SPLITS if made.splits is None else sorted(made.splits(root))
    if split not in known:
        raise UserError(f"{root}: {layout} has no split {split!r} there; it has {', '.join(known)}")
    return made.open(root, split, wanted)


def _salicon(root: Path, split: str, wanted: Wanted) -> GazeSplit:
    images = _by_name(root / "images" / split, "")
    gaze = {name: root / "fixations" / split / f"{name}.mat" for name in images}
    maps = {name: root / "maps" / split / f"{name}.png" for name in images}
    reader = SaliconGaze(tuple(gaze.values()))
    return _split(root / "images" / split, images, gaze, maps, reader, wanted)


def _mit1003(root: Path, split: str, wanted: Wanted) -> GazeSplit:
    images = _chosen(_by_name(root / "ALLSTIMULI", ""), split, wanted)
    folder = root / "ALLFIXATIONMAPS"
    points = {name: folder / f"{name}_fixPts.jpg" for name in images}
    maps = {name: folder / f"{name}_fixMap.jpg" for name in images}
    return _split(root, images, points, maps, PointMaps(tuple(points.values())), wanted)


def _cat2000(root: Path, split: str, wanted: Wanted) -> GazeSplit:
    folder = root / "trainSet"
    found: dict[str, Path] = {}
    for category in sorted(path for path in (folder / "Stimuli").iterdir() if path.is_dir()):
        found |= _by_name(category, f"{category.name}/")  # not its folder Output
    images = _chosen(found, split, wanted)
    points = {name: folder / "FIXATIONLOCS" / f"{name}.mat" for name in images}
    maps = {name: folder / "FIXATIONMAPS" / f"{name}.jpg" for name in images}
    return _split(root, images, points, maps, MatPoints(tuple(points.values())), wanted)


def _osie(root: Path, split: str, wanted: Wanted) -> GazeSplit:
    if wanted.published:
        raise UserError(f"{root}: osie has no density maps; --set data.maps=fixations draws them")
    images = _chosen(_by_name(root / "stimuli", ""), split, wanted)
    table = read_table(root / "fixations.npz", list(images))
    return _split(root, images, {}, {}, table, wanted)


def _folders(root: Path) -> list[str]:
    return [path.name for path in (root / "images").glob("*") if path.is_dir()]


SALICON = Layout(_salicon, "fixations", _folders)
MIT1003 = Layout(_mit1003, "ALLFIXATIONMAPS")
CAT2000 = Layout(_cat2000, "trainSet/FIXATIONLOCS")
OSIE = Layout(_osie, "fixations.npz")


def _by_name(folder: Path, before: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; stimuli are expected in it")
    return {
        f"{before}{p.stem}": p for p in sorted(folder.iterdir()) if p.suffix.lower() in _PICTURES
    }


def _chosen(images: dict[str, Path], split: str, wanted: Wanted) -> dict[str, Path]:
    """The images of a split that is drawn."""
    val = drawn_split(list(images), wanted.val_share, wanted.seed)
    return {name: path for name, path in images.items() if (name in val) is (split == "val")}


def _split(
    where: Path,
    images: dict[str, Path],
    points: dict[str, Path],
    maps: dict[str, Path],
    reader: FixationReader,
    wanted: Wanted,
) -> GazeSplit:
    if not images:
        raise UserError(f"{where}: an empty split, there is no image in it")
    needed = [("file of fixations", points)]
    needed += [("density map", maps)] if wanted.published else []
    for what, files in needed:
        _check_there(what, list(files.values()))
    published = tuple(maps.values()) if wanted.published else ()
    return GazeSplit(
        str(where), tuple(images), tuple(images.values()), reader, wanted.degree, published
    )


def _check_there(what: str, files: Sequence[Path]) -> None:
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(
            f"{missing[0]}: this {what} is missing ({len(missing)} of {len(files)} are)"
        )
