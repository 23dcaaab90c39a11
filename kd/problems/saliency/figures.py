"""Where people look, and where models say they do, over the image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from kd.metrics.records import Records
from kd.metrics.registry import METRICS
from kd.problems.saliency.baselines import NAMES
from kd.problems.saliency.records import ROWS
from kd.report.style import INK, colours, legend_above, new_figure, reference_style
from kd.report.tables import Table

_AT_MOST = 6  # panels of a row
_ACROSS = 2.3  # inches of a panel
_HEAT = "inferno"
_STRENGTH = 0.8  # of the brightest place over the image
_DIM = 0.55  # of the grey image below


def heated(image: Tensor, density: Tensor, *, top: float) -> NDArray[np.uint8]:
    """A dim grey image with a density over it.

    Args:
        image: (3, H, W) uint8.
        density: (H, W).
        top: The density that is brightest; what is above is as bright.

    Returns:
        (H, W, 3).
    """
    share = (density.double() / max(top, 1e-30)).clamp(0, 1).sqrt().numpy()
    colours = np.asarray(colormaps[_HEAT](share))[..., :3]
    grey = _DIM * image.float().mean(dim=0).numpy()[..., None] / 255
    weight = _STRENGTH * share[..., None]
    return np.asarray(np.round(255 * ((1 - weight) * grey + weight * colours)), np.uint8)


def density_figure(
    image: Tensor, points: NDArray[np.float64], maps: Mapping[str, Tensor]
) -> Figure:
    """Draw the image, its fixations, and each density over it, on the scale of the first.

    Args:
        image: (3, H, W) uint8.
        points: (F, 2) x, y of the fixations in pixels.
        maps: Title -> (H, W), the truth first.
    """
    height, width = image.shape[1:]
    pixels = image.permute(1, 2, 0).numpy()
    top = float(next(iter(maps.values())).max())
    drawn = {"stimulus": pixels, f"{len(points)} fixations": pixels}
    drawn |= {title: heated(image, density, top=top) for title, density in maps.items()}
    rows = -(-len(drawn) // _AT_MOST)
    columns = -(-len(drawn) // rows)
    figure = Figure(figsize=(columns * _ACROSS, rows * (_ACROSS * height / width + 0.3)))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for place, (axes, (title, panel)) in enumerate(zip(panels, drawn.items(), strict=False)):
        # Pixel c covers c..c+1, as fixations count.
        axes.imshow(panel, extent=(0, width, height, 0), interpolation="antialiased")
        axes.set_title(title, fontsize=8.5, color=INK, pad=3)
        if place == 1:
            axes.plot(
                points[:, 0], points[:, 1], "o", markersize=2.4, color="#ffd21f",
                markeredgecolor="black", markeredgewidth=0.4,
            )  # fmt: skip
            axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def images_table(records: Records, *, most: int = 5) -> Table:
    """The images with the largest and the smallest divergence.

    Args:
        records: As `kd.problems.saliency.records` describes.
        most: How many of each.
    """
    order = [n for n in np.argsort(-records["KLD"]).tolist() if not np.isnan(records["KLD"][n])]
    chosen = [order[:most], [n for n in order[-most:] if n not in order[:most]]]
    groups = tuple(
        tuple(
            (
                str(records["image_ids"][n]),
                str(records["fixation_counts"][n]),
                *(METRICS[name].text(float(records[name][n])) for name in ROWS),
            )
            for n in part
        )
        for part in chosen
        if part
    )
    header = ("image", "fixations", *ROWS)
    note = "image: its place in the split; least foretold ones first, then those foretold best"
    return Table("By image", header, groups, (note,))


def image_figure(runs: Mapping[str, Records], metric: str) -> Figure:
    """A metric of every image, in rising order: a line for each run and each reference.

    Args:
        runs: Name -> records of the same images.
        metric: Its name.
    """
    figure, axes = new_figure(6.0, 3.6)
    shades = iter(colours(len(runs)))
    for name, records in runs.items():
        numbers = np.sort(records[metric][~np.isnan(records[metric])])
        if not len(numbers):
            continue
        style = reference_style(name) if name in NAMES.values() else {"color": next(shades)}
        axes.plot(
            100 * (np.arange(len(numbers)) + 0.5) / len(numbers), numbers, label=name, **style
        )
    axes.set(xlabel="images (%)", ylabel=METRICS[metric].label, xlim=(0, 100))
    legend_above(axes)
    return figure
