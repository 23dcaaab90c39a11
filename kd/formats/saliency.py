"""Fixation datasets in their published layouts.

- salicon: `images/train/*.jpg`, `fixations/train/*.mat`, `maps/train/*.png`; `val` likewise
- mit1003: `ALLSTIMULI/*.jpeg`, `ALLFIXATIONMAPS/*_fixPts.jpg` and `*_fixMap.jpg`
- cat2000: `CATEGORY/*` in `trainSet/Stimuli`, `trainSet/FIXATIONLOCS`, `trainSet/FIXATIONMAPS`
- osie: `stimuli/*.jpg` and `fixations.npz` with `columns` image, subject, x, y, ... and `data`

SALICON and OSIE identify observers. Only SALICON has published splits; the other datasets are split
at random by image name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kd.errors import UserError
from kd.formats import LAYOUTS
from kd.formats.fixations import (
    Fixations,
    GazeSplit,
    read_cat2000,
    read_mit1003,
    read_salicon,
    read_table,
)  # fmt: skip
from kd.formats.splits import Layout, check_files, images_in, random_split
from kd.registry import resolve


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Options for opening a split of a fixation dataset.

    `degree` is in image pixels per degree of visual angle. If `published`, published density maps
    replace maps drawn from fixations. `val_fraction` and `seed` define a random val split.
    """

    degree: float
    published: bool = False
    val_fraction: float = 0.2
    seed: int = 0


def open_gaze(layout: str, root: Path, split: str, options: SplitOptions) -> GazeSplit:
    """Open the `train` or `val` split of a published dataset, or any split folder of SALICON."""
    found: Layout = resolve(LAYOUTS, layout, what="layout")
    found.check(root, layout, split)
    opened: GazeSplit = found.open(root, split, options)
    return opened


def _salicon(root: Path, split: str, options: SplitOptions) -> GazeSplit:
    return _split(
        root / "images" / split, images_in(root / "images" / split), options, read_salicon,
        points=lambda name: root / "fixations" / split / f"{name}.mat",
        maps=lambda name: root / "maps" / split / f"{name}.png",
    )  # fmt: skip


def _mit1003(root: Path, split: str, options: SplitOptions) -> GazeSplit:
    folder = root / "ALLFIXATIONMAPS"
    return _split(
        root, _random(images_in(root / "ALLSTIMULI"), split, options), options, read_mit1003,
        points=lambda name: folder / f"{name}_fixPts.jpg",
        maps=lambda name: folder / f"{name}_fixMap.jpg",
    )  # fmt: skip


def _cat2000(root: Path, split: str, options: SplitOptions) -> GazeSplit:
    folder = root / "trainSet"
    found: dict[str, Path] = {}
    for category in sorted(path for path in (folder / "Stimuli").iterdir() if path.is_dir()):
        images = images_in(category)  # without those in the subfolder Output
        found |= {f"{category.name}/{name}": path for name, path in images.items()}
    return _split(
        root, _random(found, split, options), options, read_cat2000,
        points=lambda name: folder / "FIXATIONLOCS" / f"{name}.mat",
        maps=lambda name: folder / "FIXATIONMAPS" / f"{name}.jpg",
    )  # fmt: skip


def _osie(root: Path, split: str, options: SplitOptions) -> GazeSplit:
    if options.published:
        raise UserError(f"{root}: osie has no density maps; use --set data.maps=fixations")
    images = _random(images_in(root / "stimuli"), split, options)
    table = read_table(root / "fixations.npz", list(images))
    paths = tuple(images.values())
    return GazeSplit(str(root), paths, partial(_of_table, table), options.degree)


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
    options: SplitOptions,
    read: Callable[[Path, tuple[int, int]], Fixations],
    *,
    points: Callable[[str], Path],
    maps: Callable[[str], Path],
) -> GazeSplit:
    """Build a split; `points` and `maps` map an image name to its fixation and density file."""
    if not images:
        raise UserError(f"{where}: empty split: no images")
    files = tuple(map(points, images))
    published = tuple(map(maps, images)) if options.published else ()
    check_files({"file of fixations": files, "density map": published})
    reader = partial(_of_file, read, files)
    return GazeSplit(str(where), tuple(images.values()), reader, options.degree, published)


# Readers are partials of module-level functions because they are pickled with the samples.
def _of_file(
    read: Callable[[Path, tuple[int, int]], Fixations],
    files: Sequence[Path],
    number: int,
    size: tuple[int, int],
) -> Fixations:
    return read(files[number], size)


def _of_table(table: Sequence[Fixations], number: int, size: tuple[int, int]) -> Fixations:
    return table[number]
