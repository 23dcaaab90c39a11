"""Generative model of the embedded scenes, and the exact posterior of a hidden object's class.

A scene is sampled in this order; every factor is a normalised distribution:

1. the kind of scene (harbour, kitchen, ...), uniform, and the horizon, which only affects pixels;
2. the number of objects and their centres, independent of kind and class; the centre's row gives
the object's place (top, middle, bottom);
3. the classes, from left to right: `p(c_i | kind, c_<i) = softmax_c(log_base[kind, place_i, c] +
sum_j<i pull[c, c_j] * nearness_ij)`;
4. width and height of each box, even integers, given class and place.

Classes with the same look have the same sizes: only context separates them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from kd.errors import UserError
from kd.scenes import vocabulary as tables

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Given = Literal["pixels", "annotations", "both"]

CANVAS = 64  # scenes are laid out on 64 x 64 units, independent of the image size
SIZES = np.arange(8, 23, 2)  # even, so that centres are integers
COLUMNS = (11, 53)  # centre columns that keep the largest box inside the image
BANDS = ((11, 18), (23, 36), (41, 53))  # rows of centres at the top, middle, bottom, with gaps
BAND_FRACTIONS = (0.25, 0.35, 0.40)  # probabilities of the three bands
COUNTS = (4, 7)  # smallest and largest number of objects in a scene
MIN_DISTANCE = 12.0  # above half the largest box, so that no object covers another's centre
HORIZONS = (18, 25)  # smallest and largest row of the horizon


@dataclass(frozen=True)
class World:
    """Parameters of the model, for K kinds, P places, C classes and S sizes."""

    kinds: tuple[str, ...]  # names of the kinds of scenes
    classes: tuple[str, ...]  # names of the classes
    looks: Ints  # (C,), index of each class's look; classes with the same look are confusable
    log_base: Floats  # (K, P, C), log weight of each class, up to a constant
    pull: Floats  # (C, C) symmetric, change of a class's log odds by another class at distance 0
    log_width: Floats  # (C, P, S), log probability of each of `SIZES` as the width
    log_height: Floats  # (C, P, S), log probability of each of `SIZES` as the height
    reach: float  # range of the pull, in units of the canvas


@dataclass(frozen=True)
class Scene:
    """A sampled scene before rendering; its n objects are ordered from left to right."""

    kind: int  # index into the world's kinds
    horizon: int  # row of the horizon, in units of the canvas; affects the image only
    classes: Ints  # (n,), class of each object
    boxes: Ints  # (n, 4), x, y, width, height in integer units of the canvas

    @property
    def places(self) -> Ints:
        """Index of the place (top, middle, bottom) of each object, (n,)."""
        return place_of(self.boxes)


def build_world() -> World:
    """Build the parameters from the tables in `kd.scenes.vocabulary`."""
    classes = tuple(tables.CLASSES)
    number = {name: i for i, name in enumerate(classes)}
    looks = tuple(tables.LOOK_SIZES)
    base = [[[w.get(c, 0.0) for c in classes] for w in places] for places in tables.BASE.values()]
    pull = np.zeros((len(classes), len(classes)))
    for strength, pairs in ((1.0, tables.FRIENDS), (-1.0, _repulsions())):
        for name, others in pairs.items():
            for other in others:
                pull[number[name], number[other]] += strength * tables.PULL
                pull[number[other], number[name]] += strength * tables.PULL
    look_of = [looks.index(tables.CLASSES[name][0]) for name in classes]
    typical = np.array([tables.LOOK_SIZES[looks[look]] for look in look_of])  # (C, 2)
    return World(
        kinds=tuple(tables.BASE),
        classes=classes,
        looks=np.array(look_of),
        log_base=np.log(np.array(base) + tables.FLOOR),
        pull=pull,
        log_width=_log_sizes(typical[:, 0]),
        log_height=_log_sizes(typical[:, 1]),
        reach=tables.REACH,
    )


def _repulsions() -> dict[str, list[str]]:
    """Find the classes that each class repels: the companions of its confusable partner."""
    repulsions: dict[str, list[str]] = {}
    for name, friends in tables.FRIENDS.items():
        look = tables.CLASSES[name][0]
        for other, (other_look, _) in tables.CLASSES.items():
            if other_look == look and other != name:
                repulsions.setdefault(other, []).extend(friends)
    return repulsions


def _log_sizes(typical: npt.NDArray[Any]) -> Floats:
    """Discretised log-normal distributions of sizes around `typical` (C,), by place: (C, P, S)."""
    centre = np.log(typical[:, None, None] * np.array(tables.PLACE_SCALE)[None, :, None])
    log_weight = -((np.log(SIZES) - centre) ** 2) / (2 * tables.SIZE_SPREAD**2)
    return np.asarray(log_softmax(log_weight, axis=-1))


WORLD = build_world()


def place_of(boxes: Ints) -> Ints:
    """Find the place (top, middle, bottom) of each box (n, 4) from the row of its centre."""
    rows = boxes[:, 1] + boxes[:, 3] / 2
    edges = [(above[1] + below[0]) / 2 for above, below in pairwise(BANDS)]
    return np.asarray(np.searchsorted(edges, rows), dtype=np.int64)


def nearness(boxes: Ints, reach: float) -> Floats:
    """Interaction strength (n, n) between boxes (n, 4): 1 at distance 0."""
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    near: Floats = np.exp(-((centres[:, None] - centres) ** 2).sum(axis=2) / (2 * reach**2))
    return near


def sample_scene(rng: np.random.Generator, *, world: World = WORLD) -> Scene:
    """Sample a scene."""
    kind = int(rng.integers(len(world.kinds)))
    horizon = int(rng.integers(HORIZONS[0], HORIZONS[1] + 1))
    centres = _sample_centres(rng)
    points = np.concatenate([centres, np.zeros_like(centres)], axis=1)
    places, near = place_of(points), nearness(points, world.reach)
    classes = np.zeros(len(centres), dtype=np.int64)
    sizes = np.zeros_like(centres)
    for i, place in enumerate(places):
        logits = world.log_base[kind, place] + near[i, :i] @ world.pull[classes[:i]]
        classes[i] = _draw(rng, log_softmax(logits))
        for axis, table in enumerate((world.log_width, world.log_height)):
            sizes[i, axis] = SIZES[_draw(rng, table[classes[i], place])]
    boxes = np.concatenate([centres - sizes // 2, sizes], axis=1)
    return Scene(kind, horizon, classes, boxes)


def _draw(rng: np.random.Generator, log_probs: Floats) -> int:
    """Sample a categorical variable."""
    cumulative = np.cumsum(np.exp(log_probs))
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def _sample_centres(rng: np.random.Generator) -> Ints:
    """Sample centres (n, 2), ordered from left to right, with a minimum distance."""
    count = int(rng.integers(COUNTS[0], COUNTS[1] + 1))
    centres: list[tuple[int, int]] = []
    while len(centres) < count:
        band = BANDS[int(np.searchsorted(np.cumsum(BAND_FRACTIONS)[:-1], rng.random()))]
        x = int(rng.integers(COLUMNS[0], COLUMNS[1] + 1))
        y = int(rng.integers(band[0], band[1] + 1))
        if all((x - a) ** 2 + (y - b) ** 2 >= MIN_DISTANCE**2 for a, b in centres):
            centres.append((x, y))
    return np.array(sorted(centres), dtype=np.int64)


def exact_posteriors(scene: Scene, *, given: Given = "pixels", world: World = WORLD) -> Floats:
    """Exact class posterior (n, C) of each object when only that object is hidden.

    Args:
        scene: The scene; boxes are always given, the hidden object's class never.
        given: Further evidence. `pixels`: the kind of scene and the *look* of the other objects.
            `annotations`: the classes of the other objects. `both`: the kind of scene and the
            classes of the other objects.
        world: The model.
    """
    if given not in get_args(Given):
        raise UserError(f"given: got {given!r}, expected one of {', '.join(get_args(Given))}")
    every = np.arange(len(world.classes))
    kinds = np.arange(len(world.kinds)) if given == "annotations" else np.array([scene.kind])
    known = [np.array([c]) for c in scene.classes]
    if given == "pixels":
        known = [np.flatnonzero(world.looks == world.looks[c]) for c in scene.classes]
    guesses = [_product([*known[:i], every, *known[i + 1 :]]) for i in range(len(known))]
    log_joint = log_density(scene.boxes, np.concatenate(guesses), kinds, world=world)
    posteriors = np.zeros((len(guesses), len(every)))
    start = 0
    for i, (row, rows) in enumerate(zip(posteriors, guesses, strict=True)):
        own = log_joint[:, start : start + len(rows)]
        weight = np.exp(own - own.max()).sum(axis=0)
        row += np.bincount(rows[:, i], weights=weight / weight.sum(), minlength=len(every))
        start += len(rows)
    return posteriors


def _product(options: Sequence[Ints]) -> Ints:
    """Cartesian product (A, n) of n lists of options."""
    picks = np.indices([len(option) for option in options]).reshape(len(options), -1)
    return np.stack([o[pick] for o, pick in zip(options, picks, strict=True)], axis=1)


def log_density(boxes: Ints, classes: Ints, kinds: Ints, *, world: World = WORLD) -> Floats:
    """Joint log density (K, A) of kind, classes and sizes, without the centres' constant density.

    Args:
        boxes: (n, 4), ordered from left to right.
        classes: (A, n) class assignments to evaluate.
        kinds: (K,) kinds of scenes to evaluate.
        world: The model.
    """
    count, options = classes.T.shape
    places, guesses = place_of(boxes), classes.T  # (n, A)
    which = np.arange(count)[:, None]
    before = np.tril(nearness(boxes, world.reach), -1)  # only objects to the left interact
    pulls = (before @ world.pull[guesses].reshape(count, -1)).reshape(count, options, -1)
    columns = np.searchsorted(SIZES, boxes[:, 2:])
    taken = (
        pulls[which, np.arange(options), guesses]
        + world.log_width[guesses, places[:, None], columns[:, :1]]
        + world.log_height[guesses, places[:, None], columns[:, 1:]]
    )
    base = world.log_base[kinds][:, places]  # (K, n, C)
    # All kinds share exp(pulls), so the normalisers are a matrix product.
    norms = np.log(np.exp(pulls) @ np.exp(base).transpose(1, 2, 0))  # (n, A, K)
    chosen = base[:, which, guesses].sum(axis=1)  # (K, A)
    log_joint: Floats = chosen + taken.sum(axis=0) - norms.sum(axis=0).T
    return log_joint - math.log(len(world.kinds))
