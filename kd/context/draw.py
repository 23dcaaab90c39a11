"""Draw a teacher's predictions: classes behind regions, and heat maps of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from kd.context.regions import Region
from kd.report.class_bars import bars
from kd.report.style import GREY, ORANGE, SKY
from kd.transforms.hide import IMAGENET_MEAN
from kd.utils.images import resize, scaled_size

_PHOTO_SIZE = 800  # long side of photographs in figures, pixels
_LEAST_PEAK = 0.01  # least upper end of a heat map's colours: an empty map must look empty


def regions_figure(
    photo: Tensor,
    regions: Sequence[Region],
    inputs: Sequence[tuple[Tensor, Tensor]],
    beliefs: Sequence[Tensor],
    names: Sequence[str],
    *,
    objects: Sequence[Sequence[tuple[str, Sequence[float]]]] | None = None,
    prior: NDArray[np.float64] | None = None,
    top: int = 10,
) -> Figure:
    """Draw a row for each region: its outline, the teacher's input and the most probable classes.

    Args:
        photo: (3, H, W) uint8.
        regions: Regions in pixels of `photo`.
        inputs: For each region, the image (3, h, w) uint8 and the hidden pixels (h, w) bool.
        beliefs: (C,) probabilities for each region.
        names: C class names.
        objects: For each region, class and box of the objects given to the teacher.
        prior: (C,) class fractions among all objects, marked in the bars.
        top: Number of bars.
    """
    height, width = photo.shape[1], photo.shape[2]
    wide = min(4.2, max(1.7, 2.6 * width / height))
    tall = max(0.17 * top + 0.5, wide * height / width + 0.35)
    size = 2 * wide + 3.4, tall * len(regions) + 0.25 * (prior is not None)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(regions), 3, squeeze=False, width_ratios=[wide, wide, 3.2])
    reach = max([0.05, *(float(belief.max()) for belief in beliefs)])
    pixels = _displayed(photo)
    rows = zip(panels, regions, inputs, beliefs, objects or [()] * len(regions), strict=True)
    for line, region, (image, hidden), belief, others in rows:
        _photograph(line[0], pixels, (height, width))
        _outline(line[0], region)
        line[0].set_title(region.name, fontsize=8)
        _teacher_input(line[1], image, hidden, (height, width), others)
        expected = belief.detach().double().cpu().numpy()
        bars(line[2], expected, names, top, usual=prior, digits=1)
        line[2].set_xlim(0, 122 * reach)
    if prior is not None:
        figure.supxlabel("orange: the class's fraction of all objects", fontsize=7, color=GREY)
    return figure


def heat_figure(
    photo: Tensor,
    values: Tensor,
    name: str,
    *,
    peak: tuple[float, float],
    sides: Sequence[tuple[float, float]],
    prior: float | None = None,
) -> Figure:
    """Draw a photograph and, beside it, a heat map of where class `name` is expected.

    Args:
        photo: (3, H, W) uint8.
        values: (h, w) probabilities over the whole photograph.
        name: Class name.
        peak: x, y of the most probable position, in pixels of `photo`.
        sides: Width and height of the hidden regions, drawn around the peak.
        prior: The class's fraction of all objects, marked on the colour bar.
    """
    height, width = int(photo.shape[1]), int(photo.shape[2])
    wide = min(5.6, max(2.4, 4.2 * width / height))
    size = 2 * wide + 1.1, wide * height / width + 0.3 + 0.25 * (prior is not None)
    figure = Figure(figsize=size, layout="constrained")
    plain, hot = figure.subplots(1, 2, squeeze=False)[0]
    pixels = _displayed(photo)
    _photograph(plain, pixels, (height, width))
    plain.set_title("the photograph", fontsize=9)
    # The photograph below is grey, so that all colours come from the map.
    grey = pixels.mean(axis=2, keepdims=True).repeat(3, axis=2) / 255
    _photograph(hot, 0.25 + 0.75 * grey, (height, width))
    heat = 100 * values.detach().float().cpu().numpy()
    most = max(float(heat.max()), 100 * _LEAST_PEAK)
    overlay = hot.imshow(
        heat, cmap="inferno", vmin=0.0, vmax=most, extent=(0, width, height, 0),
        alpha=0.35 + 0.4 * np.clip(heat / most, 0, 1), interpolation="bilinear",
    )  # fmt: skip
    x, y = peak
    for across, down in sides:
        corner = (x - across / 2, y - down / 2)
        hot.add_patch(Rectangle(corner, across, down, fill=False, edgecolor="white",
                                linewidth=1.0, linestyle=(0, (4, 3))))  # fmt: skip
    hot.plot(x, y, "+", color="white", markersize=11, markeredgewidth=2)
    hot.set(xlim=(0, width), ylim=(height, 0))
    hot.set_title(f"{name}: {heat.max():.1f} % at its likeliest place", fontsize=9)
    _colour_bar(figure, hot, ScalarMappable(overlay.norm, overlay.cmap), name, prior)
    return figure


def _colour_bar(
    figure: Figure, beside: Axes, colours: ScalarMappable, name: str, prior: float | None
) -> None:
    """Draw an opaque colour bar of the same height as the image beside it."""
    place = beside.inset_axes((1.02, 0.0, 0.03, 1.0))
    scale = figure.colorbar(colours, cax=place, format="%.3g %%")
    scale.ax.tick_params(labelsize=7, length=2)
    if prior is None:
        return
    if 100 * prior <= scale.ax.get_ylim()[1]:
        scale.ax.axhline(100 * prior, color=SKY, linewidth=2.5)
    text = f"{name}: {100 * prior:.1f} % of all objects (blue on the scale)"
    figure.supxlabel(text, fontsize=7, color=GREY)


def _photograph(axes: Axes, pixels: NDArray[Any], size: tuple[int, int]) -> None:
    """Draw pixels of any resolution in the coordinates of an image of `size` (height, width)."""
    axes.imshow(pixels, extent=(0, size[1], size[0], 0), interpolation="antialiased")
    axes.set_anchor("N")
    axes.set_axis_off()


def _outline(axes: Axes, region: Region) -> None:
    """Draw the edge of a region, visible on light and dark images."""
    x1, y1, x2, y2 = region.box
    for colour, thickness in (("black", 3.2), (ORANGE, 1.8)):
        if region.mask is None:
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour,
                                     linewidth=thickness, clip_on=False))  # fmt: skip
        else:  # padding with 0 closes contours that touch the image border
            height, width = region.mask.shape
            padded = np.pad(region.mask.astype(np.float32), 1)
            places = np.arange(-1, width + 1) + 0.5, np.arange(-1, height + 1) + 0.5
            axes.contour(*places, padded, levels=[0.5], colors=[colour], linewidths=thickness)
            axes.set(xlim=(0, width), ylim=(height, 0))


def _teacher_input(
    axes: Axes,
    image: Tensor,
    hidden: Tensor,
    size: tuple[int, int],
    objects: Sequence[tuple[str, Sequence[float]]],
) -> None:
    covered = image.permute(1, 2, 0).cpu().numpy().copy()
    covered[hidden.cpu().numpy()] = [round(255 * mean) for mean in IMAGENET_MEAN]
    _photograph(axes, covered, size)
    axes.set_title(f"as the teacher sees it, {covered.shape[1]} x {covered.shape[0]}", fontsize=8)
    for name, (x1, y1, x2, y2) in objects:
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=SKY, lw=1.0))
        axes.text(x1, y1, name, fontsize=6, color="white", va="top", clip_on=True,
                  bbox={"facecolor": "black", "alpha": 0.6, "pad": 0.8, "lw": 0})  # fmt: skip


def _displayed(photo: Tensor) -> NDArray[Any]:
    """Scale a photograph down for a figure; returns (H, W, 3)."""
    height, width = photo.shape[1], photo.shape[2]
    small = resize(photo, scaled_size(height, width, min(_PHOTO_SIZE, max(height, width))))
    pixels: NDArray[Any] = small.permute(1, 2, 0).cpu().numpy()
    return pixels
