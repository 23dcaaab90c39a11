"""Base class of all detectors, with the inputs and outputs that detectors share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd.errors import UserError

# Names of the outputs that a second stage computes for given boxes.
SECOND_STAGE = ("object_logits", "object_deltas")


class Level(NamedTuple):
    """Stride and anchors of one of a detector's feature maps; losses rebuild the anchors from them.

    Attributes:
        stride: Pixels between cells.
        sides: Width and height in pixels of each anchor in a cell; empty for anchor-free networks.
        offset: Position of the anchors' centre in a cell, in strides: 0 is the upper left corner,
            as in torchvision, and 0.5 is the middle of the cell, as in CenterNet.
    """

    stride: int
    sides: tuple[tuple[float, float], ...] = ()
    offset: float = 0.5


class Inputs(NamedTuple):
    """Arguments of a detector's `forward`; all but the images are optional."""

    images: Tensor  # (N, 3, H, W), normalised, 0 in the padding at the right and at the bottom
    sizes: Tensor | None = None  # (N, 2) int64, height and width of the images without padding
    boxes: Tensor | None = None  # (M, 4) boxes of the objects, xyxy pixels
    labels: Tensor | None = None  # (M,) int64, classes of the objects, 0..C-1
    image_of: Tensor | None = None  # (M,) int64, index of the image that contains each box
    crowds: Tensor | None = None  # (Q, 4) boxes of crowds, xyxy pixels
    crowd_of: Tensor | None = None  # (Q,) int64, index of the image that contains each crowd
    # (M, 4) for each box of `boxes` a box near it, for which the second stage is evaluated.
    near_boxes: Tensor | None = None


class Detector(nn.Module):
    """Base class of all detectors.

    Training needs the inputs `sizes`, `boxes`, `labels` and `image_of`, and the output includes the
    losses, `loss.NAME`. In evaluation with `sizes`, the output includes `detections` (N, K, 6),
    best first: xyxy box, score, label. Without `sizes`, the output has only raw maps. Without boxes
    either, pyramid networks return only the features, `features.0` and so on.

    Attributes:
        title: Name of the detector in error messages.
        num_classes: Number of classes, C.
        top: Number of detections per image, K.
        levels: Feature maps with their anchors, finest first.
        loss_units: For each loss the unit over which it is a mean, see `kd.problems.base.Mean`.
        exported: Whether to detect objects without loops over images, for exported graphs.
    """

    title: str
    num_classes: int
    top: int
    levels: tuple[Level, ...]
    loss_units: Mapping[str, str]
    exported: bool = False

    def forward(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        """Check the inputs and call `detect`; the arguments are the fields of `Inputs`."""
        given = Inputs(*inputs, **named)
        self._check(given)
        return self.detect(given)

    def detect(self, given: Inputs) -> dict[str, Tensor]:
        """Compute the outputs, by name, for inputs that have been checked."""
        raise NotImplementedError

    def _check(self, given: Inputs) -> None:
        """Check that the inputs, except crowds, are complete and consistent.

        Values are checked only on the CPU, since these checks would synchronise an accelerator.
        """
        what = self.title
        images, sizes, boxes, labels, image_of, _, _, near_boxes = given
        needed = {"sizes": sizes, "boxes": boxes, "labels": labels, "image_of": image_of}
        missing = [name for name, tensor in needed.items() if tensor is None]
        if self.training and missing:
            raise UserError(f"{what}: training needs {', '.join(missing)} too")
        n = images.shape[0]  # len() would fix the batch size of an exported graph
        if sizes is not None and tuple(sizes.shape) != (n, 2):
            raise UserError(f"{what}: sizes must be ({n}, 2), got {tuple(sizes.shape)}")
        if near_boxes is not None and (boxes is None or near_boxes.shape != boxes.shape):
            known = "no boxes" if boxes is None else f"boxes {tuple(boxes.shape)}"
            raise UserError(
                f"{what}: near_boxes must be one box for each of boxes, (M, 4), got "
                f"{tuple(near_boxes.shape)} and {known}"
            )
        if boxes is None:
            return
        if image_of is None:
            raise UserError(
                f"{what}: boxes need image_of, the index of the image that contains each box"
            )
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise UserError(f"{what}: boxes must be (M, 4), got {tuple(boxes.shape)}")
        for name, rows in (("labels", labels), ("image_of", image_of)):
            if rows is not None and (rows.shape != boxes.shape[:1] or rows.dtype != torch.int64):
                raise UserError(
                    f"{what}: {name} must be int64 ({len(boxes)},), got "
                    f"{str(rows.dtype).removeprefix('torch.')} {tuple(rows.shape)}"
                )
        if boxes.is_cpu and not torch.compiler.is_compiling():
            self._check_values(boxes, labels, image_of, len(images))

    def _check_values(self, boxes: Tensor, labels: Tensor | None, image_of: Tensor, n: int) -> None:
        sound = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1)
        known = torch.ones_like(sound)
        if labels is not None:
            known = (labels >= 0) & (labels < self.num_classes)
        for good, rule in (
            ((image_of >= 0) & (image_of < n), f"image_of must be in 0..{n - 1}"),
            (sound, "boxes must be finite, with x1 < x2 and y1 < y2"),
            (known, f"labels must be in 0..{self.num_classes - 1}"),
        ):
            if not good.all():
                row = int((~good).nonzero()[0])
                image = int(image_of[row])
                before = int((image_of[:row] == image).sum())
                label = "" if labels is None else f", label {int(labels[row])}"
                raise UserError(
                    f"{self.title}: {rule}; box {before} of image {image} in the batch (row {row}) "
                    f"is {boxes[row].tolist()}{label}"
                )


