"""Which objects are pasted where: the same objects and scenes twice, only paired differently.

Each object goes into one scene where it is probable and one where it is not. Every scene that
takes an object in which belongs there takes another in which does not: both sets have the same
cut-outs and the same scenes, each as often, and differ in nothing but who goes where.
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

BORDER = 3  # pixels that an object keeps from the picture's edge: it is whole, and so is its seam
COVERED = 0.25  # most of an annotated object's box that a paste may cover
_WHOLE = 0.9  # of an object's pixels in one piece; less, and something stands before it
_OVERLAP = 0.05  # of its pixels that may belong to another object as well
_NEAR, _MET = 2, 0.3  # pixels that count as touching, and most of its outline that may be touched
_SAME_SHAPE = np.log(1.1)  # of a picture's width over height
_SHIFTS = np.array([0.0, 0.1, -0.1, 0.2, -0.2, 0.3, -0.3, 0.45, -0.45, 0.6, -0.6])  # of the width
_EXTREME = 2.0  # nats beyond the margin; more counts no more, so that scenes are not all extremes
_JITTER = 2.0  # nats: what is about as good is drawn at random, so that many scenes are used
_TAKEN = 100.0  # gain of an object that is used; above what any of the others can add up to


@dataclass(frozen=True)
class Place:
    """One object in one scene.

    Attributes:
        image: The scene, a position in the index.
        shift: x, y whole pixels, added to the object's box scaled to the scene's size.
        lift: log p(class | scene) - log p(class).
    """

    image: int
    shift: tuple[int, int]
    lift: float


@dataclass(frozen=True)
class Pair:
    """One object, where it belongs and where it does not."""

    row: int
    inside: Place
    outside: Place


def turns(index: CocoIndex, rows: Ints, random: np.random.Generator) -> Ints:
    """Rows in an order in which classes take turns, so that no class fills the set."""
    shuffled = random.permutation(rows)
    labels = index.labels[shuffled]
    turn = np.zeros(len(rows), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turn[members] = np.arange(len(members))
    return np.asarray(shuffled[np.argsort(turn, kind="stable")], dtype=np.int64)


def can_be_cut(index: CocoIndex, row: int) -> bool:
    """Whether an object has an outline and is whole: off the border, in one piece, not covered."""
    image = index.image_of(row)
    size = (int(index.heights[image]), int(index.widths[image]))
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
    # Where another object meets the outline, it may stand before this one and cut it off.
    outline = mask & ~ndimage.binary_erosion(mask)
    met = ndimage.binary_dilation(others, np.ones((3, 3)), iterations=_NEAR)
    return bool((outline & met).sum() <= _MET * outline.sum())


def has_outline(index: CocoIndex, row: int) -> bool:
    """Whether the JSON has a polygon or run lengths for an object."""
    polygon = index.rings_of[row + 1] > index.rings_of[row]
    return bool(polygon or index.rle_first[row + 1] > index.rle_first[row])


def neighbours(index: CocoIndex, row: int) -> list[int]:
    """Other objects of the image that have an outline and whose boxes come near this one's."""
    image = index.image_of(row)
    rows = np.arange(int(index.first[image]), int(index.first[image + 1]))
    grow = np.array([-_NEAR, -_NEAR, _NEAR, _NEAR], np.float64)
    around = grow + index.boxes[[row]]
    meets = intersections(around, index.boxes[rows].astype(np.float64))[0] > 0
    return [int(r) for r in rows[meets & (rows != row)] if has_outline(index, int(r))]


def intersections(boxes: Floats, others: Floats) -> Floats:
    """(..., n) areas that boxes (..., 4) share with boxes (n, 4), xyxy."""
    low = np.maximum(boxes[..., None, :2], others[:, :2])
    high = np.minimum(boxes[..., None, 2:], others[:, 2:])
    return np.asarray(np.clip(high - low, 0, None).prod(axis=-1), dtype=np.float64)


def scale_between(index: CocoIndex, source: int, target: int) -> float:
    """What an object's size is multiplied by, so that it has the same share of the long side."""
    sides = [max(int(index.heights[i]), int(index.widths[i])) for i in (source, target)]
    return sides[1] / sides[0]


