"""The generative model behind the embedded scenes, and the exact posterior of a hidden object.

A scene is drawn in this order, and every factor is a normalised distribution:

1. its kind (harbour, kitchen, ...), uniform, and its horizon, which matters to the image only;
2. the number of objects and their centres, blind to kind and class. A centre's height gives its
   place (top, middle, bottom), so that a box alone tells the place;
3. the classes, from left to right: `p(c_i | kind, c_<i) = softmax_c(log_base[kind, place_i, c] +
   sum_j<i pull[c, c_j] * nearness_ij)`: what belongs there, and what comes with its neighbours;
4. width and height of each box given class and place, on a grid of even numbers.

Centres and sizes are whole, so boxes are written without rounding and the posterior stays exact.
Classes that share a look share their sizes too: nothing but context tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from kd.errors import UserError
from kd.scenes import vocabulary as tables

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Given = Literal["pixels", "annotations", "both"]

CANVAS = 64  # scenes are laid out on 64 x 64 units, whatever the size of the image
SIZES = np.arange(8, 23, 2)  # even, so that a centre is whole
COLUMNS = (11, 53)  # centres keep the largest box inside the image
BANDS = ((11, 18), (23, 36), (41, 53))  # centre rows of top, middle, bottom; gaps keep them apart
BAND_SHARE = (0.25, 0.35, 0.40)
COUNTS = (4, 7)
MIN_DISTANCE = 12.0  # over the largest half box: no object can cover the centre of another
HORIZONS = (18, 25)


@dataclass(frozen=True)
class World:
    """Everything the model knows, as arrays.

    K kinds, P places, C classes, S sizes.

    Attributes:
        kinds: Names of the kinds of scene.
        classes: Names of the classes.
        looks: (C,) index of each class's look; equal numbers look alike.
        log_base: (K, P, C) what belongs where, up to a constant.
        pull: (C, C) symmetric; how much a class at distance 0 raises the log odds of another.
        log_width: (C, P, S) log probability of each of `SIZES`.
        log_height: (C, P, S) likewise.
        reach: How far the pull reaches, in units of the canvas.
    """

    kinds: tuple[str, ...]
    classes: tuple[str, ...]
    looks: Ints
    log_base: Floats
    pull: Floats
    log_width: Floats
    log_height: Floats
    reach: float


@dataclass(frozen=True)
class Scene:
    """A scene before it is painted; its objects stand in canonical order, left to right.

    Attributes:
        kind: Index into the world's kinds.
        horizon: Row of the horizon, in units of the canvas; for the image only.
        classes: (n,) class of each object.
        boxes: (n, 4) x, y, width, height in whole units of the canvas.
    """

    kind: int
    horizon: int
    classes: Ints
    boxes: Ints

    @property
    def places(self) -> Ints:
        """(n,) place of each object, from its box alone."""
        return place_of(self.boxes)


def build_world() -> World:
    """Turn the tables into arrays."""
    classes = tuple(tables.CLASSES)
    number = {name: i for i, name in enumerate(classes)}
    looks = tuple(tables.LOOK_SIZES)
    base = [[[w.get(c, 0.0) for c in classes] for w in places] for places in tables.BASE.values()]
    pull = np.zeros((len(classes), len(classes)))
    for strength, pairs in ((1.0, tables.FRIENDS), (-1.0, _foes())):
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


def _foes() -> dict[str, list[str]]:
    """What draws one look-alike keeps the other away: a pull without this would say too little."""
    foes: dict[str, list[str]] = {}
    for name, friends in tables.FRIENDS.items():
        look = tables.CLASSES[name][0]
        for other, (other_look, _) in tables.CLASSES.items():
            if other_look == look and other != name:
                foes.setdefault(other, []).extend(friends)
    return foes


def _log_sizes(typical: npt.NDArray[Any]) -> Floats:
    """Discretised log-normal around (C,) typical sizes, larger towards the viewer: (C, P, S)."""
    centre = np.log(typical[:, None, None] * np.array(tables.PLACE_SCALE)[None, :, None])
    log_weight = -((np.log(SIZES) - centre) ** 2) / (2 * tables.SIZE_SPREAD**2)
    return _log_softmax(log_weight)


def _log_softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_probs


WORLD = build_world()


def place_of(boxes: Ints) -> Ints:
    """Index of the place of each (n, 4) box: top, middle or bottom, by its centre's row."""
    rows = boxes[:, 1] + boxes[:, 3] / 2
    edges = [(above[1] + below[0]) / 2 for above, below in pairwise(BANDS)]
    return np.asarray(np.searchsorted(edges, rows), dtype=np.int64)


