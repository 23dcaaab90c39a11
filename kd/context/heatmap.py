"""What a teacher expects in regions of a photograph, and where in it a class is expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.context.photo import Photograph
from kd.context.query import Question, as_seen, expectations, scale_masks
from kd.context.regions import Region, Windows, windows
from kd.runs.load_teacher import TrainedTeacher
from kd.utils.images import scaled_size

# An object of which so much lies in a hidden region is hidden with it: its class is not told.
_COVERED = 0.5
# Long side of a heat map, places.
_FINE = 512
# Inputs in one pass: the activations of more do not fit into a CPU's cache.
_CPU_INPUTS = 16
# Peaks below this share of the highest are noise.
_PEAK = 0.1


@dataclass(frozen=True, eq=False)
class Answer:
    """A region and what is expected there.

    Attributes:
        region: As asked.
        probabilities: (C,).
        image: (3, h, w) uint8 as the teacher sees it, nothing hidden yet.
        hidden: (h, w) bool, what of it is hidden.
        told: (M,) int64 classes of the photograph's known objects as the teacher is told them, -1
            for one that it is not told of; None for a teacher that reads pixels only.
    """

    region: Region
    probabilities: Tensor
    image: Tensor
    hidden: Tensor
    told: Tensor | None = None


@dataclass(frozen=True)
class Place:
    """A spot of a heat map, pixels of the photograph, and the probability there."""

    x: float
    y: float
    probability: float


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Where one class is expected.

    Attributes:
        values: (h, w) probabilities over the whole photograph, long side at most 512.
        places: The likeliest spots, apart from each other, best first.
        sides: Width and height of the hidden regions, pixels of the photograph.
    """

    values: Tensor
    places: tuple[Place, ...]
    sides: tuple[tuple[float, float], ...]


def answer_regions(
    teacher: TrainedTeacher, photo: Photograph, regions: Sequence[Region], device: torch.device
) -> list[Answer]:
    """Hide each region by itself, all in as few passes as hold them."""
    answers: dict[int, Answer] = {}
    for exact in (False, True):
        rows = [row for row, region in enumerate(regions) if (region.mask is not None) == exact]
        if not rows:
            continue
        boxes = torch.tensor([regions[row].box for row in rows], dtype=torch.float32)
        masks = None
        if exact:
            masks = torch.stack([torch.from_numpy(regions[row].mask) for row in rows])
        told = _told(photo, boxes) if teacher.reads_labels else None
        probabilities = ask(teacher, photo, boxes, masks=masks, device=device)
        image, hidden = as_seen(teacher, _question(photo, boxes, masks, photo.labels))
        for number, row in enumerate(rows):
            seen = (probabilities[number], image, hidden[number])
            answers[row] = Answer(regions[row], *seen, None if told is None else told[number])
    return [answers[row] for row in range(len(regions))]


def ask(
    teacher: TrainedTeacher,
    photo: Photograph,
    boxes: Tensor,
    *,
    device: torch.device,
    masks: Tensor | None = None,
) -> Tensor:
    """Probabilities (K, C) of what each region hides.

    Args:
        teacher: It is told the photograph's known objects but for those that a region covers.
        photo: The image.
        boxes: (K, 4) xyxy pixels of it.
        device: Where to compute.
        masks: (K, H, W) bool, exact regions.
    """
    groups = [(torch.arange(len(boxes)), photo.labels)]
    if teacher.reads_labels and len(photo.boxes):
        told, kind_of = _told(photo, boxes).unique(dim=0, return_inverse=True)
        groups = [((kind_of == kind).nonzero()[:, 0], labels) for kind, labels in enumerate(told)]
    questions = [
        _question(photo, boxes[rows], None if masks is None else masks[rows], labels)
        for rows, labels in groups
    ]
    most = _CPU_INPUTS if device.type == "cpu" else 64
    told = expectations(teacher, questions, device=device, most_inputs=most)
    answers = torch.cat([rows.exp() for rows in told])
    order = torch.cat([rows for rows, _ in groups])
    return answers[order.argsort()]


def _told(photo: Photograph, boxes: Tensor) -> Tensor:
    """Labels of the known objects for each region, (K, M): -1 where it covers one."""
    low = torch.maximum(boxes[:, None, :2], photo.boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], photo.boxes[None, :, 2:])
    shared = (high - low).clamp(min=0.0).prod(dim=2)  # (K, M)
    areas = (photo.boxes[:, 2:] - photo.boxes[:, :2]).prod(dim=1)
    return photo.labels.expand(len(boxes), -1).masked_fill(shared >= _COVERED * areas, -1)


