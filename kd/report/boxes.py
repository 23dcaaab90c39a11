"""Figures of boxes over their image, in fixed class colours, with scores and a legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from torch import Tensor

from kd.report.overlay import class_colour
from kd.report.style import GREY, INK, image_panels, letters_on

LEAST_SCORE = 0.3  # detections with a lower score are not drawn
# Styles of boxes: RIGHT is solid, WRONG is dashed, CROWD (a region of many objects) is hatched, and
# IGNORED (a detection that is not scored) is dotted grey.
RIGHT, WRONG, CROWD, IGNORED = range(4)


class Marked(NamedTuple):
    """Boxes to draw over an image.

    `xywh` (n, 4) is in pixels of the image, `labels` (n,) are classes 0..C-1, and `styles` (n,) are
    `RIGHT`, `WRONG`, `CROWD` or `IGNORED`. `scores` (n,) is None for ground truth.
    """

    xywh: NDArray[np.float64]
    labels: NDArray[np.int64]
    styles: NDArray[np.int64]
    scores: NDArray[np.float64] | None = None


def boxes_figure(
    image: Tensor, panels: Mapping[str, Marked], names: Sequence[str], *, least: float | None = None
) -> Figure:
    """Draw an image, (3, H, W) uint8, once per panel with boxes in the colours of their classes.

    `panels` maps titles to boxes. `names` are the C class names. `least` is the smallest score of
    drawn detections, mentioned in the legend unless it is None.
    """
    height, width = image.shape[1:]
    handles = _legend(panels, names, least)
    figure, grid = image_panels(len(panels), height / width, most=4, across=3.0, handles=handles)
    pixels = image.permute(1, 2, 0).cpu().numpy()
    for axes, (title, marked) in zip(grid, panels.items(), strict=False):
        axes.imshow(pixels, interpolation="nearest" if height * width < 40_000 else "antialiased")
        axes.set_title(title, fontsize=8.5, color=INK, pad=3)
        _draw(axes, marked, (height, width))
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    return figure


def _draw(axes: Axes, marked: Marked, size: tuple[int, int]) -> None:
    for row, (x, y, across, down) in enumerate(marked.xywh.tolist()):
        style, colour = marked.styles[row], class_colour(int(marked.labels[row]))
        if style == CROWD:
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), across, down, fill=False, hatch="///",
                                     edgecolor=GREY, linewidth=0.8))  # fmt: skip
            continue
        dashes = "--" if style == WRONG else "-"
        if style == IGNORED:
            colour, dashes = GREY, ":"
        for edge, wide, line in (("white", 2.6, "-"), (colour, 1.5, dashes)):
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), across, down, fill=False, edgecolor=edge,
                                     linewidth=wide, linestyle=line))  # fmt: skip
        if marked.scores is not None:
            above = y > 0.05 * size[0]
            axes.text(
                min(max(x, 0.0), 0.95 * size[1]), y if above else y + 1,
                f"{100 * float(marked.scores[row]):.0f}", fontsize=5.5, color=letters_on(colour),
                va="bottom" if above else "top", ha="left",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
            )  # fmt: skip


def _legend(
    panels: Mapping[str, Marked], names: Sequence[str], least: float | None
) -> list[Patch | Line2D]:
    """Legend entries: a patch for each drawn class, then the meaning of line styles and scores."""
    styles = np.concatenate([marked.styles for marked in panels.values()])
    labels = np.concatenate([marked.labels for marked in panels.values()])
    handles: list[Patch | Line2D] = [
        Patch(color=class_colour(label), label=names[label])
        for label in np.unique(labels[(styles == RIGHT) | (styles == WRONG)]).tolist()
    ]
    if WRONG in styles:
        handles.append(Line2D([], [], color=GREY, linestyle="--", label="wrong"))
    if IGNORED in styles:
        handles.append(Line2D([], [], color=GREY, linestyle=":", label="not counted"))
    if CROWD in styles:
        handles.append(Patch(facecolor="none", edgecolor=GREY, hatch="///", label="crowd"))
    if least is not None:
        handles.append(Line2D([], [], linestyle="none", label=f"score {least:g} or more, in %"))
    return handles


def xywh(boxes: Tensor) -> Tensor:
    """Convert boxes (K, 4) from x1, y1, x2, y2 to x, y, width, height, as in COCO."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
