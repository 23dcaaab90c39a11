"""Results of saliency models: tables and figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from kd.metrics.records import Records
from kd.metrics.registry import METRICS
from kd.metrics.saliency import kld
from kd.problems.images import ImageResults
from kd.problems.results import Evaluation
from kd.problems.saliency import baselines, metric
from kd.problems.saliency.baselines import NAMES
from kd.problems.saliency.data import SaliencyDataset
from kd.problems.saliency.metric import ROWS
from kd.report.style import INK, colours, image_panels, legend_above, new_figure, reference_style
from kd.report.tables import Table

# References in `summary.json`: prefix of the metrics -> name of the reference.
_PREFIXES = {"prior": NAMES[baselines.CENTRE], "observers": NAMES[baselines.OBSERVERS]}
_STRENGTH = 0.8  # opacity of the heat map where it is brightest
_DIM = 0.55  # brightness of the grey image below the heat map


@dataclass(frozen=True)
class SaliencyEvaluation(Evaluation):
    """Tables and figures that compare saliency models."""

    def class_table(self, *, most: int = 5) -> Table:
        """List the images with the worst and best KLD of the first run, up to `most` of each."""
        records = self.first

        def line(n: int) -> tuple[str, ...]:
            ids = (str(records[name][n]) for name in ("image_ids", "fixation_counts"))
            return (*ids, *(METRICS[name].text(float(records[name][n])) for name in ROWS))

        order = np.argsort(-records["KLD"])
        order = order[~np.isnan(records["KLD"][order])]
        chosen = (order[:most], order[most:][-most:])
        groups = tuple(tuple(line(n) for n in part.tolist()) for part in chosen if len(part))
        header = ("image", "fixations", *ROWS)
        note = "image: its position in the split; the largest KLD first, then the smallest"
        return Table("By image", header, groups, (note,))

    def figures(self) -> Iterator[tuple[str, Figure]]:
        for name in ("KLD", "NSS", "IG"):
            yield f"images_{name}", self.image_figure(name)

    def image_figure(self, name: str) -> Figure:
        """Draw a metric's per-image values in ascending order, one line per run and reference."""
        figure, axes = new_figure(6.0, 3.6)
        shades = iter(colours(len(self.runs)))
        for run, records in {**self.runs, **self.references}.items():
            numbers = np.sort(records[name][~np.isnan(records[name])])
            if not len(numbers):
                continue
            style = {"color": next(shades)} if run in self.runs else reference_style(run)
            percent = 100 * (np.arange(len(numbers)) + 0.5) / len(numbers)
            axes.plot(percent, numbers, label=run, **style)
        axes.set(xlabel="images (%)", ylabel=METRICS[name].label, xlim=(0, 100))
        legend_above(axes)
        return figure


@dataclass(frozen=True)
class SaliencyResults(ImageResults):
    """Results of saliency models, computed from each image's metrics."""

    evaluation_type: ClassVar[type[Evaluation]] = SaliencyEvaluation
    things: ClassVar[str] = "images with fixations"
    our_rows: ClassVar[tuple[str, ...]] = ROWS
    our_bounded: ClassVar[tuple[str, ...]] = ("KLD", "CC", "NSS", "sAUC")
    image_name: ClassVar[str] = "gaze"

    check = staticmethod(metric.check)
    check_same_truth = staticmethod(metric.check_same_truth)
    our_value = staticmethod(metric.value)
    our_interval = staticmethod(metric.interval)
    our_difference = staticmethod(metric.difference)
    references = staticmethod(baselines.references)
    notes = staticmethod(baselines.notes)

    def summary(self, data: SaliencyDataset, records: Records) -> dict[str, float]:
        """Metrics of the references, as `prior_<metric>` and `observers_<metric>`."""
        known = self.references(records)
        found = {
            f"{prefix}_{name}": self.our_value(known[reference], name)
            for prefix, reference in _PREFIXES.items()
            if reference in known
            for name in self.our_rows
        }
        return {name: number for name, number in found.items() if number is not None}

    def overlay(
        self, data: SaliencyDataset, place: int, image: Tensor, predicted: Mapping[str, Tensor]
    ) -> Figure:
        """Draw fixations and predicted densities over an image; panel titles contain the KLD."""
        size = (image.shape[1], image.shape[2])
        truth = data.val.density(place, size, size)[0]
        own = {f"{name}, KLD {kld(one[0], truth):.2f}": one[0] for name, one in predicted.items()}
        points = data.val.fixations(place, size).points
        return density_figure(image, points, {"truth": truth, **own})


def heated(image: Tensor, density: Tensor, *, top: float) -> NDArray[np.uint8]:
    """Overlay a density (H, W) on the grey image as a heat map, (H, W, 3) uint8.

    The brightest colour stands for the density `top` and larger ones.
    """
    height = (density.double() / max(top, 1e-30)).clamp(0, 1).sqrt().numpy()
    heat = np.asarray(colormaps["inferno"](height))[..., :3]
    grey = _DIM * image.float().mean(dim=0).numpy()[..., None] / 255
    weight = _STRENGTH * height[..., None]
    return np.asarray(np.round(255 * ((1 - weight) * grey + weight * heat)), np.uint8)


def density_figure(
    image: Tensor, points: NDArray[np.float64], maps: Mapping[str, Tensor]
) -> Figure:
    """Draw an image, its fixations (F, 2), and densities over it on a shared colour scale.

    `maps`: title -> density (H, W); the first, the ground truth, sets the colour scale.
    """
    height, width = image.shape[1:]
    pixels = image.permute(1, 2, 0).numpy()
    top = float(next(iter(maps.values())).max())
    drawn = {"stimulus": pixels, f"{len(points)} fixations": pixels}
    drawn |= {title: heated(image, density, top=top) for title, density in maps.items()}
    figure, panels = image_panels(len(drawn), height / width, most=6, across=2.3)
    for place, (axes, (title, panel)) in enumerate(zip(panels, drawn.items(), strict=False)):
        # Pixel c covers the interval c..c+1, as in the coordinates of fixations.
        axes.imshow(panel, extent=(0, width, height, 0), interpolation="antialiased")
        axes.set_title(title, fontsize=8.5, color=INK, pad=3)
        if place == 1:
            axes.plot(
                points[:, 0], points[:, 1], "o", markersize=2.4, color="#ffd21f",
                markeredgecolor="black", markeredgewidth=0.4,
            )  # fmt: skip
            axes.set(xlim=(0, width), ylim=(height, 0))
    return figure
