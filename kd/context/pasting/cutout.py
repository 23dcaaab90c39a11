"""Objects cut out of one picture and set into another, so that the seam does not tell.

Four things give a paste away, and each is seen to: a fringe of the old background (the rim takes
its colours from the object's inside), an edge harder than the picture's own (the outline is
softened as much as the edges of the scene it comes to, and so is the object where that scene is
less sharp), light (mean and spread of each channel move part of the way), and grain (noise is added
where the scene has more). Nothing is blended *into* the object, as Poisson editing (Perez et al.,
2003) does: it would carry the new scene's colours there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

FINE = 4  # outlines are drawn this many times larger and averaged down
REACH = 3  # pixels beyond the outline that a paste may change
_SOFTEST = 1.0  # pixels, standard deviation; more would reach beyond REACH
_DRAWN = 0.29  # of an outline averaged over the area of a pixel: 1 / sqrt(12)
_RIM_PER_PIXEL = 1 / 320  # of the long side: hand-drawn outlines stray with the picture's size
_GAIN, _SHIFT, _GRAIN = 0.15, 25.0, 4.0  # most that light and noise may be changed
_FAINT = 0.02  # less cover than this changes nothing


@dataclass(frozen=True)
class Look:
    """What a whole picture looks like, whatever it shows.

    Attributes:
        mean: (3,) of each channel.
        spread: (3,) standard deviation of each channel.
        edge: Width of its sharp edges, standard deviation in pixels.
        grain: Standard deviation of its noise.
    """

    mean: Floats
    spread: Floats
    edge: float
    grain: float


@dataclass(frozen=True, eq=False)
class Cutout:
    """An object without its surroundings.

    Attributes:
        colours: (h, w, 3) 0..255; beyond the object's inside, those of its nearest inside pixel.
        cover: (h, w) share of each pixel that the object covers.
        corner: x, y of the upper left pixel in the picture it comes from.
        look: Of that picture.
    """

    colours: Floats
    cover: Floats
    corner: tuple[int, int]
    look: Look


def look_of(picture: Bytes) -> Look:
    """Measure a picture, (H, W, 3)."""
    pixels = picture.reshape(-1, 3).astype(np.float32)
    grey = picture.astype(np.float32).mean(axis=2)
    slope = np.hypot(ndimage.sobel(grey, 0), ndimage.sobel(grey, 1)) / 8
    bend = np.abs(ndimage.laplace(grey))
    # Of a step blurred by s the steepest slope is exp(1/2) s times the strongest bend.
    ratio = np.quantile(slope, 0.99) / max(float(np.quantile(bend, 0.99)), 1e-6)
    # Immerkaer, 1996, "Fast noise variance estimation": a filter that planes and edges leave at 0;
    # its lower quartile, as texture is no noise (0.3186: the quartile of |N(0, 1)|).
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    rough = np.abs(ndimage.convolve(grey, kernel))[1:-1, 1:-1]
    noise = float(np.quantile(rough, 0.25)) / 0.3186 / 6
    return Look(
        pixels.mean(axis=0), pixels.std(axis=0), float(ratio * np.exp(-0.5)), noise * np.sqrt(3)
    )


def cover_of(fine: Bools) -> Floats:
    """Share of each pixel inside an outline drawn `FINE` times larger, (H, W) in 0..1."""
    height, width = (side // FINE for side in fine.shape)
    blocks = fine.reshape(height, FINE, width, FINE)
    return np.asarray(blocks.mean(axis=(1, 3)), dtype=np.float32)


def cut_out(picture: Bytes, cover: Floats, look: Look) -> Cutout:
    """Cut an object out.

    Args:
        picture: (H, W, 3).
        cover: (H, W) share of each pixel that the object covers, not 0 everywhere.
        look: Of the picture.
    """
    rows, columns = (np.flatnonzero(cover.any(axis=axis)) for axis in (1, 0))
    top, left = max(rows[0] - REACH, 0), max(columns[0] - REACH, 0)
    part = np.s_[top : rows[-1] + 1 + REACH, left : columns[-1] + 1 + REACH]
    piece, pixels = cover[part], picture[part].astype(np.float32)
    inside = inside_of(piece, round(max(picture.shape) * _RIM_PER_PIXEL))
    nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    return Cutout(pixels[nearest[0], nearest[1]], piece, (int(left), int(top)), look)


def inside_of(cover: Floats, rim: int) -> Bools:
    """Pixels that show the object alone: wholly covered and `rim` pixels from the outline.

    Where the object is too thin to have any, those covered most.
    """
    whole = cover >= min(float(cover.max()), 0.999)
    eroded = ndimage.binary_erosion(whole, iterations=rim) if rim else whole
    return np.asarray(eroded if eroded.any() else whole, dtype=np.bool_)


def paste(
    picture: Bytes,
    look: Look,
    cutout: Cutout,
    shift: tuple[int, int],
    *,
    harmony: float = 0.3,
    random: np.random.Generator | None = None,
) -> Bytes:
    """Set an object into a picture.

    Args:
        picture: (H, W, 3); left as it is.
        look: Of the picture.
        cutout: The object.
        shift: x, y in whole pixels from where it was to where it comes; it must come to lie inside.
        harmony: How far its light moves towards the picture's, 0..1.
        random: Of the grain; None adds none.

    Returns:
        (H, W, 3), equal to `picture` further than `REACH` pixels from the object.
    """
    colours = lit(cutout.colours, cutout.look, look, harmony)
    if blur := missing(cutout.look.edge, look.edge, _SOFTEST):
        colours = ndimage.gaussian_filter(colours, (blur, blur, 0))
    if random is not None and (grain := missing(cutout.look.grain, look.grain, _GRAIN)):
        colours = colours + random.normal(0.0, grain, colours.shape).astype(np.float32)
    alpha = softened(cutout.cover, look.edge)[:, :, None]
    x, y = cutout.corner[0] + shift[0], cutout.corner[1] + shift[1]
    result = picture.copy()
    region = result[y : y + alpha.shape[0], x : x + alpha.shape[1]]
    mixed: npt.NDArray[Any] = region + alpha * (colours - region)
    region[...] = np.clip(np.rint(mixed), 0, 255)
    return result


def softened(cover: Floats, edge: float) -> Floats:
    """Cover with an outline as soft as edges of this width; never further than `REACH` pixels."""
    width = missing(_DRAWN, edge, _SOFTEST)
    soft = ndimage.gaussian_filter(cover, width, mode="constant", radius=REACH) if width else cover
    return np.where(soft < _FAINT, 0, soft).astype(np.float32)


def missing(have: float, wanted: float, most: float) -> float:
    """What, added to one independent standard deviation, gives another one; 0 where none lacks."""
    return min(float(np.sqrt(max(0.0, wanted**2 - have**2))), most)


def lit(colours: Floats, source: Look, target: Look, harmony: float) -> Floats:
    """Colours of one picture as the light of another would show them, part of the way."""
    gain = (np.maximum(target.spread, 1) / np.maximum(source.spread, 1)) ** harmony
    gain = np.clip(gain, 1 - _GAIN, 1 + _GAIN)
    shift = np.clip(harmony * (target.mean - source.mean), -_SHIFT, _SHIFT)
    moved = (colours - source.mean) * gain + source.mean + shift
    return np.asarray(moved, dtype=np.float32)
