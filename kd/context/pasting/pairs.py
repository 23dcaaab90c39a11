"""Choose which object is pasted into which scene for the datasets `in` and `out`.

`in` shows each object in a probable scene and `out` in an improbable one. Both datasets use the
same objects and scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage, optimize

from kd.formats.coco import CocoIndex

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
# image of the index, (K,) classes, (K, 4) boxes xyxy in its pixels -> (K,) log lift over the prior
Score = Callable[[int, Ints, Floats], Floats]

BORDER = 3  # least distance from the image border in pixels: the object and its seam are whole
COVERED = 0.25  # largest fraction of an annotated box that a paste may cover
_WHOLE = 0.9  # least fraction of pixels in one piece; otherwise the object is occluded
_OVERLAP = 0.05  # largest fraction of pixels shared with another object
_NEAR, _MET = 2, 0.3  # contact distance in pixels, and largest fraction of the outline in contact
_SAME_SHAPE = np.log(1.1)  # largest absolute log ratio of the images' aspect ratios
# Sideways shifts to try, in order, as fractions of the image width.
_SHIFTS = np.array([0.0, 0.1, -0.1, 0.2, -0.2, 0.3, -0.3, 0.45, -0.45, 0.6, -0.6])
_EXTREME = 2.0  # nats beyond the margin at which the gain saturates, to avoid extreme scenes only
_JITTER = 2.0  # largest random gain in nats, so that many scenes are used
_TAKEN = 100.0  # gain per used object, larger than the other gains


@dataclass(frozen=True)
class Placement:
    """Placement of an object in a scene."""

    image: int  # image index of the scene
    shift: tuple[int, int]  # x, y offset in pixels of the box after scaling to the scene's size
    lift: float  # log p(class | scene) - log p(class)


@dataclass(frozen=True)
class Pair:
    """An object, its probable placement (`inside`) and its improbable placement (`outside`)."""

    row: int  # annotation of the object
    inside: Placement
    outside: Placement


def interleave_classes(index: CocoIndex, rows: Ints, random: np.random.Generator) -> Ints:
    """Shuffle annotation rows so that classes alternate and none dominates the first rows."""
    shuffled = random.permutation(rows)
    labels = index.labels[shuffled]
    turn = np.zeros(len(rows), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turn[members] = np.arange(len(members))
    return np.asarray(shuffled[np.argsort(turn, kind="stable")], dtype=np.int64)


def is_whole(index: CocoIndex, row: int) -> bool:
    """Return True if an object has an outline, is off the border, in one piece and not occluded."""
    image = index.image_of(row)
    size = index.size_of(image)
    box = index.boxes[row]
    inside = box[:2].min() >= BORDER and (np.array(size[::-1]) - box[2:]).min() >= BORDER
    if not inside or not has_outline(index, row):
        return False
    mask = index.mask_of(row, size)
    if not mask.any():
        return False
    pieces, _ = ndimage.label(mask, np.ones((3, 3)))
    if np.bincount(pieces[mask]).max() < _WHOLE * mask.sum():
        return False
    others = np.zeros(size, np.bool_)
    for other in neighbours(index, row):
        others |= index.mask_of(other, size)
    if (mask & others).sum() > _OVERLAP * mask.sum():
        return False
    # An object in contact with the outline may occlude this one.
    outline = mask & ~ndimage.binary_erosion(mask)
    met = ndimage.binary_dilation(others, np.ones((3, 3)), iterations=_NEAR)
    return bool((outline & met).sum() <= _MET * outline.sum())


def has_outline(index: CocoIndex, row: int) -> bool:
    """Return True if the object's annotation has polygons or RLE."""
    polygon = index.rings_of[row + 1] > index.rings_of[row]
    return bool(polygon or index.rle_first[row + 1] > index.rle_first[row])


def neighbours(index: CocoIndex, row: int) -> list[int]:
    """List other objects with an outline in the same image whose boxes are close to this one's."""
    image = index.image_of(row)
    rows = index.rows_of(image)
    grow = np.array([-_NEAR, -_NEAR, _NEAR, _NEAR], np.float64)
    around = grow + index.boxes[[row]]
    meets = intersections(around, index.boxes[rows].astype(np.float64))[0] > 0
    return [int(r) for r in rows[meets & (rows != row)] if has_outline(index, int(r))]


def intersections(boxes: Floats, others: Floats) -> Floats:
    """Compute intersection areas of boxes (..., 4) with boxes (n, 4), xyxy: (..., n)."""
    low = np.maximum(boxes[..., None, :2], others[:, :2])
    high = np.minimum(boxes[..., None, 2:], others[:, 2:])
    return np.asarray(np.clip(high - low, 0, None).prod(axis=-1), dtype=np.float64)


def scale_between(index: CocoIndex, source: int, target: int) -> float:
    """Compute the factor that preserves an object's size relative to the image's long side."""
    sides = [max(index.size_of(image)) for image in (source, target)]
    return sides[1] / sides[0]


