"""Render embedded scenes: background, objects, light and sensor noise.

An object's appearance depends on its look, not on its class, and stays inside its box. Objects,
background and noise have separate random generators, so omitting an object changes no pixel outside
its box.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from kd.scenes.generative_model import CANVAS, WORLD, Scene, World
from kd.scenes.shapes import GROUNDS, LOOKS, Shape, Texture
from kd.scenes.vocabulary import LOOK_SIZES

Floats = npt.NDArray[np.floating[Any]]
Bytes = npt.NDArray[np.uint8]
FINE = 4  # supersampling factor of objects, for soft edges
NOISE = 5.0  # standard deviation of the sensor noise, of 255


@dataclass(frozen=True)
class Painting:
    """A rendered scene: the image and, for each object, its outlines and area."""

    image: Bytes  # (size, size, 3), RGB
    # For each object, polygons inside its box as flat lists of x, y in pixels.
    outlines: list[list[list[float]]]
    areas: list[int]  # for each object, the pixels of its shape, including occluded ones


_LOOK_NAMES = tuple(LOOK_SIZES)


def paint_scene(
    scene: Scene,
    seed: int | tuple[int, ...],
    *,
    size: int = CANVAS,
    omit: Collection[int] = (),
    world: World = WORLD,
) -> Painting:
    """Render a scene; nearer objects (lower in the image) occlude farther ones.

    `size` is the side of the image in pixels, a multiple of 64. `omit` lists the indices of objects
    to leave out; everything else is unchanged.
    """
    scale = size // CANVAS
    entropy = seed if isinstance(seed, tuple) else (seed,)
    rngs = [np.random.default_rng([*entropy, i]) for i in range(len(scene.classes) + 2)]
    canvas = _background(world.kinds[scene.kind], scene.horizon * scale, size, rngs[-2])
    outlines: list[list[list[float]]] = [[] for _ in scene.classes]
    areas = [0] * len(scene.classes)
    centre_rows = scene.boxes[:, 1] + scene.boxes[:, 3] // 2
    for i in np.argsort(centre_rows, kind="stable"):
        x, y, width, height = (int(v) * scale for v in scene.boxes[i])
        look = _LOOK_NAMES[world.looks[scene.classes[i]]]
        ink, cover, polygons = paint_object(look, width, height, rngs[i])
        if i not in omit:
            region = canvas[y : y + height, x : x + width]
            region *= 1 - cover[:, :, None]
            region += ink
        outlines[i] = [[round(v + o, 1) for v, o in zip(f, cycle((x, y)))] for f in polygons]
        areas[i] = int((cover >= 0.5).sum())
    return Painting(_expose(canvas, rngs[-1]), outlines, areas)


def paint_object(
    look: str, width: int, height: int, rng: np.random.Generator
) -> tuple[Floats, Floats, list[list[float]]]:
    """Draw one object: colours, cover and outline.

    Colours (height, width, 3) are in 0..255, multiplied by the cover (height, width) in 0..1. The
    outline is a list of polygons, each a flat list of x, y.
    """
    outline = _outline_of(look)
    shift = (rng.normal(0.0, 7.0, 3) + rng.normal(0.0, 9.0)).tolist()
    mirrored = rng.random() < 0.5
    points = outline.points + outline.wobble * rng.standard_normal(outline.points.shape)
    if mirrored:
        points[:, 0] = 1 - points[:, 0]
    points = np.minimum(np.maximum(points, 0.0), 1.0)
    drawn = (points * (width * FINE - 1, height * FINE - 1)).ravel().tolist()
    placed = (points * (width, height)).ravel().tolist()
    # CMYK is used as four plain channels, of which the last is the cover, because Pillow would
    # divide by alpha when averaging RGBA.
    canvas_image = Image.new("CMYK", (width * FINE, height * FINE))
    draw = ImageDraw.Draw(canvas_image)
    polygons = []
    for shape, (start, stop) in zip(LOOKS[look], pairwise(outline.starts), strict=True):
        red, green, blue = (
            min(max(round(c + s), 0), 255) for c, s in zip(shape.colour, shift, strict=True)
        )
        draw.polygon(drawn[start:stop], fill=(red, green, blue, 255))
        if shape.outline:
            polygons.append(placed[start:stop])
    averaged = np.asarray(canvas_image.reduce(FINE), dtype=np.float32)
    return averaged[:, :, :3], averaged[:, :, 3] / np.float32(255), polygons


@dataclass(frozen=True)
class _Outline:
    """The shapes of a look, concatenated so that one operation transforms them all."""

    points: Floats  # (P, 2), corners of all shapes in a unit square; ellipses are polygons
    wobble: Floats  # (P, 1), standard deviation of each corner's random shift; 0 for ellipses
    starts: list[int]  # start of each shape in the flattened points, and their length


@cache
def _outline_of(look: str) -> _Outline:
    corners = [
        _ellipse_points(s) if s.form == "ellipse" else np.array(s.points) for s in LOOKS[look]
    ]
    wobble = [
        np.full((len(c), 1), 0.0 if s.form == "ellipse" else 0.02)
        for s, c in zip(LOOKS[look], corners, strict=True)
    ]
    starts = [0, *np.cumsum([c.size for c in corners]).tolist()]
    return _Outline(np.concatenate(corners), np.concatenate(wobble), starts)


def _ellipse_points(ellipse: Shape) -> Floats:
    """Compute 20 points (20, 2) of an ellipse that is given by the corners of its box."""
    (x0, y0), (x1, y1) = ellipse.points
    turn = np.linspace(0.0, 2 * np.pi, 20, endpoint=False)
    circle = np.stack([1 + np.cos(turn), 1 + np.sin(turn)], axis=1) / 2
    return np.asarray(circle * (x1 - x0, y1 - y0) + (x0, y0))


def _background(kind: str, horizon: int, size: int, rng: np.random.Generator) -> Floats:
    """Draw the far, middle and near ground of a scene, (size, size, 3)."""
    near = round(size * rng.uniform(0.57, 0.64))
    canvas = np.empty((size, size, 3), dtype=np.float32)
    edges = (0, horizon, near, size)
    shared = rng.normal(0.0, 8.0, 3)
    for (colour, texture), top, bottom in zip(GROUNDS[kind], edges[:-1], edges[1:], strict=True):
        rows = np.linspace(-1.0, 1.0, bottom - top, dtype=np.float32)[:, None, None]
        tint = np.array(colour) + shared + rng.normal(0.0, 6.0, 3)
        band = tint.astype(np.float32) + rows * np.float32(rng.normal(0.0, 10.0))
        relief = _TEXTURES[texture](bottom - top, size, rng)
        canvas[top:bottom] = band + relief[:, :, None]
    return canvas + _uneven_light(size, rng)[:, :, None]


def _uneven_light(size: int, rng: np.random.Generator) -> Floats:
    """Smooth variation of light, (size, size)."""
    coarse = Image.fromarray(rng.normal(0.0, 7.0, (6, 6)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)


def _plain(rows: int, columns: int, rng: np.random.Generator) -> Floats:
    return rng.normal(0.0, 2.0, (rows, columns)).astype(np.float32)


def _waves(rows: int, columns: int, rng: np.random.Generator) -> Floats:
    y, x = np.mgrid[:rows, :columns] * (CANVAS / columns)
    bend = np.sin(x * rng.uniform(0.15, 0.3) + rng.uniform(0, 6.28))
    return np.asarray(14 * np.sin(1.4 * y + 1.5 * bend), dtype=np.float32)


def _tiles(rows: int, columns: int, rng: np.random.Generator) -> Floats:
    unit = columns / CANVAS
    step = round(rng.integers(6, 9) * unit)
    joint = max(1, round(unit))
    y, x = np.mgrid[:rows, :columns] + rng.integers(0, step, 2)[:, None, None]
    return np.where((x % step < joint) | (y % step < joint), -20.0, 0.0).astype(np.float32)


def _planks(rows: int, columns: int, rng: np.random.Generator) -> Floats:
    step = round(rng.integers(4, 7) * columns / CANVAS)
    tones = rng.normal(0.0, 12.0, rows // step + 2).astype(np.float32)
    y = (np.arange(rows) + rng.integers(0, step)) // step
    return np.broadcast_to(tones[y][:, None], (rows, columns))


def _windows(rows: int, columns: int, rng: np.random.Generator) -> Floats:
    unit = columns / CANVAS
    y, x = np.mgrid[:rows, :columns] / unit + rng.uniform(0, 8, 2)[:, None, None]
    return np.where((x % 8 < 4) & (y % 8 < 5), -45.0, 0.0).astype(np.float32)


def _leaves(rows: int, columns: int, rng: np.random.Generator) -> Floats:
    coarse = rng.normal(0.0, 14.0, (max(2, rows * CANVAS // columns // 2), CANVAS // 2))
    patch = Image.fromarray(coarse.astype(np.float32))
    return np.asarray(patch.resize((columns, rows), Image.Resampling.BILINEAR), dtype=np.float32)


_TEXTURES: dict[Texture, Callable[[int, int, np.random.Generator], Any]] = {
    "plain": _plain,
    "waves": _waves,
    "tiles": _tiles,
    "planks": _planks,
    "windows": _windows,
    "leaves": _leaves,
}


def _expose(canvas: Floats, rng: np.random.Generator) -> Bytes:
    """Apply brightness, colour cast and sensor noise to the canvas."""
    gain = (rng.normal(1.0, 0.08) * rng.normal(1.0, 0.03, 3)).astype(np.float32)
    noise = rng.normal(0.0, NOISE, canvas.shape).astype(np.float32)
    return np.asarray(np.clip(canvas * gain + noise, 0, 255), dtype=np.uint8)
