"""Images with boxes: ground truth, detections, and imitation masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from kd.formats.coco import CocoIndex
from kd.losses.imitation import imitation_mask
from kd.metrics.coco_ap import Array, Bools, Ints
from kd.metrics.records import Records
from kd.problems.detection.samples import DetectionSamples
from kd.problems.detection.scores import right_at_half
from kd.problems.detection.task import Detection, anchors_of, assigned
from kd.report.overlay import class_colour
from kd.report.style import BLUE, GREY, INK, ORANGE, letters_on, new_panels
from kd.utils.images import read_image

LEAST_SCORE = 0.3  # of drawn detections
_LETTERS_AN_INCH = 14
_AT_MOST = 4  # panels of a row
_ACROSS = 3.0  # inches of a panel


def box_overlays(runs: Mapping[str, Records], index: CocoIndex, *, count: int) -> Iterator[Figure]:
    """Draw val images from the index of their split; arguments as of `found_figures`."""
    order = np.argsort(index.image_ids, kind="stable")

    def read(image_id: int) -> Tensor:
        place = int(order[np.searchsorted(index.image_ids, image_id, sorter=order)])
        return read_image(index.path(place), None)

    return found_figures(runs, read, count=count)


def mask_figures(
    data: DetectionSamples, task: object, *, count: int
) -> Iterator[tuple[str, Figure]]:
    """Draw a task's imitation masks, by the figure's name.

    Args:
        data: Whole images.
        task: A detection task with the student's levels; nothing is drawn of others.
        count: How many images at most, spread over those with objects.
    """
    if not isinstance(task, Detection) or not task.levels:
        return
    places = np.flatnonzero(np.diff(data.index.first)[data.images])
    for number, place in enumerate(places[:: max(1, -(-len(places) // max(1, count)))][:count]):
        sample = data[0, int(place)]
        image, boxes = sample["images"], sample["boxes"]
        mine = assigned(boxes, task.levels)
        own = [boxes[mine == level] for level in range(len(task.levels))]
        side = data.size
        grids = [-(-side // level.stride) for level in task.levels]
        alone = len(grids) == 1
        anchors = [
            anchors_of(level, (grid, grid), alone=alone)
            for level, grid in zip(task.levels, grids, strict=True)
        ]
        size = (int(sample["sizes"][0]), int(sample["sizes"][1]))
        yield f"masks/{number}", imitation_figure(image, own, anchors, size=size)


@dataclass(frozen=True)
class Marked:
    """Boxes to be drawn over an image.

    Attributes:
        xywh: (n, 4), pixels of the image.
        labels: (n,), 0..C-1.
        scores: (n,) of detections; None for ground truth.
        wrong: (n,) bool, false detections, dashed.
        crowd: (n,) bool, regions of many objects, hatched.
        ignored: (n,) bool, detections that are not scored, dotted grey.
    """

    xywh: Array
    labels: Ints
    scores: Array | None = None
    wrong: Bools | None = None
    crowd: Bools | None = None
    ignored: Bools | None = None


def boxes_figure(
    image: Tensor, panels: Mapping[str, Marked], names: Sequence[str], *, least: float | None = None
) -> Figure:
    """Draw an image once per panel, with boxes in the colours of their classes.

    Args:
        image: (3, H, W) uint8.
        panels: Title -> boxes.
        names: C names.
        least: Smallest score of the drawn detections, for the legend.
    """
    height, width = image.shape[1:]
    rows = -(-len(panels) // _AT_MOST)
    columns = -(-len(panels) // rows)
    handles = _legend(panels, names, least)
    across = columns * _ACROSS
    longest = max((len(str(handle.get_label())) for handle in handles), default=0) + 6
    by_line = max(1, int(across * _LETTERS_AN_INCH / longest))
    lines = -(-len(handles) // by_line)
    inches = rows * (_ACROSS * height / width + 0.26) + 0.2 * lines + 0.1
    figure, grid = new_panels(rows, columns, across, inches)
    pixels = image.permute(1, 2, 0).cpu().numpy()
    for axes, (title, marked) in zip(grid, panels.items(), strict=False):
        axes.imshow(pixels, interpolation="nearest" if height * width < 40_000 else "antialiased")
        axes.set_title(title, fontsize=8.5, color=INK, pad=3)
        _draw(axes, marked, (height, width))
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=by_line, frameon=False, fontsize=8,
            handlelength=1.4, columnspacing=1.2,
        )  # fmt: skip
    return figure


def found_figures(
    runs: Mapping[str, Records], read: Callable[[int], Tensor], *, count: int,
    least: float = LEAST_SCORE,
) -> Iterator[Figure]:  # fmt: skip
    """Draw images spread over a split, with ground truth and the detections of every run.

    Args:
        runs: Name -> records of the same images, in the order of the panels.
        read: Image id -> (3, H, W) uint8, of the file's size.
        count: How many of the images with an object.
        least: Smallest score of the drawn detections.
    """
    first = next(iter(runs.values()))
    names = [str(name) for name in first["names"]]
    right = {name: right_at_half(records) for name, records in runs.items()}
    places = np.unique(first["truth_images"])
    count = min(count, len(places))
    for number in range(count):
        place = int(places[number * len(places) // count])
        there = first["truth_images"] == place
        crowd = first["truth_crowds"][there]
        objects = int((~crowd).sum())
        panels = {
            f"truth, {objects} object{'s' * (objects != 1)}": Marked(
                first["truth_boxes"][there], first["truth_labels"][there], crowd=crowd
            )
        }
        for name, records in runs.items():
            hit, ignored = right[name]
            rows = np.flatnonzero(
                (records["found_images"] == place) & (records["found_scores"] >= least)
            )
            rows = rows[np.argsort(records["found_scores"][rows], kind="stable")]  # best on top
            counted = ~ignored[rows]  # not in crowds or KITTI's DontCare regions
            wrong = ~hit[rows] & counted
            good = int((hit[rows] & counted).sum())
            panels[f"{name}, {good} found, {int(wrong.sum())} wrong"] = Marked(
                records["found_boxes"][rows],
                records["found_labels"][rows],
                records["found_scores"][rows],
                wrong,
                ignored=~counted,
            )
        yield boxes_figure(read(int(first["image_ids"][place])), panels, names, least=least)


def imitation_figure(
    image: Tensor, boxes: Sequence[Tensor], anchors: Sequence[Tensor], *,
    psis: Sequence[float] = (0.2, 0.5, 0.8), size: tuple[int, int] | None = None,
) -> Figure:  # fmt: skip
    """Draw imitation masks, a row for each level of a network and a column for each threshold.

    Args:
        image: (3, H, W) uint8, the network's input with padding.
        boxes: Of each level, the objects assigned to it, (G, 4), xyxy pixels.
        anchors: Of each level, `anchor_grid`, (h, w, K, 4).
        psis: Thresholds of `imitation_mask`.
        size: Height and width of the image without padding; None: (H, W).
    """
    frame = (int(image.shape[1]), int(image.shape[2]))
    height, width = size or frame
    across = 2.4
    inches = len(anchors) * (across * height / width + 0.24) + 0.05
    figure, panels = new_panels(len(anchors), len(psis), across * len(psis), inches)
    grey = image.float().mean(dim=0, keepdim=True).permute(1, 2, 0).cpu().numpy() / 255
    for level, (own, grid) in enumerate(zip(boxes, anchors, strict=True)):
        nearest, stride = _nearest_places(grid, frame)
        for psi, axes in zip(psis, panels[level * len(psis) :], strict=False):
            mask = imitation_mask([own], grid, psi=psi)[0]
            axes.imshow(_masked(grey, mask, nearest)[:height, :width], interpolation="nearest")
            for x1, y1, x2, y2 in own.tolist():
                axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False,
                                         edgecolor=ORANGE, linewidth=1.2))  # fmt: skip
            axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
            places = int(mask.sum())
            where = f"level {level}, stride {stride:g}: " if len(anchors) > 1 else ""
            axes.set_title(f"{where}psi {psi:g}, {places} places", fontsize=7.5, color=INK, pad=3)
    return figure


def _nearest_places(anchors: Tensor, frame: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], float]:
    """The cell nearest to each pixel, by the centres of the cells' anchors.

    Returns:
        The cell's row for each row of pixels (H,), its column for each column (W,); the stride.
    """
    first = anchors[:, :, 0].cpu()
    sides = (first[:, 0, 1::2].mean(dim=1), first[0, :, 0::2].mean(dim=1))
    down, across = (
        torch.searchsorted((middles[1:] + middles[:-1]) / 2, torch.arange(pixels) + 0.5, right=True)
        for middles, pixels in zip(sides, frame, strict=True)
    )
    longer, pixels = max(zip(sides, frame, strict=True), key=lambda side: len(side[0]))
    stride = float(longer[1] - longer[0]) if len(longer) > 1 else float(pixels)
    return (down, across), stride


def _masked(grey: Array, mask: Tensor, nearest: tuple[Tensor, Tensor]) -> Array:
    """A grey image, (H, W, 3) in 0..1, blue where the nearest cell is in the mask."""
    rows, columns = nearest
    chosen = mask.cpu()[rows][:, columns, None].numpy()
    blue = np.array([int(BLUE[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.asarray(np.where(chosen, 0.45 * grey + 0.55 * blue, 0.35 + 0.65 * grey))


def _draw(axes: Axes, marked: Marked, size: tuple[int, int]) -> None:
    for row, (x, y, across, down) in enumerate(marked.xywh.tolist()):
        colour = class_colour(int(marked.labels[row]))
        if marked.crowd is not None and marked.crowd[row]:
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), across, down, fill=False, hatch="///",
                                     edgecolor=GREY, linewidth=0.8))  # fmt: skip
            continue
        dashes = "--" if marked.wrong is not None and marked.wrong[row] else "-"
        if marked.ignored is not None and marked.ignored[row]:
            colour, dashes = GREY, ":"
        for edge, wide, style in (("white", 2.6, "-"), (colour, 1.5, dashes)):
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), across, down, fill=False, edgecolor=edge,
                                     linewidth=wide, linestyle=style))  # fmt: skip
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
    """A patch for each drawn class in class order, and the meaning of lines and numbers."""
    drawn: set[int] = set()
    crowds = wrong = ignored = False
    for marked in panels.values():
        none = np.zeros(len(marked.labels), np.bool_)
        crowd, missed, left_out = (
            none if part is None else part for part in (marked.crowd, marked.wrong, marked.ignored)
        )
        drawn |= set(marked.labels[~crowd & ~left_out].tolist())
        crowds |= bool(crowd.any())
        wrong |= bool(missed.any())
        ignored |= bool(left_out.any())
    handles: list[Patch | Line2D] = [
        Patch(color=class_colour(label), label=names[label]) for label in sorted(drawn)
    ]
    if wrong:
        handles.append(Line2D([], [], color=GREY, linestyle="--", label="wrong"))
    if ignored:
        handles.append(Line2D([], [], color=GREY, linestyle=":", label="not counted"))
    if crowds:
        handles.append(Patch(facecolor="none", edgecolor=GREY, hatch="///", label="crowd"))
    if least is not None:
        handles.append(Line2D([], [], linestyle="none", label=f"score {least:g} or more, in %"))
    return handles
