"""Predict classes behind regions of a photograph, and heat maps of where classes are expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.context.photo import Photograph
from kd.context.query import Question, expectations, scale_masks, teacher_input
from kd.context.regions import Region, Windows, windows
from kd.runs.load_teacher import TrainedTeacher
from kd.utils.images import scaled_size

_COVERED = 0.5  # least covered fraction at which an object's class is hidden from the teacher
_MAP_SIZE = 512  # long side of a heat map
_CPU_INPUTS = 16  # regions in one pass: the activations of more exceed a CPU's cache
_PEAK = 0.1  # peaks below this fraction of the highest are noise


@dataclass(frozen=True, eq=False)
class Expectation:
    """The classes that a teacher expects behind a region."""

    region: Region
    probabilities: Tensor  # (C,)
    image: Tensor  # (3, h, w) uint8 teacher input, before anything is hidden
    hidden: Tensor  # (h, w) bool, True for hidden pixels
    # (M,) int64 classes of the annotated objects given to the teacher, -1 where the region covers
    # one; None if the teacher reads pixels only.
    labels: Tensor | None = None


@dataclass(frozen=True)
class Place:
    """A position x, y in pixels of the photograph, and the class probability there."""

    x: float
    y: float
    probability: float


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Probabilities of one class over a photograph."""

    values: Tensor  # (h, w) probabilities over the whole photograph, long side at most 512
    places: tuple[Place, ...]  # distant peaks, the most probable first
    sides: tuple[tuple[float, float], ...]  # width and height of the hidden regions, in pixels


def expect_classes(
    teacher: TrainedTeacher, photo: Photograph, regions: Sequence[Region], device: torch.device
) -> list[Expectation]:
    """Predict the class behind each region; each region is hidden in a separate input."""
    found: dict[int, Expectation] = {}
    for exact in (False, True):
        rows = [row for row, region in enumerate(regions) if (region.mask is not None) == exact]
        if not rows:
            continue
        boxes = torch.tensor([regions[row].box for row in rows], dtype=torch.float32)
        masks = None
        if exact:
            masks = torch.stack([torch.from_numpy(regions[row].mask) for row in rows])
        labels = _visible_labels(photo, boxes) if teacher.reads_labels else [None] * len(rows)
        probabilities = region_probabilities(teacher, photo, boxes, masks=masks, device=device)
        image, hidden = teacher_input(teacher, _question(photo, boxes, masks, photo.labels))
        for number, row in enumerate(rows):
            found[row] = Expectation(
                regions[row], probabilities[number], image, hidden[number], labels[number]
            )
    return [found[row] for row in range(len(regions))]


def region_probabilities(
    teacher: TrainedTeacher,
    photo: Photograph,
    boxes: Tensor,
    *,
    device: torch.device,
    masks: Tensor | None = None,
) -> Tensor:
    """Predict class probabilities (K, C) behind each region.

    Annotated objects of the photograph are given to the teacher unless the region covers them.

    Args:
        teacher: A context teacher.
        photo: The image.
        boxes: (K, 4) xyxy in pixels of the photograph.
        device: Device for the teacher.
        masks: (K, H, W) bool, exact regions; the boxes by default.
    """
    groups = [(torch.arange(len(boxes)), photo.labels)]
    if teacher.reads_labels and len(photo.boxes):
        visible, kind_of = _visible_labels(photo, boxes).unique(dim=0, return_inverse=True)
        groups = [((kind_of == kind).nonzero()[:, 0], one) for kind, one in enumerate(visible)]
    questions = [
        _question(photo, boxes[rows], None if masks is None else masks[rows], labels)
        for rows, labels in groups
    ]
    most = _CPU_INPUTS if device.type == "cpu" else 64
    found = expectations(teacher, questions, device=device, most_inputs=most)
    probabilities = torch.cat([rows.exp() for rows in found])
    return probabilities[torch.cat([rows for rows, _ in groups]).argsort()]


def _visible_labels(photo: Photograph, boxes: Tensor) -> Tensor:
    """Return labels of the annotated objects per region, (K, M); -1 if the region covers one."""
    low = torch.maximum(boxes[:, None, :2], photo.boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], photo.boxes[None, :, 2:])
    shared = (high - low).clamp(min=0.0).prod(dim=2)  # (K, M)
    areas = (photo.boxes[:, 2:] - photo.boxes[:, :2]).prod(dim=1)
    return photo.labels.expand(len(boxes), -1).masked_fill(shared >= _COVERED * areas, -1)