def find_placements(index: CocoIndex, rows: Ints, image: int) -> tuple[Ints, Bools]:
    """Find where N objects fit into a scene, at the same relative height as in their source images.

    An object fits if both images have a similar aspect ratio and its box, shifted sideways if
    needed, is inside the border and covers at most `COVERED` of each annotated box. Returns the
    pixel shifts (N, 2) of the scaled boxes and (N,) True where the object fits.
    """
    size = np.array([index.widths[image], index.heights[image]], np.float64)
    sources = np.searchsorted(index.first, rows, side="right") - 1
    frames = np.stack([index.widths[sources], index.heights[sources]], axis=1).astype(np.float64)
    scale = size.max() / frames.max(axis=1)
    boxes = index.boxes[rows] * scale[:, None]
    # The bottom edge keeps its relative height, the centre its relative distance from the left.
    down = np.rint(boxes[:, 3] / (frames[:, 1] * scale) * size[1] - boxes[:, 3])
    centre = (boxes[:, 0] + boxes[:, 2]) / 2
    home = centre / (frames[:, 0] * scale) * size[0] - centre
    across = np.rint(home[:, None] + _SHIFTS * size[0])  # (N, S)
    moves = np.stack([across, np.broadcast_to(down[:, None], across.shape)], axis=2)
    moved = boxes[:, None] + np.tile(moves, 2)  # (N, S, 4)
    room = (moved[..., :2] >= BORDER).all(axis=2) & (moved[..., 2:] <= size - BORDER).all(axis=2)
    there = index.boxes[index.rows_of(image)].astype(np.float64)
    areas = (there[:, 2:] - there[:, :2]).prod(axis=1)
    room &= (intersections(moved, there) <= COVERED * areas).all(axis=2)
    shape = np.log(frames[:, 0] / frames[:, 1]) - np.log(size[0] / size[1])
    room &= (np.abs(shape) <= _SAME_SHAPE)[:, None] & (sources != image)[:, None]
    first = room.argmax(axis=1)
    return moves[np.arange(len(rows)), first].astype(np.int64), room.any(axis=1)


@dataclass(frozen=True, eq=False)
class Placements:
    """Placements of N objects in each of S scenes."""

    rows: Ints  # (N,) annotation rows of the objects
    scenes: Ints  # (S,) image indices of the scenes
    shifts: Ints  # (N, S, 2) pixels
    lifts: Floats  # (N, S) log lift, NaN where the object does not fit

    def only(self, chosen: Ints) -> Placements:
        """Select objects by index."""
        return Placements(self.rows[chosen], self.scenes, self.shifts[chosen], self.lifts[chosen])

    def place(self, place: int, scene: int) -> Placement:
        """Return the placement of object index `place` in scene index `scene`."""
        x, y = self.shifts[place, scene].tolist()
        return Placement(int(self.scenes[scene]), (x, y), float(self.lifts[place, scene]))


def score_placements(
    index: CocoIndex,
    rows: Ints,
    scenes: Ints,
    score: Score,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Placements:
    """Place each object in each scene and score it; `track` wraps the loop to show progress."""
    shifts = np.zeros((len(rows), len(scenes), 2), np.int64)
    lifts = np.full((len(rows), len(scenes)), np.nan)
    sources = np.searchsorted(index.first, rows, side="right") - 1
    for column in track(range(len(scenes))):
        image = int(scenes[column])
        shifts[:, column], room = find_placements(index, rows, image)
        if not room.any():
            continue
        scale = np.array([scale_between(index, int(source), image) for source in sources[room]])
        boxes = index.boxes[rows[room]] * scale[:, None] + np.tile(shifts[room, column], 2)
        lifts[room, column] = score(image, index.labels[rows[room]].astype(np.int64), boxes)
    return Placements(rows, scenes, shifts, lifts)


def matched_pairs(
    choices: Placements, count: int, margin: float, random: np.random.Generator
) -> list[Pair]:
    """Assign each object a probable and an improbable scene, using the same scenes for both.

    Solves an assignment problem (Kuhn, 1955) to use as many objects as possible, at most `count`.
    `margin` is the least absolute log lift (nats) of a placement; `random` breaks near ties.
    """
    jitter = random.uniform(0.0, _JITTER, choices.lifts.shape)
    while len(choices.rows):
        following, scene = _cycles(choices.lifts, jitter, margin)
        used = np.flatnonzero(following != np.arange(len(following)))
        if len(used) <= count:
            # An object is pasted as improbable into the scene where its predecessor is probable.
            before = np.argsort(following)
            return [
                Pair(int(choices.rows[i]), choices.place(i, scene[i]),
                     choices.place(i, scene[before[i]]))
                for i in used.tolist()
            ]  # fmt: skip
        choices, jitter = choices.only(used[:count]), jitter[used[:count]]
    return []


def _cycles(lifts: Floats, jitter: Floats, margin: float) -> tuple[Ints, Ints]:
    """Return each object's successor (itself if unused) and the scene where both are pasted."""
    inside = _gain(lifts - margin, jitter)
    outside = _gain(-lifts - margin, jitter)
    best = np.empty((len(lifts), len(lifts)))
    through = np.empty(best.shape, np.int64)
    for i, row in enumerate(inside):
        both = row + outside  # (N, S)
        through[i] = both.argmax(axis=1)
        best[i] = both[np.arange(len(both)), through[i]]
    gain = np.where(np.isneginf(best), -_TAKEN * len(lifts), best + _TAKEN)
    np.fill_diagonal(gain, 0.0)
    following = optimize.linear_sum_assignment(gain, maximize=True)[1]
    return following.astype(np.int64), through[np.arange(len(lifts)), following]


def _gain(excess: Floats, jitter: Floats) -> Floats:
    """Score lifts by their `excess` over the margin plus `jitter`; -inf below the margin."""
    with np.errstate(invalid="ignore"):
        return np.where(excess >= 0, np.minimum(excess, _EXTREME) + jitter, -np.inf)