def _question(photo: Photograph, boxes: Tensor, masks: Tensor | None, labels: Tensor) -> Question:
    """Regions of the photograph as the teacher's image size has it."""
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
    """Slide hidden regions over a photograph and see where classes are expected.

    Each size of region gives a map: the probability at the middle of each place, cubic in between,
    and beyond the outermost places theirs. What size the object would have is not known: the
    result is the mean over sizes.

    Args:
        teacher: Who is asked.
        photo: The image.
        labels: Classes, each with a map of its own, from the same passes.
        scales: Sizes of the region, shares of the image's width and height.
        stride: Most that a region moves on from its neighbour, as a share of its sides.
        device: Where to compute.
        places: How many of the best places to name.
    """
    slid = [windows(photo.size, scale, stride) for scale in scales]
    boxes = torch.cat([one.boxes for one in slid])
    probabilities = ask(teacher, photo, boxes, device=device)
    counts, first = [len(one.boxes) for one in slid], [one.boxes[0] for one in slid]
    sides = tuple((float(box[2] - box[0]), float(box[3] - box[1])) for box in first)
    fine = scaled_size(*photo.size, min(_FINE, max(photo.size)))
    maps = []
    for label in labels:
        parts = probabilities[:, label].split(counts)
        values = torch.stack(
            [spread(part, one, photo.size, fine) for part, one in zip(parts, slid, strict=True)]
        ).mean(dim=0)
        best = _best_places(values, photo.size, sides, places)
        maps.append(HeatMap(values, best, sides))
    return maps


def spread(values: Tensor, slid: Windows, size: tuple[int, int], fine: tuple[int, int]) -> Tensor:
    """From the middles of windows to all of the image.

    Args:
        values: One for each window.
        slid: The windows.
        size: Height and width of the image.
        fine: Those of the result.

    Returns:
        (h, w), within the range of the values.
    """
    middles = (slid.boxes[:, :2] + slid.boxes[:, 2:]) / 2
    axes = []
    for places, length, axis in ((fine[1], size[1], 0), (fine[0], size[0], 1)):
        first, last = float(middles[0, axis]), float(middles[-1, axis])
        at = (torch.arange(places) + 0.5) * (length / places)
        # -1 and 1 are the outermost middles; a single one holds everywhere.
        axes.append(((at - first) / max(last - first, 1e-6) * 2 - 1).clamp(-1, 1))
    down, across = torch.meshgrid(axes[1], axes[0], indexing="ij")
    grid = torch.stack([across, down], dim=2)[None]
    coarse = values.view(1, 1, *slid.grid)
    smooth = F.grid_sample(coarse, grid, mode="bicubic", padding_mode="border", align_corners=True)[
        0, 0
    ]
    return smooth.clamp(float(values.min()), float(values.max()))


def _best_places(
    values: Tensor, size: tuple[int, int], sides: Sequence[tuple[float, float]], count: int
) -> tuple[Place, ...]:
    """Peaks that are apart by the smallest region's shorter side, best first."""
    height, width = values.shape
    step = size[1] / width
    y = (torch.arange(height) + 0.5) * (size[0] / height)
    x = (torch.arange(width) + 0.5) * step
    narrow, low = min(wide for wide, _ in sides), min(high for _, high in sides)
    # Only a top counts: the slope of a better one is no place of its own. Beyond the outermost
    # middles the map is flat, and a border is not where it was found.
    apart = min(narrow, low)
    reach = max(1, round(apart / step / 2))
    tops = F.max_pool2d(values[None], 2 * reach + 1, 1, reach)[0]
    across = (x - size[1] / 2).abs() <= (size[1] - narrow) / 2 + step
    down = (y - size[0] / 2).abs() <= (size[0] - low) / 2 + step
    tops = tops.where(across & down[:, None], -1.0)
    found = (values == tops) & (values >= _PEAK * tops.max())
    left = values.where(found, -1.0)
    places: list[Place] = []
    while len(places) < count and bool((left >= 0).any()):
        row, column = divmod(int(left.argmax()), width)
        places.append(Place(float(x[column]), float(y[row]), float(values[row, column])))
        near = (x - x[column]).square() + (y[:, None] - y[row]).square() < apart**2
        left[near] = -1.0
    return tuple(places)