def nearness(boxes: Ints, reach: float) -> Floats:
    """(n, n) how strongly each pair of (n, 4) boxes attends to one another: 1 at distance 0."""
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    near: Floats = np.exp(-((centres[:, None] - centres) ** 2).sum(axis=2) / (2 * reach**2))
    return near


def sample_scene(rng: np.random.Generator, *, world: World = WORLD) -> Scene:
    """Draw one scene."""
    kind = int(rng.integers(len(world.kinds)))
    horizon = int(rng.integers(HORIZONS[0], HORIZONS[1] + 1))
    centres = _sample_centres(rng)
    points = np.concatenate([centres, np.zeros_like(centres)], axis=1)
    places, near = place_of(points), nearness(points, world.reach)
    classes = np.zeros(len(centres), dtype=np.int64)
    sizes = np.zeros_like(centres)
    for i, place in enumerate(places):
        logits = world.log_base[kind, place] + near[i, :i] @ world.pull[classes[:i]]
        classes[i] = _draw(rng, _log_softmax(logits))
        for axis, table in enumerate((world.log_width, world.log_height)):
            sizes[i, axis] = SIZES[_draw(rng, table[classes[i], place])]
    boxes = np.concatenate([centres - sizes // 2, sizes], axis=1)
    return Scene(kind, horizon, classes, boxes)


def _draw(rng: np.random.Generator, log_probs: Floats) -> int:
    """One draw of a categorical variable."""
    cumulative = np.cumsum(np.exp(log_probs))
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def _sample_centres(rng: np.random.Generator) -> Ints:
    """(n, 2) centres, left to right; too close ones are redrawn before any class is known."""
    count = int(rng.integers(COUNTS[0], COUNTS[1] + 1))
    centres: list[tuple[int, int]] = []
    while len(centres) < count:
        band = BANDS[int(np.searchsorted(np.cumsum(BAND_SHARE)[:-1], rng.random()))]
        x = int(rng.integers(COLUMNS[0], COLUMNS[1] + 1))
        y = int(rng.integers(band[0], band[1] + 1))
        if all((x - a) ** 2 + (y - b) ** 2 >= MIN_DISTANCE**2 for a, b in centres):
            centres.append((x, y))
    return np.array(sorted(centres), dtype=np.int64)


def exact_posterior(
    scene: Scene, index: int, *, given: Given = "pixels", world: World = WORLD
) -> Floats:
    """Exact class probabilities of one hidden object, whose box is known.

    Args:
        scene: The scene; the class of object `index` is not looked at.
        index: The hidden object.
        given: What is known of the rest. `pixels`: what a flawless eye sees, the kind of scene, all
            boxes, and the *look* of the other objects, look-alikes summed over. `annotations`: all
            boxes and the classes of the other objects, kinds of scene summed over. `both`: kind,
            boxes and classes.
        world: The model.

    Returns:
        (C,) probabilities.
    """
    if not 0 <= index < len(scene.classes):
        raise UserError(f"index: got {index}, the scene has {len(scene.classes)} objects")
    return np.asarray(_posteriors(scene, [index], given, world)[0])


def exact_posteriors(scene: Scene, *, given: Given = "pixels", world: World = WORLD) -> Floats:
    """(n, C) `exact_posterior` of every object of a scene, each hidden in its turn."""
    return _posteriors(scene, range(len(scene.classes)), given, world)


def _posteriors(scene: Scene, hidden: Sequence[int], given: Given, world: World) -> Floats:
    if given not in get_args(Given):
        raise UserError(f"given: got {given!r}, expected one of {', '.join(get_args(Given))}")
    every = np.arange(len(world.classes))
    kinds = np.arange(len(world.kinds)) if given == "annotations" else np.array([scene.kind])
    known = [np.array([c]) for c in scene.classes]
    if given == "pixels":
        known = [np.flatnonzero(world.looks == world.looks[c]) for c in scene.classes]
    guesses = [_product([*known[:i], every, *known[i + 1 :]]) for i in hidden]
    log_joint = log_density(scene.boxes, np.concatenate(guesses), kinds, world=world)
    posteriors = np.zeros((len(guesses), len(every)))
    start = 0
    for row, i, rows in zip(posteriors, hidden, guesses, strict=True):
        mine = log_joint[:, start : start + len(rows)]
        weight = np.exp(mine - mine.max()).sum(axis=0)
        row += np.bincount(rows[:, i], weights=weight / weight.sum(), minlength=len(every))
        start += len(rows)
    return posteriors


def _product(options: Sequence[Ints]) -> Ints:
    """(A, n) every way to take one of each."""
    picks = np.indices([len(option) for option in options]).reshape(len(options), -1)
    return np.stack([o[pick] for o, pick in zip(options, picks, strict=True)], axis=1)


def log_density(boxes: Ints, classes: Ints, kinds: Ints, *, world: World = WORLD) -> Floats:
    """Joint log density (K, A) of kind, classes and sizes, for many guesses at once.

    The density of the centres is left out, being the same for all.

    Args:
        boxes: (n, 4) in canonical order.
        classes: (A, n) guesses.
        kinds: (K,) kinds to try.
        world: The model.
    """
    count, options = classes.T.shape
    places, guesses = place_of(boxes), classes.T  # (n, A): object by object is faster
    which = np.arange(count)[:, None]
    before = np.tril(nearness(boxes, world.reach), -1)  # left to right: only earlier ones pull
    pulls = (before @ world.pull[guesses].reshape(count, -1)).reshape(count, options, -1)
    columns = np.searchsorted(SIZES, boxes[:, 2:])
    taken = (
        pulls[which, np.arange(options), guesses]
        + world.log_width[guesses, places[:, None], columns[:, :1]]
        + world.log_height[guesses, places[:, None], columns[:, 1:]]
    )
    base = world.log_base[kinds][:, places]  # (K, n, C)
    # The kinds share exp(pulls): each normaliser is then a product of matrices.
    norms = np.log(np.exp(pulls) @ np.exp(base).transpose(1, 2, 0))  # (n, A, K)
    chosen = base[:, which, guesses].sum(axis=1)  # (K, A)
    log_joint: Floats = chosen + taken.sum(axis=0) - norms.sum(axis=0).T
    return log_joint - math.log(len(world.kinds))


def scene_from_coco(
    image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], *, world: World = WORLD
) -> Scene:
    """Read a scene back from its entries in the COCO file, where category id = class + 1.

    An image without a `scene` entry gets kind 0; the posterior given annotations depends on
    `width`, `bbox` and `category_id` alone.
    """
    unit = image["width"] / CANVAS
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4) / unit
    whole = np.rint(boxes).astype(np.int64)
    if not np.allclose(whole, boxes) or not np.isin(whole[:, 2:], SIZES).all():
        raise UserError(f"image {image.get('id')}: its boxes are not those of an embedded scene")
    order = np.lexsort((whole[:, 1] + whole[:, 3] // 2, whole[:, 0] + whole[:, 2] // 2))
    about = image.get("scene", {})
    kind = world.kinds.index(about["kind"]) if "kind" in about else 0
    classes = np.array([a["category_id"] - 1 for a in annotations], dtype=np.int64)
    horizon = round(about.get("horizon", HORIZONS[0] * unit) / unit)
    return Scene(kind, horizon, classes[order], whole[order])