def place_in(index: CocoIndex, rows: Ints, image: int) -> tuple[Ints, Bools]:
    """Where objects can stand in a scene: at the height they had, as near as can be sideways.

    Args:
        index: The data set.
        rows: The objects, N.
        image: The scene.

    Returns:
        (N, 2) whole pixels to shift the scaled boxes by, and (N,) whether there is room: a picture
        of the same shape, inside its border, and `COVERED` kept for every object that is there.
    """
    size = np.array([index.widths[image], index.heights[image]], np.float64)
    sources = np.searchsorted(index.first, rows, side="right") - 1
    frames = np.stack([index.widths[sources], index.heights[sources]], axis=1).astype(np.float64)
    scale = size.max() / frames.max(axis=1)
    boxes = index.boxes[rows] * scale[:, None]
    # The bottom line keeps its height in the picture, the centre its distance from the left.
    down = np.rint(boxes[:, 3] / (frames[:, 1] * scale) * size[1] - boxes[:, 3])
    centre = (boxes[:, 0] + boxes[:, 2]) / 2
    home = centre / (frames[:, 0] * scale) * size[0] - centre
    across = np.rint(home[:, None] + _SHIFTS * size[0])  # (N, S)
    moves = np.stack([across, np.broadcast_to(down[:, None], across.shape)], axis=2)
    moved = boxes[:, None] + np.tile(moves, 2)  # (N, S, 4)
    room = (moved[..., :2] >= BORDER).all(axis=2) & (moved[..., 2:] <= size - BORDER).all(axis=2)
    there = index.boxes[int(index.first[image]) : int(index.first[image + 1])].astype(np.float64)
    areas = (there[:, 2:] - there[:, :2]).prod(axis=1)
    room &= (intersections(moved, there) <= COVERED * areas).all(axis=2)
    shape = np.log(frames[:, 0] / frames[:, 1]) - np.log(size[0] / size[1])
    room &= (np.abs(shape) <= _SAME_SHAPE)[:, None] & (sources != image)[:, None]
    first = room.argmax(axis=1)
    return moves[np.arange(len(rows)), first].astype(np.int64), room.any(axis=1)


@dataclass(frozen=True, eq=False)
class Choices:
    """Every object in every scene, N objects and S scenes.

    Attributes:
        rows: (N,) objects.
        scenes: (S,) images of the index.
        shifts: (N, S, 2) whole pixels.
        lifts: (N, S) log lift, NaN where there is no room.
    """

    rows: Ints
    scenes: Ints
    shifts: Ints
    lifts: Floats

    def only(self, kept: Ints) -> Choices:
        """Some of the objects."""
        return Choices(self.rows[kept], self.scenes, self.shifts[kept], self.lifts[kept])

    def place(self, place: int, scene: int) -> Place:
        """One object in one scene."""
        x, y = self.shifts[place, scene].tolist()
        return Place(int(self.scenes[scene]), (x, y), float(self.lifts[place, scene]))


def all_choices(
    index: CocoIndex,
    rows: Ints,
    scenes: Ints,
    score: Score,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Choices:
    """Find a place for every object in every scene, and how probable it is there.

    Args:
        index: The data set.
        rows: The objects.
        scenes: The images to try.
        score: Log lift of classes at boxes of an image.
        watch: Shows a bar around the scenes gone through.
    """
    shifts = np.zeros((len(rows), len(scenes), 2), np.int64)
    lifts = np.full((len(rows), len(scenes)), np.nan)
    sources = np.searchsorted(index.first, rows, side="right") - 1
    for column in watch(range(len(scenes))):
        image = int(scenes[column])
        shifts[:, column], room = place_in(index, rows, image)
        if not room.any():
            continue
        scale = np.array([scale_between(index, int(source), image) for source in sources[room]])
        boxes = index.boxes[rows[room]] * scale[:, None] + np.tile(shifts[room, column], 2)
        lifts[room, column] = score(image, index.labels[rows[room]].astype(np.int64), boxes)
    return Choices(rows, scenes, shifts, lifts)


def matched_pairs(
    choices: Choices, count: int, margin: float, random: np.random.Generator
) -> list[Pair]:
    """Send each object to a probable and an improbable scene, both sets using the same scenes.

    A scene's two guests are a step from one object to the next, and steps close to rings: an
    assignment of objects to objects (Kuhn, 1955), which takes in as many of them as can be.

    Args:
        choices: Objects, the most wanted first.
        count: Most pairs to return.
        margin: Nats that the lift lies above 0 in the one scene and below in the other.
        random: Chooses among what is about as good.

    Returns:
        Pairs in the order of `choices`; as many as could be had.
    """
    jitter = random.uniform(0.0, _JITTER, choices.lifts.shape)
    while len(choices.rows):
        following, scene = _rings(choices.lifts, jitter, margin)
        used = np.flatnonzero(following != np.arange(len(following)))
        if len(used) <= count:
            before = np.argsort(following)  # whose step leads here: its scene has this one outside
            return [
                Pair(int(choices.rows[i]), choices.place(i, scene[i]),
                     choices.place(i, scene[before[i]]))
                for i in used.tolist()
            ]  # fmt: skip
        choices, jitter = choices.only(used[:count]), jitter[used[:count]]
    return []


def _rings(lifts: Floats, jitter: Floats, margin: float) -> tuple[Ints, Ints]:
    """The next object of each on its ring, itself where it is on none, and the scene they share."""
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
    """What a lift that far beyond the margin is worth; minus infinity below it."""
    with np.errstate(invalid="ignore"):
        return np.where(excess >= 0, np.minimum(excess, _EXTREME) + jitter, -np.inf)
