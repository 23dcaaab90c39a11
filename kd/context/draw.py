"""Images of what a teacher imagines: what is behind a cover, and where a class would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
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

# Long side of a photograph in a figure, pixels: more could not be seen.
_SHOWN = 800
# What the colours of a heat map reach to at least: a map of nothing shall look like nothing.
_LEAST_PEAK = 0.01


def regions_figure(
    photo: Tensor,
    regions: Sequence[Region],
    seen: Sequence[tuple[Tensor, Tensor]],
    beliefs: Sequence[Tensor],
    names: Sequence[str],
    *,
    told: Sequence[Sequence[tuple[str, Sequence[float]]]] | None = None,
    usual: NDArray[Any] | None = None,
    top: int = 10,
) -> Figure:
    """A row for each region: where it is, the image without it, and what is expected there.

    Args:
        photo: (3, H, W) uint8.
        regions: In pixels of `photo`.
        seen: What the teacher saw of each: its image (3, h, w) and what of it was hidden (h, w).
        beliefs: (C,) probabilities each.
        names: C class names.
        told: For each region the classes and boxes of other objects that the teacher was told of.
        usual: (C,) shares of the classes among all objects, marked in the bars.
        top: How many bars.
    """
    height, width = photo.shape[1], photo.shape[2]
    wide = min(4.2, max(1.7, 2.6 * width / height))
    tall = max(0.17 * top + 0.5, wide * height / width + 0.35)
    figure = _new(2 * wide + 3.4, tall * len(regions) + 0.25 * (usual is not None))
    panels = figure.subplots(len(regions), 3, squeeze=False, width_ratios=[wide, wide, 3.2])
    reach = max([0.05, *(float(belief.max()) for belief in beliefs)])
    shares = None if usual is None else np.asarray(usual, dtype=np.float64)
    pixels = _array(_shown(photo))
    rows = zip(panels, regions, seen, beliefs, told or [()] * len(regions), strict=True)
    for line, region, (image, hidden), belief, company in rows:
        _photograph(line[0], pixels, (height, width))
        _outline(line[0], region)
        line[0].set_title(region.name, fontsize=8)
        _seen(line[1], image, hidden, (height, width), company)
        expected = belief.detach().double().cpu().numpy()
        bars(line[2], expected, names, top, usual=shares, digits=1)
        line[2].set_xlim(0, 122 * reach)
    if shares is not None:
        figure.supxlabel("orange: the class's share of all objects", fontsize=7, color=GREY)
    return figure


def heat_figure(
    photo: Tensor,
    values: Tensor,
    name: str,
    *,
    peak: tuple[float, float],
    sides: Sequence[tuple[float, float]],
    usual: float | None = None,
) -> Figure:
    """A photograph, and over it where a class is expected.

    Args:
        photo: (3, H, W) uint8.
        values: (h, w) probabilities over all of it.
        name: The class.
        peak: x, y of the likeliest place, pixels of `photo`.
        sides: Width and height of the regions that were hidden, drawn around the peak.
        usual: The class's share of all objects, marked on the scale.
    """
    height, width = int(photo.shape[1]), int(photo.shape[2])
    wide = min(5.6, max(2.4, 4.2 * width / height))
    figure = _new(2 * wide + 1.1, wide * height / width + 0.3 + 0.25 * (usual is not None))
    plain, hot = figure.subplots(1, 2, squeeze=False)[0]
    pixels = _array(_shown(photo))
    _photograph(plain, pixels, (height, width))
    plain.set_title("the photograph", fontsize=9)
    # Grey below, so that colours are the map's alone.
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
    _colour_bar(figure, hot, ScalarMappable(overlay.norm, overlay.cmap), name, usual)
    return figure


def _colour_bar(
    figure: Figure, beside: Axes, colours: ScalarMappable, name: str, usual: float | None
) -> None:
    """The scale of a map without the map's transparency, as high as the image beside it."""
    place = beside.inset_axes((1.02, 0.0, 0.03, 1.0))
    scale = figure.colorbar(colours, cax=place, format="%.3g %%")
    scale.ax.tick_params(labelsize=7, length=2)
    if usual is None:
        return
    if 100 * usual <= scale.ax.get_ylim()[1]:
        scale.ax.axhline(100 * usual, color=SKY, linewidth=2.5)
    text = f"{name}: {100 * usual:.1f} % of all objects (blue on the scale)"
    figure.supxlabel(text, fontsize=7, color=GREY)


def _photograph(axes: Axes, pixels: NDArray[Any], size: tuple[int, int]) -> None:
    """Pixels of any resolution, in coordinates of a image of `size` = (height, width)."""
    axes.imshow(pixels, extent=(0, size[1], size[0], 0), interpolation="antialiased")
    axes.set_anchor("N")
    axes.set_axis_off()


def _outline(axes: Axes, region: Region) -> None:
    """The edge of a region, readable on light and dark."""
    x1, y1, x2, y2 = region.box
    for colour, thickness in (("black", 3.2), (ORANGE, 1.8)):
        if region.mask is None:
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour,
                                     linewidth=thickness, clip_on=False))  # fmt: skip
        else:  # a border of 0 closes what ends at the image's
            height, width = region.mask.shape
            padded = np.pad(region.mask.astype(np.float32), 1)
            places = np.arange(-1, width + 1) + 0.5, np.arange(-1, height + 1) + 0.5
            axes.contour(*places, padded, levels=[0.5], colors=[colour], linewidths=thickness)
            axes.set(xlim=(0, width), ylim=(height, 0))


def _seen(
    axes: Axes,
    image: Tensor,
    hidden: Tensor,
    size: tuple[int, int],
    objects: Sequence[tuple[str, Sequence[float]]],
) -> None:
    """The image without what is hidden, and the objects that the teacher was told of."""
    covered = _array(image).copy()
    covered[hidden.cpu().numpy()] = [round(255 * mean) for mean in IMAGENET_MEAN]
    _photograph(axes, covered, size)
    axes.set_title(f"as the teacher sees it, {covered.shape[1]} x {covered.shape[0]}", fontsize=8)
    for name, (x1, y1, x2, y2) in objects:
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=SKY, lw=1.0))
        axes.text(x1, y1, name, fontsize=6, color="white", va="top", clip_on=True,
                  bbox={"facecolor": "black", "alpha": 0.6, "pad": 0.8, "lw": 0})  # fmt: skip


def _shown(photo: Tensor) -> Tensor:
    height, width = photo.shape[1], photo.shape[2]
    return resize(photo, scaled_size(height, width, min(_SHOWN, max(height, width))))


def _array(image: Tensor) -> NDArray[Any]:
    pixels: NDArray[Any] = image.permute(1, 2, 0).cpu().numpy()
    return pixels


def _new(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    return figure
