"""Cut objects out of one image and paste them into another without a visible seam.

The object's rim takes its colours from the interior, so that none of the source background remains.
Blur, noise and light are matched to the target scene. Poisson editing (Perez et al., 2003) is not
used because it would tint the object with the target's colours.
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

FINE = 4  # supersampling factor of outlines
REACH = 3  # pixels beyond the outline that a paste may change
_SOFTEST = 1.0  # largest standard deviation of a blur in pixels; more would exceed REACH
_OUTLINE_EDGE = 0.29  # edge width of an outline averaged over a pixel: 1 / sqrt(12)
_RIM_PER_PIXEL = 1 / 320  # of the long side: errors of drawn outlines grow with the image
_GAIN, _SHIFT, _GRAIN = 0.15, 25.0, 4.0  # largest changes of light and noise
_FAINT = 0.02  # coverage below this is ignored


@dataclass(frozen=True)
class ImageStats:
    """Low-level statistics of an image, independent of its content."""

    mean: Floats  # (3,) mean of each channel
    spread: Floats  # (3,) standard deviation of each channel
    edge: float  # width of sharp edges, as the standard deviation of a blur in pixels
    grain: float  # standard deviation of the noise


@dataclass(frozen=True, eq=False)
class Cutout:
    """An object cut out of its image."""

    # (h, w, 3) 0..255; pixels outside the interior have the colour of the nearest interior pixel
    colours: Floats
    cover: Floats  # (h, w) fraction of each pixel that the object covers
    corner: tuple[int, int]  # x, y of the upper left pixel in the source image
    stats: ImageStats  # statistics of the source image


def measure_image(image: Bytes) -> ImageStats:
    """Measure the statistics of an image (H, W, 3)."""
    pixels = image.reshape(-1, 3).astype(np.float32)
    grey = image.astype(np.float32).mean(axis=2)
    slope = np.hypot(ndimage.sobel(grey, 0), ndimage.sobel(grey, 1)) / 8
    curvature = np.abs(ndimage.laplace(grey))
    # For a step blurred by s, the steepest slope is exp(1/2) s times the strongest curvature.
    ratio = np.quantile(slope, 0.99) / max(float(np.quantile(curvature, 0.99)), 1e-6)
    # Immerkaer, 1996, "Fast noise variance estimation": a filter blind to planes and
    # edges. The lower quartile excludes texture (0.3186: the quartile of |N(0, 1)|).
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    rough = np.abs(ndimage.convolve(grey, kernel))[1:-1, 1:-1]
    noise = float(np.quantile(rough, 0.25)) / 0.3186 / 6
    return ImageStats(
        pixels.mean(axis=0), pixels.std(axis=0), float(ratio * np.exp(-0.5)), noise * np.sqrt(3)
    )


def coverage(fine: Bools) -> Floats:
    """Downsample a mask drawn at `FINE` times the size to pixel coverage, (H, W) in 0..1."""
    height, width = (side // FINE for side in fine.shape)
    blocks = fine.reshape(height, FINE, width, FINE)
    return np.asarray(blocks.mean(axis=(1, 3)), dtype=np.float32)


def cut_out(image: Bytes, cover: Floats, stats: ImageStats) -> Cutout:
    """Cut an object out of an image (H, W, 3), given its pixel coverage (H, W) in 0..1."""
    rows, columns = (np.flatnonzero(cover.any(axis=axis)) for axis in (1, 0))
    top, left = max(rows[0] - REACH, 0), max(columns[0] - REACH, 0)
    part = np.s_[top : rows[-1] + 1 + REACH, left : columns[-1] + 1 + REACH]
    piece, pixels = cover[part], image[part].astype(np.float32)
    inside = interior(piece, round(max(image.shape) * _RIM_PER_PIXEL))
    nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    return Cutout(pixels[nearest[0], nearest[1]], piece, (int(left), int(top)), stats)


def interior(cover: Floats, rim: int) -> Bools:
    """Return a mask of the fully covered pixels at least `rim` pixels from the outline.

    If the object is too thin to have such pixels, the most covered pixels are returned.
    """
    whole = cover >= min(float(cover.max()), 0.999)
    eroded = ndimage.binary_erosion(whole, iterations=rim) if rim else whole
    return np.asarray(eroded if eroded.any() else whole, dtype=np.bool_)


def paste(
    image: Bytes,
    stats: ImageStats,
    cutout: Cutout,
    shift: tuple[int, int],
    *,
    harmony: float = 0.3,
    random: np.random.Generator | None = None,
) -> Bytes:
    """Paste an object into a copy of an image; pixels more than `REACH` from it are unchanged.

    Args:
        image: (H, W, 3).
        stats: Statistics of `image`.
        cutout: The object.
        shift: x, y in pixels from source to target position, which must be inside the image.
        harmony: Strength in 0..1 with which the object's light is matched to the image's.
        random: Generator for noise; None adds no noise.
    """
    colours = harmonise(cutout.colours, cutout.stats, stats, harmony)
    if blur := extra_spread(cutout.stats.edge, stats.edge, _SOFTEST):
        colours = ndimage.gaussian_filter(colours, (blur, blur, 0))
    if random is not None and (grain := extra_spread(cutout.stats.grain, stats.grain, _GRAIN)):
        colours = colours + random.normal(0.0, grain, colours.shape).astype(np.float32)
    alpha = soften(cutout.cover, stats.edge)[:, :, None]
    x, y = cutout.corner[0] + shift[0], cutout.corner[1] + shift[1]
    result = image.copy()
    region = result[y : y + alpha.shape[0], x : x + alpha.shape[1]]
    mixed: npt.NDArray[Any] = region + alpha * (colours - region)
    region[...] = np.clip(np.rint(mixed), 0, 255)
    return result


def soften(cover: Floats, edge: float) -> Floats:
    """Blur an object's coverage to the given edge width, by at most `REACH` pixels."""
    width = extra_spread(_OUTLINE_EDGE, edge, _SOFTEST)
    soft = ndimage.gaussian_filter(cover, width, mode="constant", radius=REACH) if width else cover
    return np.where(soft < _FAINT, 0, soft).astype(np.float32)


def extra_spread(current: float, target: float, most: float) -> float:
    """Compute the standard deviation to add in quadrature to reach `target`; at most `most`."""
    return min(float(np.sqrt(max(0.0, target**2 - current**2))), most)


def harmonise(colours: Floats, source: ImageStats, target: ImageStats, harmony: float) -> Floats:
    """Move colours towards the light of the target image, by a fraction `harmony` in 0..1."""
    gain = (np.maximum(target.spread, 1) / np.maximum(source.spread, 1)) ** harmony
    gain = np.clip(gain, 1 - _GAIN, 1 + _GAIN)
    shift = np.clip(harmony * (target.mean - source.mean), -_SHIFT, _SHIFT)
    moved = (colours - source.mean) * gain + source.mean + shift
    return np.asarray(moved, dtype=np.float32)
