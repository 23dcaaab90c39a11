"""Where people look, and where models say they do, over the picture."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from kd.metrics.records import Records
from kd.problems.saliency.baselines import NAMES
from kd.problems.saliency.records import ROWS
from kd.report.style import INK, colours, legend_above, new_figure, reference_style
from kd.report.tables import Table, label_of, number_cell

_AT_MOST = 6  # panels of a row
_ACROSS = 2.3  # inches of a panel
_HEAT = "inferno"
_STRENGTH = 0.8  # of the brightest place over the picture
_DIM = 0.55  # of the grey picture below


def heated(picture: Tensor, density: Tensor, *, top: float) -> NDArray[np.uint8]:
    """A dim grey picture with a density over it.

    Args:
        picture: (3, H, W) uint8.
        density: (H, W).
        top: The density that is brightest; what is above is as bright.

    Returns:
        (H, W, 3).
    """
    share = (density.double() / max(top, 1e-30)).clamp(0, 1).sqrt().numpy()
    colours = np.asarray(colormaps[_HEAT](share))[..., :3]
    grey = _DIM * picture.float().mean(dim=0).numpy()[..., None] / 255
    weight = _STRENGTH * share[..., None]
    return np.asarray(np.round(255 * ((1 - weight) * grey + weight * colours)), np.uint8)


def gaze_figure(picture: Tensor, points: NDArray[np.float64], maps: Mapping[str, Tensor]) -> Figure:
    """The picture, its fixations, then each density over it, all on the first one's scale.

    Args:
        picture: (3, H, W) uint8.
        points: (F, 2) x, y of the fixations in pixels.
        maps: Title -> (H, W), the truth first.
    """
    height, width = picture.shape[1:]
    pixels = picture.permute(1, 2, 0).numpy()
    top = float(next(iter(maps.values())).max())
    shown = {"stimulus": pixels, f"{len(points)} fixations": pixels}
    shown |= {title: heated(picture, density, top=top) for title, density in maps.items()}
    rows = -(-len(shown) // _AT_MOST)
    columns = -(-len(shown) // rows)
    figure = Figure(figsize=(columns * _ACROSS, rows * (_ACROSS * height / width + 0.3)))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for place, (axes, (title, image)) in enumerate(zip(panels, shown.items(), strict=False)):
        # Pixel c covers c..c+1, as fixations count.
        axes.imshow(image, extent=(0, width, height, 0), interpolation="antialiased")
        axes.set_title(title, fontsize=8.5, color=INK, pad=3)
        if place == 1:
            axes.plot(
                points[:, 0], points[:, 1], "o", markersize=2.4, color="#ffd21f",
                markeredgecolor="black", markeredgewidth=0.4,
            )  # fmt: skip
            axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def pictures_table(records: Records, *, most: int = 5) -> Table:
    """The pictures with the largest and the smallest divergence.

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
                *(number_cell(name, float(records[name][n])) for name in ROWS),
            )
            for n in part
        )
        for part in chosen
        if part
    )
    header = ("picture", "fixations", *ROWS)
    note = "picture: its place in the split; least foretold ones first, then those foretold best"
    return Table("By picture", header, groups, (note,))


def picture_figure(runs: Mapping[str, Records], metric: str) -> Figure:
    """A metric of every picture, in rising order: a line for each run and each reference.

    Args:
        runs: Name -> records of the same pictures.
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
    axes.set(xlabel="share of the pictures (%)", ylabel=label_of(metric), xlim=(0, 100))
    legend_above(axes)
    return figure
