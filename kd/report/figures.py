"""Figures of a run, for files and for TensorBoard; drawn without a display or global state.

Every function returns a new `Figure`; `save_figure` writes it, `figure_image` makes a tensor of it.
Colours are those of Okabe and Ito, which the colour-blind can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from kd.errors import UserError
from kd.metrics import scores
from kd.metrics.scores import Array, Records
from kd.report.comparison import Comparison, label_of, scale_of
from kd.report.table import Table

BLUE, ORANGE, GREEN, PURPLE, SKY, RED = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
)
GREY, PALE = "#6b6b6b", "#c9c9c9"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
# More class names than this below an axis cannot be read.
_NAMES_AT_MOST = 90


def top_n_figure(
    curves: Mapping[str, Array],
    prior_curve: Array | None = None,
    ceiling_curve: Array | None = None,
) -> Figure:
    """Top-n accuracy for n = 1..C against random, the ideal, the class prior and the posterior.

    Args:
        curves: Name -> (C,) accuracy in 0..1.
        prior_curve: (C,) of the class prior.
        ceiling_curve: (C,) of the exact posterior, known on generated scenes only.
    """
    figure, axes = _new(5.6, 4.0)
    num_classes = len(next(iter(curves.values())))
    n = np.arange(1, num_classes + 1)
    axes.plot(n, n / num_classes, color=PALE, label="random")
    axes.plot(n, np.ones(num_classes), color=PALE, linestyle=":", label="ideal")
    if prior_curve is not None:
        axes.plot(n, prior_curve, color=GREY, linestyle="--", label="class prior")
    if ceiling_curve is not None:
        axes.plot(n, ceiling_curve, color="black", linestyle="-.", label="exact posterior")
    for (name, curve), colour in zip(curves.items(), _colours(len(curves)), strict=True):
        top1 = f"{name} (top-1 {100 * float(curve[0]):.1f} %)"
        axes.plot(n, curve, color=colour, linewidth=2, label=top1)
    axes.set(xlim=(1, max(num_classes, 2)), ylim=(0, 1.02))
    axes.set(xlabel="n", ylabel="true class among the first n")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right", frameon=False)
    return figure


def class_share_figure(train_counts: Array, val_counts: Array, names: Sequence[str]) -> Figure:
    """Share of each class among the training and validation objects, in falling order of training.

    Args:
        train_counts: (C,) objects of each class.
        val_counts: (C,).
        names: C names.
    """
    num_classes = len(names)
    figure, axes = _new(max(5.6, 0.14 * num_classes + 1.5), 3.8)
    order = np.argsort(-np.asarray(train_counts), kind="stable")
    place = np.arange(num_classes)
    train, val = (np.asarray(c)[order] / max(np.sum(c), 1) for c in (train_counts, val_counts))
    axes.bar(place, 100 * train, width=0.8, color=SKY, label="train")
    axes.plot(place, 100 * val, "o", color=RED, markersize=3.5, label="val")
    axes.set_yscale("symlog", linthresh=1.0)  # the first class may have 30 %, the last 0.1 %
    axes.set_yticks(ticks := [0, 0.5, 1, 2, 5, 10, 20, 50], [f"{tick:g}" for tick in ticks])
    axes.set(ylabel="share of objects (%)", xlim=(-0.7, num_classes - 0.3))
    axes.set_ylim(0, 130 * max(train.max(), val.max(), 0.01))
    if num_classes <= _NAMES_AT_MOST:
        axes.set_xticks(place, [names[c] for c in order], rotation=90, fontsize=7)
    else:
        axes.set_xlabel("classes in falling order")
    axes.legend(loc="upper right", frameon=False)
    return figure


def share_hidden_figure(runs: Mapping[str, Records]) -> Figure:
    """Top-1 by how much of the picture is hidden, with the number of objects below.

    Args:
        runs: Name -> predictions.
    """
    figure, axes = _new(5.6, 3.8)
    first = next(iter(runs.values()))
    bins = [b for b in scores.SHARE_BINS if scores.measure(first, f"share/{b}_top1") is not None]
    place = np.arange(len(bins))
    width = 0.8 / len(runs)
    for row, ((name, run), colour) in enumerate(
        zip(runs.items(), _colours(len(runs)), strict=True)
    ):
        heights = [100 * (scores.value(run, f"share/{b}_top1") or 0.0) for b in bins]
        offset = (row - (len(runs) - 1) / 2) * width
        bars = axes.bar(place + offset, heights, width * 0.92, color=colour, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1, color=GREY)
    axes.set_xticks(place, [_bin_label(first, name) for name in bins])
    axes.set(ylabel="top-1 (%)", xlabel="share of the picture that is hidden")
    axes.margins(y=0.12)
    _legend_above(axes, len(runs))
    return figure


def reliability_figure(runs: Mapping[str, Records]) -> Figure:
    """Accuracy against confidence, one point a bin; on the diagonal a run means what it says.

    Args:
        runs: Name -> predictions.
    """
    figure, axes = _new(4.4, 4.2)
    axes.plot([0, 1], [0, 1], color=PALE, zorder=0)
    for (name, run), colour in zip(runs.items(), _colours(len(runs)), strict=True):
        points = scores.reliability(run["log_probs"], run["labels"])
        error = scores.calibration_error(run["log_probs"], run["labels"])
        label = f"{name} (error {error:.3f})"
        axes.plot(points.confidence, points.accuracy, color=colour, linewidth=1.2, label=label)
        # An area tells how many objects stand behind a point.
        sizes = 4 + 120 * points.objects / points.objects.sum()
        axes.scatter(points.confidence, points.accuracy, s=sizes, color=colour, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")
    axes.legend(loc="upper left", frameon=False)
    return figure


def comparison_figure(table: Table, *, metrics: Sequence[str] | None = None) -> Figure:
    """Arms side by side for each metric: means, seeds as dots, paired differences above.

    Args:
        table: From `distill_table` or `runs_table`.
        metrics: By default the accuracies of the table: bars of other units would need other axes.

    Raises:
        UserError: The table has none of these metrics.
    """
    known = list(dict.fromkeys(entry.metric for entry in table.comparisons))
    chosen = [m for m in known if (scale_of(m) == 100 if metrics is None else m in metrics)]
    arms = list(dict.fromkeys(entry.arm for entry in table.comparisons))
    if not chosen:
        raise UserError(f"no accuracy to draw; the table has {', '.join(known) or 'nothing'}")
    found = {(entry.metric, entry.arm): entry for entry in table.comparisons}
    figure = Figure(figsize=(1.2 + max(1.6, 0.85 * len(arms)) * len(chosen), 3.6))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(chosen), squeeze=False)[0]
    colours = [GREY, *_colours(len(arms) - 1)]
    for axes, metric in zip(panels, chosen, strict=True):
        _comparison_panel(axes, [found[metric, arm] for arm in arms], colours)
    handles = [panels[0].patches[place] for place in range(len(arms))]
    figure.legend(handles, arms, loc="outside upper center", ncols=len(arms), frameon=False)
    return figure


def _comparison_panel(axes: Axes, line: Sequence[Comparison], colours: Sequence[str]) -> None:
    """Bars of one metric from zero, so that their lengths can be compared."""
    _clean(axes)
    metric = line[0].metric
    scale = scale_of(metric)
    peak = max(max(entry.values) for entry in line) * scale
    for place, (entry, colour) in enumerate(zip(line, colours, strict=True)):
        axes.bar(place, scale * entry.mean, width=0.72, color=colour, alpha=0.85)
        if len(entry.values) > 1:
            dots = np.linspace(-0.18, 0.18, len(entry.values)) + place
            values = scale * np.asarray(entry.values)
            axes.plot(dots, values, "o", color="black", markersize=2.5, alpha=0.7)
        if entry.difference is None:
            continue
        mean, low, high = (scale * bound for bound in entry.difference)
        digits = 1 if scale == 100 else 3
        text = f"{mean:+z.{digits}f}"
        if np.isfinite(low):
            text += f"\n[{low:+z.{digits}f}, {high:+z.{digits}f}]"
        weight = "bold" if entry.difference.clear_of_zero else "normal"
        top = scale * max(entry.values) + 0.03 * peak
        axes.text(place, top, text, ha="center", va="bottom", fontsize=6.5, weight=weight)
    axes.set(ylim=(0, 1.25 * peak or 1.0), xlim=(-0.6, len(line) - 0.4), xticks=[])
    axes.set_xlabel(label_of(metric))


def save_figure(figure: Figure, file: str | Path) -> None:
    """Write a figure; the name's ending chooses the format.

    Raises:
        UserError: The ending is unknown or the file cannot be written.
    """
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the figure cannot be written: {error}") from error


def figure_image(figure: Figure, *, dpi: int = 110) -> Tensor:
    """(3, H, W) uint8 of a figure, as TensorBoard's `add_image` takes it."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def _new(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    _clean(axes)
    return figure, axes


def _clean(axes: Axes) -> None:
    """No frame above and right, and pale lines to read heights by."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#333333", labelsize=8)


def _colours(count: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


def _legend_above(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False)


def _bin_label(records: Records, name: str) -> str:
    low, high = (100 * bound for bound in scores.SHARE_BINS[name])
    found = scores.measure(records, f"share/{name}_top1")
    bounds = f"over {low:g} %" if np.isinf(high) else f"{low:g} to {high:g} %"
    return f"{name}\n{bounds}\n{0 if found is None else len(found.values)} objects"