def order_by_image(image_of: Tensor, n: int) -> tuple[Tensor, list[int]]:
    """Compute indices (M,) that sort objects by image, and the number of objects of each image.

    `image_of` (M,) is the index, below n, of the image that contains each object.
    """
    return image_of.argsort(stable=True), image_of.bincount(minlength=n).tolist()


def targets_of(
    boxes: Tensor, labels: Tensor, image_of: Tensor, n: int, *, first: int = 0
) -> list[dict[str, Tensor]]:
    """Convert boxes (M, 4) and labels (M,) to torchvision's targets, one dict for each of n images.

    `first` is torchvision's label of class 0: 1 for networks with a background class, else 0.
    """
    order, counts = order_by_image(image_of, n)
    rows = zip(boxes[order].split(counts), (labels[order] + first).split(counts), strict=True)
    return [{"boxes": own, "labels": classes} for own, classes in rows]


def leveled(**maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name the maps of each kind by level, finest first, e.g. `features.0` and `features.1`."""
    return {f"{name}.{level}": one for name, some in maps.items() for level, one in enumerate(some)}


def logits_at(
    maps: Sequence[Tensor],
    levels: Sequence[Level],
    chosen: Tensor,
    boxes: Tensor,
    image_of: Tensor,
    num_classes: int,
) -> Tensor:
    """Select the class logits of the cell whose anchor centre is nearest to each box's centre.

    Args:
        maps: Class logits of each level, (N, A*C, h, w), for A anchors per cell.
        levels: Strides and anchor offsets of the levels.
        chosen: Index of the level to use for each box, (M,) int64.
        boxes: (M, 4) xyxy pixels.
        image_of: Index of the image that contains each box, (M,).
        num_classes: Number of classes, C.

    Returns:
        (M, C), the mean over the A anchors of the cell.
    """
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    found = []
    for level, logits in zip(levels, maps, strict=True):
        height, width = logits.shape[-2:]
        x, y = (middles / level.stride - level.offset + 0.5).floor().long().unbind(dim=1)
        found.append(logits[image_of, :, y.clamp(0, height - 1), x.clamp(0, width - 1)])
    rows = torch.arange(len(boxes), device=boxes.device)
    at_level = torch.stack(found, dim=1)[rows, chosen]  # (M, A*C)
    kinds = at_level.shape[1] // num_classes
    return at_level.view(len(boxes), kinds, num_classes).mean(dim=1)


def padded(found: Sequence[Mapping[str, Tensor]], top: int, *, first: int = 0) -> Tensor:
    """Convert torchvision's detections to one tensor (N, K, 6) float32, without a gradient.

    Args:
        found: torchvision's `boxes` (k, 4), `scores` (k,) and `labels` (k,) of each image, best
            first.
        top: Rows per image, K. Further detections are dropped, and missing rows are 0.
        first: torchvision's label of class 0.
    """
    whole = found[0]["boxes"].new_zeros(len(found), top, 6, dtype=torch.float32)
    for image, one in enumerate(found):
        rows = [one["boxes"], one["scores"][:, None], (one["labels"] - first)[:, None]]
        best = torch.cat([part.detach().float() for part in rows], dim=1)[:top]
        whole[image, : len(best)] = best
    return whole


REACH = 0.15  # largest shift of a box's centre, as a fraction of the box's width and height
STRETCH = 1.25  # largest factor by which width and height are multiplied or divided
_GRAIN = 16  # coordinates are rounded to a sixteenth of a pixel before they are hashed
_PRIME = 2_147_483_629  # below 2**31, so that products of two remainders fit into 63 bits
# Factors of the hash: a row for each of the four numbers, a column for each coordinate.
_FACTORS = (
    (1_597_334_677, 381_201_580, 1_103_515_245, 747_796_405),
    (277_803_737, 1_664_525_003, 921_234_587, 1_812_433_253),
    (1_013_904_223, 134_775_813, 1_566_083_941, 214_013_501),
    (69_069_137, 1_289_706_101, 453_806_245, 1_099_087_573),
)
_STEPS = 1 << 20  # number of values that a hashed number can have; exact in float32


def moved_boxes(boxes: Tensor, frame: tuple[int, int]) -> Tensor:
    """Compute a pseudo-random box near each of the boxes (M, 4), a function of coordinates only.

    Student and teacher thus evaluate the same boxes in a step. The centre is shifted uniformly by
    up to `REACH` times width and height, and the sides are multiplied or divided by up to
    `STRETCH`. The IoU with the original box is at least 0.52, and 0.72 on average.

    The new boxes are clipped to `frame` (height and width), and have the same dtype as `boxes`
    (xyxy pixels) and no gradient.
    """
    boxes = boxes.detach()
    across, down, wider, higher = _fractions(boxes).to(boxes.dtype).mul(2).sub(1).unbind(dim=1)
    middles, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    middles = middles + REACH * sides * torch.stack([across, down], dim=1)
    half = sides / 2 * STRETCH ** torch.stack([wider, higher], dim=1)
    found = torch.cat([middles - half, middles + half], dim=1).clamp(min=0.0)
    height, width = frame
    return torch.minimum(found, found.new_tensor([width, height, width, height]))


def _fractions(boxes: Tensor) -> Tensor:
    """Hash each box to four numbers in [0, 1), (M, 4) float32.

    The hash is the squared weighted sum of the coordinates modulo a prime, computed in integers so
    that all devices give the same result.
    """
    pixels = (boxes.float() * _GRAIN).round().long() % _PRIME
    factors = torch.tensor(_FACTORS, device=boxes.device)
    mixed = (pixels[:, None, :] * factors % _PRIME).sum(dim=2) % _PRIME
    return (mixed * mixed % _PRIME % _STEPS).float() / _STEPS