def _question(photo: Photograph, boxes: Tensor, masks: Tensor | None, labels: Tensor) -> Question:
    small = (int(photo.scaled.shape[1]), int(photo.scaled.shape[2]))
    height, width = photo.size
    scale = torch.tensor([small[1] / width, small[0] / height]).repeat(2)
    first, count = len(photo.boxes), len(boxes)
    return Question(
        image=photo.scaled,
        boxes=torch.cat([photo.boxes, boxes]) * scale,
        labels=torch.cat([labels, labels.new_full((count,), -1)]),
        hidden=torch.arange(first, first + count),
        masks=None if masks is None else scale_masks(masks, small),
    )


def heat_maps(
    teacher: TrainedTeacher,
    photo: Photograph,
    labels: Sequence[int],
    *,
    scales: Sequence[tuple[float, float]],
    stride: float,
    device: torch.device,
    places: int = 5,
) -> list[HeatMap]:
    """Slide hidden regions over a photograph and map where each class is expected.

    Each region size gives one map, interpolated (bicubic) between the window centres. The heat map
    of a class is the mean over region sizes.

    Args:
        teacher: A context teacher.
        photo: The image.
        labels: Classes to map.
        scales: Region sizes, as fractions of the image's width and height.
        stride: Largest step between adjacent regions, as a fraction of the region's sides.
        device: Device for the teacher.
        places: Largest number of peaks per class.
    """
    slid = [windows(photo.size, scale, stride) for scale in scales]
    boxes = torch.cat([one.boxes for one in slid])
    probabilities = region_probabilities(teacher, photo, boxes, device=device)
    counts, first = [len(one.boxes) for one in slid], [one.boxes[0] for one in slid]
    sides = tuple((float(box[2] - box[0]), float(box[3] - box[1])) for box in first)
    fine = scaled_size(*photo.size, min(_MAP_SIZE, max(photo.size)))
    maps = []
    for label in labels:
        parts = zip(probabilities[:, label].split(counts), slid, strict=True)
        values = torch.stack([spread(part, one, photo.size, fine) for part, one in parts]).mean(0)
        maps.append(HeatMap(values, _best_places(values, photo.size, sides, places), sides))
    return maps


def spread(values: Tensor, slid: Windows, size: tuple[int, int], fine: tuple[int, int]) -> Tensor:
    """Interpolate one value per window over an image of `size` to a map of (h, w) = `fine`."""
    middles = (slid.boxes[:, :2] + slid.boxes[:, 2:]) / 2
    axes = []
    for places, length, axis in ((fine[1], size[1], 0), (fine[0], size[0], 1)):
        first, last = float(middles[0, axis]), float(middles[-1, axis])
        at = (torch.arange(places) + 0.5) * (length / places)
        # -1 and 1 are the outermost window centres; a single window's value applies everywhere.
        axes.append(((at - first) / max(last - first, 1e-6) * 2 - 1).clamp(-1, 1))
    down, across = torch.meshgrid(axes[1], axes[0], indexing="ij")
    grid = torch.stack([across, down], dim=2)[None]
    coarse = values.view(1, 1, *slid.grid)
    smooth = F.grid_sample(coarse, grid, mode="bicubic", padding_mode="border", align_corners=True)
    return smooth[0, 0].clamp(float(values.min()), float(values.max()))


def _best_places(
    values: Tensor, size: tuple[int, int], sides: Sequence[tuple[float, float]], count: int
) -> tuple[Place, ...]:
    """Find peaks, most probable first, at least the shorter side of the smallest region apart."""
    height, width = values.shape
    step = size[1] / width
    y = (torch.arange(height) + 0.5) * (size[0] / height)
    x = (torch.arange(width) + 0.5) * step
    narrow, low = min(wide for wide, _ in sides), min(high for _, high in sides)
    # Only local maxima count, not the slope of a better one; beyond the outermost window centres
    # the map is constant, so its border is no peak.
    apart = min(narrow, low)
    reach = max(1, round(apart / step / 2))
    tops = F.max_pool2d(values[None], 2 * reach + 1, 1, reach)[0]
    across = (x - size[1] / 2).abs() <= (size[1] - narrow) / 2 + step
    down = (y - size[0] / 2).abs() <= (size[0] - low) / 2 + step
    tops = tops.where(across & down[:, None], -1.0)
    left = values.where((values == tops) & (values >= _PEAK * tops.max()), -1.0)
    places: list[Place] = []
    while len(places) < count and bool((left >= 0).any()):
        row, column = divmod(int(left.argmax()), width)
        places.append(Place(float(x[column]), float(y[row]), float(values[row, column])))
        near = (x - x[column]).square() + (y[:, None] - y[row]).square() < apart**2
        left[near] = -1.0
    return tuple(places)
