"""What the pictures of the documentation are made with: photographs, their credits, panels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from kd.formats.coco import CocoIndex, load_coco
from kd.report.style import GREY, PALE, RED, figure_image
from kd.utils.images import read_image

DPI = 122
LICENCE = "http://creativecommons.org/licenses/by/2.0/"
TEXT: dict[str, Any] = {"fontsize": 8.5, "color": "#222222"}


@dataclass
class Photo:
    """A picture, its objects, and whom to thank."""

    pixels: Tensor
    boxes: Tensor
    names: list[str]
    credit: str


class Photos:
    """Both splits of coco_mini."""

    def __init__(self, root: Path) -> None:
        self.where: dict[int, tuple[CocoIndex, int, dict[str, Any]]] = {}
        for split in ("train", "val"):
            file = root / "annotations" / f"instances_{split}2017.json"
            index = load_coco(file, root / f"{split}2017")
            content = json.loads(file.read_text("utf-8"))
            free = {entry["id"] for entry in content["licenses"] if entry["url"] == LICENCE}
            entries = {entry["id"]: entry for entry in content["images"]}
            for place, number in enumerate(index.image_ids.tolist()):
                if entries[number].get("license") in free:
                    self.where[number] = index, place, entries[number]

    def __call__(self, number: int, side: int | None = None) -> Photo:
        """A picture by its COCO id, its long side scaled to `side`."""
        index, place, _ = self.where[number]
        pixels = read_image(index.path(place), side)
        rows = slice(int(index.first[place]), int(index.first[place + 1]))
        scale = pixels.shape[2] / int(index.widths[place])
        names = [index.class_names[label] for label in index.labels[rows]]
        boxes = torch.from_numpy(index.boxes[rows].copy()) * scale
        return Photo(pixels, boxes, names, self.credit(number))

    def credit(self, number: int) -> str:
        """What its licence asks for."""
        return f"COCO image {number}, CC BY 2.0, {self.where[number][2]['flickr_url']}"


def new_figure(width: float, height: float, credits: Sequence[str]) -> Figure:
    """A figure that names its photographs at its foot."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", h_pad=0.04, w_pad=0.04, hspace=0.0, wspace=0.0)
    what = "Photograph" if len(credits) == 1 else "Photographs"
    joint = ";  " if len(credits) < 3 else "\n"
    figure.supxlabel(f"{what}: {joint.join(credits)}", fontsize=5.5, color=GREY)
    return figure


def save(figure: Figure, file: Path) -> None:
    """Write a PNG of 256 colours: a third of the size."""
    pixels = figure_image(figure, dpi=DPI).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels).quantize(256, kmeans=3, dither=Image.Dither.NONE)
    file.parent.mkdir(exist_ok=True)
    picture.save(file, optimize=True)


def show(axes: Axes, pixels: Tensor, title: str, *, dim: float = 0.0) -> None:
    """A photograph, made paler by `dim`, with what it is above."""
    shown = pixels.permute(1, 2, 0).float() / 255
    axes.imshow((shown + dim * (1 - shown)).numpy())
    bare(axes, title)


def bare(axes: Axes, title: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(PALE)
    axes.set_title(title, **TEXT)


def tint(axes: Axes, mask: Tensor, stride: int, size: tuple[int, int], colour: str = RED) -> None:
    """Colour the masked places of a grid, and draw the grid."""
    height, width = mask.shape
    layer = np.zeros((height, width, 4))
    layer[..., :3] = to_rgb(colour)
    layer[..., 3] = 0.62 * mask.numpy()
    area = (0, width * stride, height * stride, 0)
    axes.imshow(layer, extent=area, interpolation="nearest", zorder=2)
    lines: dict[str, Any] = {"color": "white", "linewidth": 0.35, "zorder": 3}
    lines["alpha"] = min(0.6, stride / 24)  # a fine grid would be a veil
    axes.vlines(np.arange(stride, size[1], stride), 0, size[0], **lines)
    axes.hlines(np.arange(stride, size[0], stride), 0, size[1], **lines)
    axes.set(xlim=(0, size[1]), ylim=(size[0], 0))


def outline(axes: Axes, boxes: Tensor, colours: Sequence[str]) -> None:
    for (x1, y1, x2, y2), colour in zip(boxes.tolist(), colours, strict=True):
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, lw=1.8, zorder=4)
        )
