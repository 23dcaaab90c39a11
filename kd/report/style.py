"""Shared style of figures: colours, axes, and figures as files or tensors.

Figures are drawn without a display or global state, in the colour-blind-safe colours of Okabe and
Ito. References are grey or black, with different dashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from torch import Tensor

from kd.errors import UserError
from kd.utils.io import write_atomic

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
BLUE, ORANGE, GREEN, PURPLE, SKY, RED = COLOURS
GREY, PALE, INK = "#6b6b6b", "#c9c9c9", "#333333"
# Colour and dashes of references.
REFERENCES: dict[str, tuple[str, Any]] = {
    "class prior": (GREY, "--"),
    "co-occurrence": ("#7a5c00", (0, (1, 0.8))),
    "exact posterior": ("black", "-."),
    "centre prior": (GREY, "--"),
    "other observers": ("black", "-."),
}
_OTHER = (GREY, ":")
_LETTERS_AN_INCH = 13  # average characters per inch of a legend


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Create a figure of this size in inches, with `clean` axes."""
    figure, [axes] = new_stack(width, height, (1.0,))
    return figure, axes


def new_stack(width: float, height: float, ratios: tuple[float, ...]) -> tuple[Figure, list[Axes]]:
    """Create a figure of stacked `clean` axes that share x; `ratios` are relative heights."""
    figure = Figure(figsize=(width, height), layout="constrained")
    stack = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)
    for axes in stack.flat:
        clean(axes)
    return figure, list(stack.flat)


def new_panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Create a figure of this size in inches: a grid of panels, row by row, without axis lines."""
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03)
    figure = Figure(figsize=(width, height), layout=layout)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    return figure, panels


def image_panels(
    count: int, aspect: float, *, most: int, across: float, handles: Sequence[Artist] = ()
) -> tuple[Figure, list[Axes]]:
    """Create a figure with panels for `count` images of one size, and a legend below them.

    `aspect` is the images' height divided by their width, `most` the largest number of panels in a
    row, and `across` the width of a panel in inches. Without `handles` there is no legend.
    """
    rows = -(-count // most)
    columns = -(-count // rows)
    longest = max((len(str(handle.get_label())) for handle in handles), default=0) + 6
    by_line = max(1, int(columns * across * 15 / longest))  # 15 letters fit in an inch
    lines = -(-len(handles) // by_line)
    inches = rows * (across * aspect + 0.26) + 0.2 * lines + 0.1
    figure, panels = new_panels(rows, columns, columns * across, inches)
    if handles:
        figure.legend(
            handles=list(handles), loc="outside lower center", ncols=-(-len(handles) // lines),
            frameon=False, fontsize=8, handlelength=1.4, columnspacing=1.2,
        )  # fmt: skip
    return figure, panels


def clean(axes: Axes) -> None:
    """Hide the upper and right spine, and draw a pale horizontal grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8)


def colours(count: int) -> list[str]:
    """Colours of `count` runs; they repeat beyond the length of `COLOURS`."""
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


def reference_style(name: str) -> dict[str, Any]:
    """Colour and dashes of a reference's line."""
    colour, dashes = REFERENCES.get(name, _OTHER)
    return {"color": colour, "linestyle": dashes}


def letters_on(colour: str) -> str:
    """White or black, whichever is more readable on the colour (ITU-R BT.709 luminance)."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.55 else "black"


def legend_above(axes: Axes) -> None:
    """Draw a legend above the axes, bars before lines, in as many rows as needed."""
    found = zip(*axes.get_legend_handles_labels(), strict=True)
    handles, labels = zip(
        *sorted(found, key=lambda f: not isinstance(f[0], BarContainer)), strict=True
    )
    inches = axes.figure.bbox.width / axes.figure.dpi
    width = sum(map(len, labels)) + 6 * len(labels)  # in characters, including the handles
    rows = -(-width // int(_LETTERS_AN_INCH * inches))
    columns = -(-len(labels) // rows)
    axes.legend(
        handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns,
        frameon=False, fontsize=8.5,
    )  # fmt: skip


def save_figure(figure: Figure, file: str | Path) -> None:
    """Write a figure to a file; the suffix selects the format."""
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the figure cannot be written: {error}") from error


def save_image(image: Tensor, file: Path) -> None:
    """Write an image, uint8 (3, H, W), as PNG."""
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
    write_atomic(file, lambda partial: pixels.save(partial, format="PNG"))


def figure_image(figure: Figure, *, dpi: int = 110) -> Tensor:
    """Render a figure to (3, H, W) uint8, the format of TensorBoard's `add_image`."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()
