"""Draw ground-truth boxes, detections and imitation masks over images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from kd.losses.imitation import imitation_mask
from kd.metrics.coco_ap import Array
from kd.metrics.records import Records
from kd.nn.detectors.contract import Level
from kd.problems.detection.data import DetectionSamples
from kd.problems.detection.scores import right_at_half
from kd.problems.detection.task import Detection, anchors_of, assigned
from kd.report.boxes import CROWD, IGNORED, LEAST_SCORE, RIGHT, WRONG, Marked, boxes_figure
from kd.report.style import BLUE, INK, ORANGE, new_panels


def found_figures(
    runs: Mapping[str, Records], read: Callable[[int], Tensor], *, count: int,
    least: float = LEAST_SCORE,
) -> Iterator[Figure]:  # fmt: skip
    """Draw ground truth and each run's detections on images sampled evenly from a split.

    Args:
        runs: Run name -> records; all runs have the same images.
        read: Reads an image by id as (3, H, W) uint8 at its original size.
        count: Maximum number of images; images without objects are skipped.
        least: Lowest score of a detection to draw.
    """
    first = next(iter(runs.values()))
    names = [str(name) for name in first["names"]]
    right = {name: right_at_half(records) for name, records in runs.items()}
    places = np.unique(first["truth_images"])
    count = min(count, len(places))
    for number in range(count):
        place = int(places[number * len(places) // count])
        there = first["truth_images"] == place
        styles = np.where(first["truth_crowds"][there], CROWD, RIGHT)
        objects = int((styles == RIGHT).sum())
        truth = Marked(first["truth_boxes"][there], first["truth_labels"][there], styles)
        panels = {f"truth, {objects} object{'s' * (objects != 1)}": truth}
        for name, records in runs.items():
            scores = records["found_scores"]
            rows = np.flatnonzero((records["found_images"] == place) & (scores >= least))
            rows = rows[
                np.argsort(scores[rows], kind="stable")
            ]  # the highest score is drawn last, on top
            hit, ignored = (part[rows] for part in right[name])
            styles = np.where(ignored, IGNORED, np.where(hit, RIGHT, WRONG))
            good, wrong = (int((styles == style).sum()) for style in (RIGHT, WRONG))
            panels[f"{name}, {good} found, {wrong} wrong"] = Marked(
                records["found_boxes"][rows], records["found_labels"][rows], styles, scores[rows]
            )
        yield boxes_figure(read(int(first["image_ids"][place])), panels, names, least=least)


def mask_figures(
    data: DetectionSamples, task: object, *, count: int
) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure) with imitation masks, for up to `count` images that have objects.

    Yields nothing if the task is not `Detection` or has no `levels`.
    """
    if not isinstance(task, Detection) or not task.levels:
        return
    places = np.flatnonzero(np.diff(data.index.first)[data.images])
    for number, place in enumerate(places[:: max(1, -(-len(places) // max(1, count)))][:count]):
        sample = data[0, int(place)]
        size = (int(sample["sizes"][0]), int(sample["sizes"][1]))
        figure = imitation_figure(sample["images"], sample["boxes"], task.levels, size=size)
        yield f"masks/{number}", figure


def imitation_figure(
    image: Tensor, boxes: Tensor, levels: tuple[Level, ...], *,
    psis: Sequence[float] = (0.2, 0.5, 0.8), size: tuple[int, int] | None = None,
) -> Figure:  # fmt: skip
    """Draw imitation masks over an image: one row per feature level, one column per threshold.

    Args:
        image: (3, H, W) uint8, the network's input with padding.
        boxes: (G, 4) xyxy pixels; each box is drawn only on the level it is assigned to.
        levels: Strides and anchors of the network's feature maps.
        psis: Thresholds of `imitation_mask`.
        size: Height and width of the image without padding; None: (H, W).
    """
    frame = (int(image.shape[1]), int(image.shape[2]))
    height, width = size or frame
    across = 2.4
    inches = len(levels) * (across * height / width + 0.24) + 0.05
    figure, panels = new_panels(len(levels), len(psis), across * len(psis), inches)
    grey = image.float().mean(dim=0, keepdim=True).permute(1, 2, 0).cpu().numpy() / 255
    mine = assigned(boxes, levels)
    for number, level in enumerate(levels):
        own, grid = boxes[mine == number], tuple(-(-side // level.stride) for side in frame)
        anchors = anchors_of(level, (grid[0], grid[1]), alone=len(levels) == 1)
        rows, columns = (
            _nearest(level, side, cells) for side, cells in zip(frame, grid, strict=True)
        )
        for psi, axes in zip(psis, panels[number * len(psis) :], strict=False):
            mask = imitation_mask([own], anchors, psi=psi)[0].cpu()
            painted = _painted(grey, mask[rows][:, columns])[:height, :width]
            axes.imshow(painted, interpolation="nearest")
            for x1, y1, x2, y2 in own.tolist():
                axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False,
                                         edgecolor=ORANGE, linewidth=1.2))  # fmt: skip
            axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
            where = f"level {number}, stride {level.stride}: " if len(levels) > 1 else ""
            title = f"{where}psi {psi:g}, {int(mask.sum())} cells"
            axes.set_title(title, fontsize=7.5, color=INK, pad=3)
    return figure


def _nearest(level: Level, pixels: int, cells: int) -> Tensor:
    """For each pixel along an axis, the index of the cell with the nearest anchor centre, (P,)."""
    middles = (torch.arange(pixels) + 0.5) / level.stride
    return (middles + 0.5 - level.offset).floor().long().clamp(max=cells - 1)


def _painted(grey: Array, chosen: Tensor) -> Array:
    """Tint a grey image (H, W, 1) blue where `chosen` (H, W) is True; return RGB in 0..1."""
    blue = np.array([int(BLUE[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    mask = chosen[..., None].numpy()
    return np.asarray(np.where(mask, 0.45 * grey + 0.55 * blue, 0.35 + 0.65 * grey))
