"""Figures of label maps over their image, side by side in fixed colours."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from kd.report.style import GREY, INK, image_panels
from kd.utils.images import VOID

# Each is as far as possible in CIELAB from greys and from the ones before it; none glares.
_COLOURS = (
    *("#0067A5", "#F38400", "#008856", "#FF1E96", "#D2F03C", "#690F96", "#871E1E", "#FFB4FF"),
    *("#00E1FF", "#00FF96", "#695A00", "#FFD296", "#2D78FF", "#692D5A", "#FF8796", "#3CA50F"),
    *("#A5F0C3", "#FF4B3C", "#F069F0", "#C3A50F", "#A5C3FF", "#96B45A", "#008796", "#C3784B"),
    *("#9669C3", "#D2004B", "#2D4B1E", "#A50F78", "#0F3C96", "#96FF69", "#00FFD2", "#2D6900"),
)
_TURN = 0.61803398875  # golden ratio: hue step of the classes beyond `_COLOURS`
_STRENGTH = 0.75  # opacity of a colour over the image
_NO_CLASS = "#d0d0d0"
BACKGROUND = "background"  # has no colour


def class_colour(number: int) -> str:
    """Colour of a class, `#rrggbb`, the same in every figure."""
    if number < len(_COLOURS):
        return _COLOURS[number]
    further = number - len(_COLOURS)
    levels = ((0.75, 0.9), (0.5, 0.95), (0.9, 0.6))
    hue = (0.05 + _TURN * further) % 1.0
    return str(to_hex(colorsys.hsv_to_rgb(hue, *levels[further % len(levels)])))


def painted(image: Tensor, labels: Tensor, names: Sequence[str]) -> NDArray[np.uint8]:
    """Blend class colours over the grey image (3, H, W) uint8: (H, W, 3); `VOID` is pale.

    `labels` (H, W) are classes or `VOID`; `names` are the C class names.
    """
    colours = np.zeros((256, 3))
    strength = np.full(256, _STRENGTH)
    for number, name in enumerate(names):
        colours[number] = to_rgb(class_colour(number))
        strength[number] = 0.0 if name == BACKGROUND else _STRENGTH
    colours[VOID], strength[VOID] = to_rgb(_NO_CLASS), 0.85
    grey = image.float().mean(dim=0).numpy()[..., None] / 255
    own = labels.long().numpy()
    opacity = strength[own][..., None]
    return np.asarray(np.round(255 * ((1 - opacity) * grey + opacity * colours[own])), np.uint8)


def overlay_figure(image: Tensor, maps: Mapping[str, Tensor], names: Sequence[str]) -> Figure:
    """Draw an image, (3, H, W) uint8, and label maps over it, with a legend of their classes.

    `maps` maps titles to (H, W) label maps of classes or `VOID`; `names` are the C class names.
    """
    height, width = image.shape[1:]
    handles = _legend(torch.cat([labels.flatten() for labels in maps.values()]), names)
    figure, panels = image_panels(
        1 + len(maps), height / width, most=5, across=2.4, handles=handles
    )
    drawn = {"image": image.permute(1, 2, 0).numpy()}
    drawn |= {title: painted(image, labels, names) for title, labels in maps.items()}
    for axes, (title, pixels) in zip(panels, drawn.items(), strict=False):
        axes.imshow(pixels, interpolation="nearest" if height * width < 40_000 else "antialiased")
        axes.set_title(title, fontsize=8.5, color=INK, pad=3)
    return figure


def _legend(labels: Tensor, names: Sequence[str]) -> list[Patch]:
    """Legend entries for the classes that occur, in their order, except the background."""
    found = [int(number) for number in labels.unique().tolist()]
    handles = [
        Patch(color=class_colour(number), label=names[number])
        for number in found
        if number != VOID and names[number] != BACKGROUND
    ]
    if VOID in found:
        handles.append(Patch(facecolor=_NO_CLASS, edgecolor=GREY, label="not scored"))
    return handles
