"""What all detectors take and give: objects, levels, raw maps by name, detections in one tensor.

A detector is called with these, all but the images optional, and returns tensors by name.

* `images`: normalised, (N, 3, H, W), 0 in the padding below and right.
* `sizes`: height and width of the pictures in them, (N, 2) int64.
* `boxes`: of objects, (M, 4), xyxy pixels.
* `labels`: of the same, (M,) int64, 0..C-1.
* `image_of`: the image that each is on, (M,) int64.
* `crowds`: boxes of crowds, (Q, 4), xyxy pixels.
* `crowd_of`: the image that each is on, (Q,) int64.
* `asked`: a box near each of the boxes, (M, 4), that a second stage is asked about: it says nothing
  unasked. `kd.nn.detectors.contract` says which. Networks without a second stage do not read it.

In training it needs the first five and gives losses, `loss.NAME`; in evaluation with sizes it gives
`detections`; without sizes only what a teacher is asked for, its raw maps; and of networks on a
pyramid, without boxes as well, `features.L` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kd.errors import UserError
from kd.nn.regions import picture_extents

# What a second stage says of boxes, only where it is asked.
ANSWERS = ("object_logits", "object_deltas")


class Level(NamedTuple):
    """A map that heads read, and the anchors at each of its places.

    `kd.losses.anchor_grid` with these gives the network's own anchors.

    Attributes:
        stride: Pixels between places.
        sides: Width and height of the anchors, pixels; none where a network has no anchors.
        offset: Where in a place the middle of its anchors is, in strides. torchvision's are at its
            upper left corner, 0: that is where the middle of what a convolution reads is, give or
            take half a pixel. CenterNet's cells are asked about their middles, 0.5.
    """

    stride: int
    sides: tuple[tuple[float, float], ...] = ()
    offset: float = 0.5


class Objects(NamedTuple):
    """Boxes and labels of each image; `order` are their rows in the batch, one after the other."""

    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    order: Tensor

    def targets(self, first: int) -> list[dict[str, Tensor]]:
        """As torchvision takes them, class 0 being label `first`."""
        return [
            {"boxes": boxes, "labels": labels + first}
            for boxes, labels in zip(self.boxes, self.labels, strict=True)
        ]

    def in_batch_order(self, rows: Tensor) -> Tensor:
        """Rows (M, ...) that belong to the boxes, image after image, in the batch's order."""
        return rows[self.order.argsort()]


def objects_of(boxes: Tensor, labels: Tensor | None, image_of: Tensor, n: int) -> Objects:
    """Objects by image; images without any have (0, 4) boxes.

    Args:
        boxes: (M, 4).
        labels: (M,); 0 all of them, where nobody reads them.
        image_of: (M,) in any order.
        n: Number of images.
    """
    order = image_of.argsort(stable=True)
    counts = image_of.bincount(minlength=n).tolist()
    known = torch.zeros_like(image_of) if labels is None else labels
    return Objects(boxes[order].split(counts), known[order].split(counts), order)


def check_call(
    what: str,
    training: bool,
    images: Tensor,
    num_classes: int,
    *,
    sizes: Tensor | None,
    boxes: Tensor | None,
    labels: Tensor | None,
    image_of: Tensor | None,
    asked: Tensor | None = None,
) -> None:
    """Refuse a call that lacks something, and objects that no detector can learn.

    Raises:
        UserError: Training without sizes or objects, boxes without their images, shapes that do not
            fit; of tensors on the CPU, boxes that are not finite or have no area, labels or images
            out of range. On an accelerator looking would make each step wait.
    """
    given = {"sizes": sizes, "boxes": boxes, "labels": labels, "image_of": image_of}
    missing = [name for name, tensor in given.items() if tensor is None]
    if training and missing:
        raise UserError(f"{what}: training needs {', '.join(missing)} too")
    if sizes is not None and tuple(sizes.shape) != (len(images), 2):
        raise UserError(f"{what}: sizes must be ({len(images)}, 2), got {tuple(sizes.shape)}")
    if asked is not None and (boxes is None or asked.shape != boxes.shape):
        beside = "no boxes" if boxes is None else f"boxes {tuple(boxes.shape)}"
        raise UserError(
            f"{what}: asked must be a box near each box, got {tuple(asked.shape)} and {beside}"
        )
    if boxes is None:
        return
    if image_of is None:
        raise UserError(f"{what}: boxes need image_of, the image that each is on")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise UserError(f"{what}: boxes must be (M, 4), got {tuple(boxes.shape)}")
    for name, rows in (("labels", labels), ("image_of", image_of)):
        if rows is not None and (rows.shape != boxes.shape[:1] or rows.dtype != torch.int64):
            raise UserError(
                f"{what}: {name} must be int64 ({len(boxes)},), got "
                f"{str(rows.dtype).removeprefix('torch.')} {tuple(rows.shape)}"
            )
    if boxes.is_cpu and not torch.compiler.is_compiling():
        _check_values(what, boxes, labels, image_of, len(images), num_classes)


