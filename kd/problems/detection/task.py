"""The task of object detection."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses.imitation import anchor_grid, imitation_mask
from kd.nn.detectors.contract import SECOND_STAGE, Level, moved_boxes
from kd.nn.regions import coverage
from kd.problems.base import (
    Batch,
    Classes,
    Evaluator,
    Mask,
    Mean,
    Output,
    ReadsOutputs,
    Rows,
    Task,
    full_count,
    stride_of,
)
from kd.problems.detection.metric import FoundBoxes
from kd.problems.objects.batch import object_counts, object_rows, outer_boxes
from kd.transforms.hide import normalise, valid_pixels

LOSS = "loss."  # prefix of the names of network outputs that are losses


@dataclass(frozen=True, kw_only=True)
class Detection(Task):
    """The object detection task; the network itself computes the supervised losses.

    Args:
        num_classes: Number of classes.
        levels: Strides and anchors of the student's feature maps, on which masks are computed.
        psi: Imitation mask threshold, as a fraction of a box's largest IoU with an anchor.
        psis: Additional thresholds; each adds a mask `imitation_PSI`.
        loss_units: Loss name -> unit over which the loss is averaged.
        wanted: Outputs in evaluation mode: `detections`; for a live teacher `objects` (raw maps and
            one row per object) or `features` (feature pyramid only).
        near_boxes: Also run the second-stage heads on boxes near the ground truth, for loss terms
            that read these heads.
    """

    outputs: ClassVar[Collection[str]] = ("object_logits", "object_deltas", "context")
    mask_names: ClassVar[Collection[str]] = ("imitation", "inside", "whole", "valid", "ring")

    num_classes: int
    levels: tuple[Level, ...] = ()
    psi: float = 0.5
    psis: tuple[float, ...] = ()
    loss_units: Mapping[str, str] = field(default_factory=dict)
    wanted: Literal["detections", "objects", "features"] = "detections"
    near_boxes: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.psi <= 1:
            raise UserError(f"psi must be in 0..1, got {self.psi}")

    def inputs(self, batch: Batch) -> tuple[Tensor | None, ...]:
        """Normalised images (N, 3, H, W), 0 in the padding, and the detector's other arguments.

        `kd.nn.detectors.contract` lists the arguments.
        """
        images = batch["images"]
        size = (images.shape[2], images.shape[3])
        pixels = normalise(images) * valid_pixels(batch["sizes"], size)[:, None]
        if self.wanted == "features":
            return (pixels,)
        sizes = batch["sizes"] if self.wanted == "detections" else None
        crowds = batch.get("crowds"), batch.get("crowd_of")
        known = batch["boxes"], batch["labels"], batch["image_of"]
        near = moved_boxes(batch["boxes"], size) if self.near_boxes else None
        return pixels, sizes, *known, *crowds, near

    def rows(self, batch: Batch) -> Rows:
        return object_rows(batch)

    def for_terms(self, terms: Sequence[ReadsOutputs]) -> Detection:
        psis = {term.mask_value for term in terms if term.mask_value is not None}
        return self._reading([term.student for term in terms], psis=tuple(sorted(psis)))

    def for_teaching(self, outputs: Collection[str]) -> Detection:
        """Return a copy for a live teacher; its heads run only if an output needs them."""
        pyramid = all(output.startswith("network.backbone") for output in outputs)
        return self._reading(outputs, wanted="features" if pyramid else "objects")

    def _reading(self, outputs: Iterable[str], **changes: Any) -> Detection:
        return replace(self, near_boxes=not set(SECOND_STAGE).isdisjoint(outputs), **changes)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Losses computed by the network, by name, such as `classes` and `boxes`."""
        return {name: Mean(output[f"{LOSS}{name}"], unit) for name, unit in self.loss_units.items()}

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """Masks on the grid of a level's feature map, (N, h, w).

        * `imitation`, bool: cells with an anchor near a box of the level; see `imitation_mask`.
        * `inside`, bool: cells whose centre is in a box of the level, or that contain a box centre.
        * `whole` and `valid`, bool: cells inside the image. `valid` also works at other strides.
        * `ring`, float: fraction of each cell that is near a box but outside all boxes.

        `assigned` defines which boxes belong to a level.
        """
        kinds: dict[str, Callable[[int, tuple[int, int], Batch], Tensor]] = {
            "imitation": partial(self._imitation, self.psi),
            **{f"imitation_{psi:g}": partial(self._imitation, psi) for psi in self.psis},
            "inside": self._inside,
            "whole": self._whole,
            "valid": _valid,
            "ring": self._ring,
        }

        height = batch["images"].shape[-2]

        def of(mask: Callable[[int, tuple[int, int], Batch], Tensor]) -> Mask:
            return lambda grid: mask(stride_of(height, grid[0]), grid, batch)

        return {kind: of(mask) for kind, mask in kinds.items()}

    def counts(
        self, batch: Batch, units: Collection[str] = (), masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        """Count boxes, images, and each mask's cells at each stride, as `MASK/STRIDE`."""
        height, width = batch["images"].shape[-2:]
        images = full_count(batch, "images")
        made = self.masks(batch) if masks is None else masks
        found = {}
        for name in sorted(set(units) & set(made) - {"valid"}):
            for level in self.levels:
                grid = (-(-height // level.stride), -(-width // level.stride))
                found[f"{name}/{level.stride}"] = made[name](grid).sum().float()
        for stride in (1 << power for power in range(max(height, width).bit_length() + 1)):
            if "valid" in units:
                places = -(-batch["sizes"] // stride)
                found[f"valid/{stride}"] = places.prod(dim=1).sum().float()
            if "frame" in units:
                found[f"frame/{stride}"] = images * (-(-height // stride) * -(-width // stride))
        return object_counts(batch) | {"valid_images": images} | found

    def place_unit(self, mask: str, grid: tuple[int, int], batch: Batch) -> str:
        """The unit `MASK/STRIDE`; cells are counted separately for each stride."""
        return f"{mask}/{stride_of(batch['images'].shape[-2], grid[0])}"

    def _imitation(self, psi: float, stride: int, grid: tuple[int, int], batch: Batch) -> Tensor:
        boxes, images = self._of_level(stride, batch)
        alone = len(self.levels) == 1
        anchors = anchors_of(self._level(stride), grid, alone=alone, device=boxes.device)
        each = [boxes[images == image] for image in range(len(batch["images"]))]
        return imitation_mask(each, anchors, psi=psi)

    def _inside(self, stride: int, grid: tuple[int, int], batch: Batch) -> Tensor:
        boxes, images = self._of_level(stride, batch)
        inside = _within(boxes, grid, stride)
        found = torch.zeros(len(batch["images"]), *grid, device=boxes.device)
        return found.index_add(0, images, inside.float()) > 0

    def _whole(self, stride: int, grid: tuple[int, int], batch: Batch) -> Tensor:
        self._level(stride)  # raises for other strides, because their cells are not counted
        return _valid(stride, grid, batch)

    def _ring(self, stride: int, grid: tuple[int, int], batch: Batch) -> Tensor:
        self._level(stride)  # raises for strides without a level, as in `_whole`

        def united(boxes: Tensor) -> Tensor:
            # Fraction of each cell that an image's boxes cover, at most 1 where they overlap.
            covered = coverage(boxes, grid, stride)
            empty = covered.new_zeros(len(batch["images"]), *grid)
            return empty.index_add(0, batch["image_of"], covered).clamp(max=1.0)

        return (united(outer_boxes(batch)) - united(batch["boxes"])).clamp(min=0.0)

    def _level(self, stride: int) -> Level:
        for level in self.levels:
            if level.stride == stride:
                return level
        known = ", ".join(str(level.stride) for level in self.levels) or "none"
        raise UserError(
            f"losses: a feature map has stride {stride}, but the student's levels have strides "
            f"{known}; choose a layer of the student's pyramid"
        )

    def _of_level(self, stride: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Boxes assigned to a level, (M, 4), and the image index of each, (M,)."""
        level = self.levels.index(self._level(stride))
        mine = assigned(batch["boxes"], self.levels) == level
        return batch["boxes"][mine], batch["image_of"][mine]

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Detections (N, K, 6): x1, y1, x2, y2, score, class; best first, then rows of score 0."""
        return output["detections"]

    def metric(self, classes: Classes) -> Evaluator:
        if classes.truth is None:
            raise UserError(
                f"{classes.where}: the dataset has no annotated boxes to evaluate detections on"
            )
        truth, kitti = classes.truth()
        return FoundBoxes(
            truth, classes.names, confusable=classes.confusable, kitti=kitti, where=classes.where
        )


def _valid(stride: int, grid: tuple[int, int], batch: Batch) -> Tensor:
    """Mask the cells inside the images, bool (N, h, w); the stride must be a power of two."""
    if stride & (stride - 1):
        raise UserError(
            f"losses: a feature map has stride {stride}; terms that compare maps cell by cell "
            "need a stride that is a power of two"
        )
    return valid_pixels(-(-batch["sizes"] // stride), grid)


def anchor_sides(level: Level, reach: float = 0.0) -> tuple[tuple[float, float], ...]:
    """Widths and heights of a level's anchors; torchvision's defaults if the level has none.

    The defaults are squares of side 4 strides, reshaped to aspect ratios 1/2, 1 and 2. `reach`, for
    a detector with a single feature map, adds squares of 8, 16, ... strides up to `reach` pixels.
    Without them, all anchors in a large box would have a similar IoU with it, and the imitation
    mask would be the whole box at every psi.
    """
    if level.sides:
        return level.sides
    squares = [4.0 * level.stride]
    while 2 * squares[-1] <= reach:
        squares.append(2 * squares[-1])
    return tuple(
        (side / root, side * root) for side in squares for root in (0.5**0.5, 1.0, 2.0**0.5)
    )


def anchors_of(
    level: Level, grid: tuple[int, int], *, alone: bool = False, device: torch.device | None = None
) -> Tensor:
    """Anchors on a grid of (rows, columns) cells, (h, w, K, 4) xyxy pixels.

    Set `alone` if the level is the detector's only feature map; see `anchor_sides`.
    """
    sides = anchor_sides(level, max(grid) * level.stride if alone else 0.0)
    return anchor_grid(*grid, stride=level.stride, sides=sides, offset=level.offset, device=device)


def assigned(boxes: Tensor, levels: tuple[Level, ...]) -> Tensor:
    """Assign each box (M, 4), xyxy pixels, to the level with the most similar anchor shape.

    That is the level with the largest IoU between the box and an anchor with the same centre; ties
    go to the first level, which should be the finest. Returns level indices, (M,) int64.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0.0)
    best = []
    for level in levels:
        anchors = boxes.new_tensor(anchor_sides(level))
        shared = torch.minimum(sides[:, None], anchors).prod(dim=-1)
        union = sides.prod(dim=-1)[:, None] + anchors.prod(dim=-1) - shared
        best.append((shared / union.clamp(min=1e-9)).amax(dim=1))
    return torch.stack(best, dim=1).argmax(dim=1)


def _within(boxes: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """For each box, mask the cells whose centre is in it and the cell of its centre, (M, h, w)."""
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    along = []
    for axis, count in ((1, grid[0]), (0, grid[1])):
        place = torch.arange(count, device=boxes.device)
        centre = (place + 0.5) * stride
        inside = (centre >= boxes[:, axis, None]) & (centre < boxes[:, 2 + axis, None])
        holds = place == (middles[:, axis, None] / stride).floor().clamp(0, count - 1)
        along.append((inside, holds))
    (rows, row), (columns, column) = along
    inside = rows[:, :, None] & columns[:, None, :]
    return inside | (row[:, :, None] & column[:, None, :])
