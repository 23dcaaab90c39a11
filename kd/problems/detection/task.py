"""Object detection: the class and the box of each object."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses.imitation import anchor_grid, imitation_mask
from kd.nn.detectors.contract import ANSWERS, Level, moved_boxes
from kd.nn.regions import coverage
from kd.problems.base import (
    Batch,
    Classes,
    Mask,
    Mean,
    Metric,
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

LOSS = "loss."  # what a network's outputs that are losses begin with


@dataclass(frozen=True, kw_only=True)
class Detection(Task):
    """Detections, and the losses that a network computes itself in training.

    Args:
        num_classes: C.
        levels: Of the network that learns: its maps' strides and anchors, for the masks.
        psi: Fraction of a box's largest IoU from which on an anchor is in the imitation mask.
        psis: Those of terms with an option `psi`; each has a mask of its own, `imitation_PSI`.
        loss_units: What each of its losses is a mean over.
        wanted: What a network computes in evaluation mode: detections; or, of a teacher in each
            step, its raw maps and rows for objects; or the maps of its pyramid alone.
        near_boxes: Whether a second stage's heads also run on boxes near the true ones, in training
            as well: terms alone read these outputs.
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
        """Check the share.

        Raises:
            UserError: It is out of range.
        """
        if not 0 <= self.psi <= 1:
            raise UserError(f"psi must be in 0..1, got {self.psi}")

    def inputs(self, batch: Batch) -> tuple[Tensor | None, ...]:
        """Images (N, 3, H, W), normalised, 0 in the padding; what `kd.nn.detectors.contract` says.

        Boxes to ask about follow from the batch's own, so that whoever is asked in a step, student
        or teacher, is asked about the same.
        """
        images = batch["images"]
        size = (images.shape[2], images.shape[3])
        shown = normalise(images) * valid_pixels(batch["sizes"], size)[:, None]
        if self.wanted == "features":
            return (shown,)
        sizes = batch["sizes"] if self.wanted == "detections" else None
        crowds = batch.get("crowds"), batch.get("crowd_of")
        known = batch["boxes"], batch["labels"], batch["image_of"]
        near = moved_boxes(batch["boxes"], size) if self.near_boxes else None
        return shown, sizes, *known, *crowds, near

    def rows(self, batch: Batch) -> Rows:
        """A row for each box."""
        return object_rows(batch)

    def for_terms(self, terms: Sequence[ReadsOutputs]) -> Detection:
        """The task with the imitation masks and box outputs that terms read."""
        psis = {term.mask_value for term in terms if term.mask_value is not None}
        return self._reading([term.student for term in terms], psis=tuple(sorted(psis)))

    def for_teaching(self, outputs: Collection[str]) -> Detection:
        """The task of a live teacher; its heads need not run where its pyramid alone is read."""
        pyramid = all(output.startswith("network.backbone") for output in outputs)
        return self._reading(outputs, wanted="features" if pyramid else "objects")

    def _reading(self, outputs: Iterable[str], **changes: Any) -> Detection:
        return replace(self, near_boxes=not set(ANSWERS).isdisjoint(outputs), **changes)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """The network's own, which it computes in training: `classes`, `boxes`, ..."""
        return {name: Mean(output[f"{LOSS}{name}"], unit) for name, unit in self.loss_units.items()}

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """Places of a level's map, bool (N, h, w), for imitation.

        `imitation`: where an anchor overlaps a box nearly as well as the best (`imitation_mask`);
        `inside`: whose middle is in a box, or that hold the middle of a box; `whole`, `valid`: all
        within the pictures. Boxes are those of the level, see `assigned`. `ring`: weights, the
        share of a place that is near a box, but in none: of all boxes, on every level.
        """
        kinds: dict[str, Callable[[int, tuple[int, int], Batch], Tensor]] = {
            "imitation": partial(self._imitation, self.psi),
            **{f"imitation_{psi:g}": partial(self._imitation, psi) for psi in self.psis},
            "inside": self._inside,
            "whole": self._whole,
            "valid": _valid,
            "ring": self._ring,
        }

        def of(kind: str) -> Mask:
            def on_grid(grid: tuple[int, int]) -> Tensor:
                stride = stride_of(batch["images"].shape[-2], grid[0])
                return kinds[kind](stride, grid, batch)

            return on_grid

        return {kind: of(kind) for kind in kinds}

    def counts(
        self, batch: Batch, units: Collection[str] = (), masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        """Boxes, images, and the places of masks on each level as `MASK/STRIDE`.

        Those of `valid` and `frame`, which levels do not matter to, on every grid of a power of
        two.
        """
        height, width = batch["images"].shape[-2:]
        images = full_count(batch, "images")
        made = self.masks(batch) if masks is None else masks
        found = {
            f"{name}/{level.stride}": made[name](
                (-(-height // level.stride), -(-width // level.stride))
            )
            .sum()
            .float()
            for name in sorted(set(units) & set(made) - {"valid"})
            for level in self.levels
        }
        for stride in (1 << power for power in range(max(height, width).bit_length() + 1)):
            if "valid" in units:
                places = -(-batch["sizes"] // stride)
                found[f"valid/{stride}"] = places.prod(dim=1).sum().float()
            if "frame" in units:
                found[f"frame/{stride}"] = images * (-(-height // stride) * -(-width // stride))
        return object_counts(batch) | {"valid_images": images} | found

    def place_unit(self, mask: str, grid: tuple[int, int], batch: Batch) -> str:
        """Places of each stride are counted by themselves."""
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
        self._level(stride)  # its places are counted on those alone
        return _valid(stride, grid, batch)

    def _ring(self, stride: int, grid: tuple[int, int], batch: Batch) -> Tensor:
        self._level(stride)  # as above

        def united(boxes: Tensor) -> Tensor:
            """Share of each place that an image's boxes cover; at most that, where they overlap."""
            shares = coverage(boxes, grid, stride)
            empty = shares.new_zeros(len(batch["images"]), *grid)
            return empty.index_add(0, batch["image_of"], shares).clamp(max=1.0)

        return (united(outer_boxes(batch)) - united(batch["boxes"])).clamp(min=0.0)

    def _level(self, stride: int) -> Level:
        for level in self.levels:
            if level.stride == stride:
                return level
        known = ", ".join(str(level.stride) for level in self.levels) or "none"
        raise UserError(
            f"losses: a map of {stride} pixels a place is none of the student's levels, whose are "
            f"{known}; name a layer of its pyramid"
        )

    def _of_level(self, stride: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """The boxes of a level, and their images."""
        level = self.levels.index(self._level(stride))
        mine = assigned(batch["boxes"], self.levels) == level
        return batch["boxes"][mine], batch["image_of"][mine]

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Detections (N, K, 6): x1, y1, x2, y2, score, class; the best first, then scores of 0."""
        return output["detections"]

    def metric(self, classes: Classes) -> Metric:
        """COCO's average precision and what goes with it.

        Raises:
            UserError: The dataset has no boxes.
        """
        if classes.truth is None:
            raise UserError(f"{classes.where}: has no boxes of objects that could be found")
        truth, kitti = classes.truth()
        return FoundBoxes(
            truth, classes.names, confusable=classes.confusable, kitti=kitti, where=classes.where
        )


def _valid(stride: int, grid: tuple[int, int], batch: Batch) -> Tensor:
    """Places within the pictures, of a grid whose places are counted."""
    if stride & (stride - 1):
        raise UserError(
            f"losses: a map of {stride} pixels a place; terms on maps that look at each place take "
            "those whose places are a power of two"
        )
    return valid_pixels(-(-batch["sizes"] // stride), grid)


def anchor_sides(level: Level, reach: float = 0.0) -> tuple[tuple[float, float], ...]:
    """Width and height of a level's anchors; of one without, four times its stride across.

    That is the first side of torchvision's anchors at each stride, with ratios 1/2, 1 and 2. On a
    pyramid the next level has those of twice the side. A detector's only map has them all, twice as
    long each: were there the smallest alone, one of them would lie within any larger box wherever
    it is, and the mask would be the box, whatever psi says.

    Args:
        level: With or without anchors of its own.
        reach: Of a detector's only map, the picture's longer side, pixels, which the longest
            square does not exceed; 0 on a pyramid.
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
    level: Level,
    grid: tuple[int, int],
    *,
    alone: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """A level's anchors on a map of so many rows and columns, (h, w, K, 4), xyxy pixels.

    Args:
        level: See `anchor_sides`.
        grid: Rows and columns, which cover the picture.
        alone: Whether it is the detector's only map.
        device: Where the result lies.
    """
    sides = anchor_sides(level, max(grid) * level.stride if alone else 0.0)
    return anchor_grid(*grid, stride=level.stride, sides=sides, offset=level.offset, device=device)


def assigned(boxes: Tensor, levels: tuple[Level, ...]) -> Tensor:
    """The level that each box belongs to: that with the anchor of the nearest shape.

    Wang et al. imitate one map; on a pyramid a box must not choose places of levels that a detector
    would not find it on. Here a box belongs to the one level with the anchor of the largest IoU
    when both have the same middle, the finest of equal ones; so where a detector's anchors are
    placed densely it is the level of its best anchor. (A region head's rule, by area alone,
    is for crops of proposals, not for the maps' own places.)

    Args:
        boxes: (M, 4) xyxy pixels.
        levels: Finest first.

    Returns:
        (M,) int64, positions in `levels`.
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
    """Places whose middle is in a box, or that a box's middle is in: bool (M, h, w)."""
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