def _check_values(
    what: str, boxes: Tensor, labels: Tensor | None, image_of: Tensor, n: int, num_classes: int
) -> None:
    sound = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1)
    known = torch.ones_like(sound)
    if labels is not None:
        known = (labels >= 0) & (labels < num_classes)
    for good, said in (
        ((image_of >= 0) & (image_of < n), f"image_of must be in 0..{n - 1}"),
        (sound, "boxes must be finite, with x1 < x2 and y1 < y2"),
        (known, f"labels must be in 0..{num_classes - 1}"),
    ):
        if not good.all():
            row = int((~good).nonzero()[0])
            image = int(image_of[row])
            before = int((image_of[:row] == image).sum())
            label = "" if labels is None else f", label {int(labels[row])}"
            raise UserError(
                f"{what}: {said}; box {before} of image {image} in the batch (row {row}) is "
                f"{boxes[row].tolist()}{label}"
            )


def shown_extents(images: Tensor, sizes: Tensor | None) -> Tensor:
    """Width and height of each picture inside the zeros around it, (N, 2).

    Args:
        images: (N, 3, H, W).
        sizes: Height and width, (N, 2), where they are known: not of a teacher of maps.
    """
    return picture_extents(images, (0.0,) * 3) if sizes is None else sizes.flip(1)


def leveled(**maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Maps of all levels, finest first, by name and level: `features.0`."""
    return {f"{name}.{level}": one for name, some in maps.items() for level, one in enumerate(some)}


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: bfloat16 has no tenth of a pixel at 32, and no whole one at 512."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def logits_at(
    maps: Sequence[Tensor],
    levels: Sequence[Level],
    chosen: Tensor,
    boxes: Tensor,
    image_of: Tensor,
    num_classes: int,
) -> Tensor:
    """Class logits at the place that is responsible for each box, the mean over its anchors.

    Args:
        maps: (N, A*C, h, w) of each level.
        levels: The same.
        chosen: Level of each box, (M,) int64.
        boxes: (M, 4); the place is the one whose anchors' middle is nearest to the box's.
        image_of: (M,).
        num_classes: C.

    Returns:
        (M, C).
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
    """Detections of each image, the best first, as one tensor without a gradient.

    Args:
        found: torchvision's `boxes` (k, 4), `scores` (k,), `labels` (k,), sorted by score.
        top: K; further ones are left out, rows of zeros stand for missing ones.
        first: The label of class 0.

    Returns:
        (N, K, 6) float32: x1, y1, x2, y2, score, label.
    """
    rows = [
        torch.cat(
            [
                one["boxes"].detach().float(),
                one["scores"].detach().float()[:, None],
                (one["labels"] - first).float()[:, None],
            ],
            dim=1,
        )[:top]
        for one in found
    ]
    whole = rows[0].new_zeros(len(rows), top, 6)
    for image, row in enumerate(rows):
        whole[image, : len(row)] = row
    return whole


def pairs(sizes: Tensor) -> list[tuple[int, int]]:
    """Height and width of each image, (N, 2), as torchvision takes them."""
    return [(height, width) for height, width in sizes.tolist()]


REACH = 0.15  # most that a middle moves, as a share of the box's sides
STRETCH = 1.25  # most that a side grows or shrinks by
_GRAIN = 16  # parts of a pixel that coordinates are told apart by
_PRIME = 2_147_483_629  # below 2**31: products of two remainders fit into 63 bits
# A row for each of the four moves, a column for each coordinate.
_FACTORS = (
    (1_597_334_677, 381_201_580, 1_103_515_245, 747_796_405),
    (277_803_737, 1_664_525_003, 921_234_587, 1_812_433_253),
    (1_013_904_223, 134_775_813, 1_566_083_941, 214_013_501),
    (69_069_137, 1_289_706_101, 453_806_245, 1_099_087_573),
)
_STEPS = 1 << 20  # of a share, so that it is exact in float32


def moved_boxes(boxes: Tensor, frame: tuple[int, int]) -> Tensor:
    """A box near each box, which follows from its coordinates alone, as by chance.

    Whoever is asked in a step is asked about the same; where pictures are shifted, mirrored or
    scaled anew in each epoch, so are the boxes, and others are asked about. The middle moves by at
    most `REACH` of width and height, the sides by a factor of at most `STRETCH` either way, each
    evenly spread: the IoU with the true box is 0.52 or more, as of the regions that a second stage
    learns corrections from (0.5), and 0.72 in the mean.

    Args:
        boxes: (M, 4) xyxy pixels.
        frame: Height and width of the frame, which no moved box reaches out of.

    Returns:
        (M, 4) of the same type, without a gradient.
    """
    boxes = boxes.detach()
    across, down, wider, higher = _shares(boxes).to(boxes.dtype).mul(2).sub(1).unbind(dim=1)
    middles, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    middles = middles + REACH * sides * torch.stack([across, down], dim=1)
    half = sides / 2 * STRETCH ** torch.stack([wider, higher], dim=1)
    found = torch.cat([middles - half, middles + half], dim=1).clamp(min=0.0)
    height, width = frame
    return torch.minimum(found, found.new_tensor([width, height, width, height]))


def _shares(boxes: Tensor) -> Tensor:
    """Four numbers in [0, 1) for each box, (M, 4) float32: the same on every device.

    Whole numbers all the way: a sum of coordinates, each times a number of its own, squared, all
    modulo a prime.
    """
    places = (boxes.float() * _GRAIN).round().long() % _PRIME
    factors = torch.tensor(_FACTORS, device=boxes.device)
    mixed = (places[:, None, :] * factors % _PRIME).sum(dim=2) % _PRIME
    return (mixed * mixed % _PRIME % _STEPS).float() / _STEPS
