"""The inputs and outputs that all detectors share, and their base class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.regions import image_extents

# Outputs of a second stage for given boxes.
SECOND_STAGE = ("object_logits", "object_deltas")


class Level(NamedTuple):
    """A map that heads read, and the anchors at each of its places.

    `kd.losses.anchor_grid` builds the network's own anchors from these.

    Attributes:
        stride: Pixels between places.
        sides: Width and height of the anchors, pixels; empty for a network without anchors.
        offset: Centre of the anchors within a place, in strides. torchvision's anchors are centred
            on a place's upper left corner, 0, which is the centre of a convolution's receptive
            field to within half a pixel; CenterNet's cells on their middle, 0.5.
    """

    stride: int
    sides: tuple[tuple[float, float], ...] = ()
    offset: float = 0.5


class Inputs(NamedTuple):
    """Arguments of a detector; all but the images are optional."""

    images: Tensor  # (N, 3, H, W), normalised, 0 in the padding at the right and at the bottom
    sizes: Tensor | None  # (N, 2) int64, height and width of the images without padding
    boxes: Tensor | None  # (M, 4) of objects, xyxy pixels
    labels: Tensor | None  # (M,) int64, 0..C-1
    image_of: Tensor | None  # (M,) int64, the image of each box
    crowds: Tensor | None  # (Q, 4) boxes of crowds, xyxy pixels
    crowd_of: Tensor | None  # (Q,) int64, the image of each crowd
    near_boxes: Tensor | None  # (M, 4) a box near each box, for the second stage


class Detector(nn.Module):
    """Base class of all detectors.

    Training needs `sizes`, `boxes`, `labels` and `image_of`, and returns losses, `loss.NAME`.
    Evaluation with `sizes` returns `detections` (N, K, 6), best first: xyxy box, score, label.
    Without `sizes` the output holds the raw maps alone, for teachers; networks on a pyramid return
    `features.L` alone if boxes are not given either.

    Attributes:
        title: Name in messages.
        num_classes: C.
        top: K, detections per image.
        levels: Maps with their anchors, finest first.
        loss_units: What each loss is a mean over, for `kd.problems.base.Mean`.
    """

    title: str
    num_classes: int
    top: int
    levels: tuple[Level, ...]
    loss_units: Mapping[str, str]

    def forward(
        self,
        images: Tensor,
        sizes: Tensor | None = None,
        boxes: Tensor | None = None,
        labels: Tensor | None = None,
        image_of: Tensor | None = None,
        crowds: Tensor | None = None,
        crowd_of: Tensor | None = None,
        near_boxes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Check the inputs, see `Inputs`, and `detect`."""
        given = Inputs(images, sizes, boxes, labels, image_of, crowds, crowd_of, near_boxes)
        check_inputs(self.title, self.training, given, self.num_classes)
        return self.detect(given)

    def detect(self, given: Inputs) -> dict[str, Tensor]:
        """Outputs by name for checked inputs."""
        raise NotImplementedError


class Objects(NamedTuple):
    """Boxes and labels of each image; `order` holds their rows in the batch, concatenated."""

    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    order: Tensor

    def targets(self, first: int) -> list[dict[str, Tensor]]:
        """As torchvision takes them, with label `first` for class 0."""
        return [
            {"boxes": boxes, "labels": labels + first}
            for boxes, labels in zip(self.boxes, self.labels, strict=True)
        ]

    def in_batch_order(self, rows: Tensor) -> Tensor:
        """Bring rows (M, ...) from the order of images to that of the batch."""
        return rows[self.order.argsort()]


def objects_of(boxes: Tensor, labels: Tensor | None, image_of: Tensor, n: int) -> Objects:
    """Split boxes (M, 4) and labels (M,), 0 by default, by image; `n` is the number of images."""
    order = image_of.argsort(stable=True)
    counts = image_of.bincount(minlength=n).tolist()
    known = torch.zeros_like(image_of) if labels is None else labels
    return Objects(boxes[order].split(counts), known[order].split(counts), order)


def check_inputs(what: str, training: bool, given: Inputs, num_classes: int) -> None:
    """Check that inputs are complete and that objects can be learned.

    Raises:
        UserError: Training without sizes or objects, boxes without their images, shapes that do not
            fit; for tensors on the CPU, boxes that are not finite or have no area, labels or images
            out of range. On an accelerator reading values would make each step wait.
    """
    images, sizes, boxes, labels, image_of, _, _, near_boxes = given
    needed = {"sizes": sizes, "boxes": boxes, "labels": labels, "image_of": image_of}
    missing = [name for name, tensor in needed.items() if tensor is None]
    if training and missing:
        raise UserError(f"{what}: training needs {', '.join(missing)} too")
    if sizes is not None and tuple(sizes.shape) != (len(images), 2):
        raise UserError(f"{what}: sizes must be ({len(images)}, 2), got {tuple(sizes.shape)}")
    if near_boxes is not None and (boxes is None or near_boxes.shape != boxes.shape):
        beside = "no boxes" if boxes is None else f"boxes {tuple(boxes.shape)}"
        raise UserError(
            f"{what}: near_boxes must be a box near each box, got {tuple(near_boxes.shape)} and "
            f"{beside}"
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
    for good, rule in (
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
                f"{what}: {rule}; box {before} of image {image} in the batch (row {row}) is "
                f"{boxes[row].tolist()}{label}"
            )


def known_extents(images: Tensor, sizes: Tensor | None) -> Tensor:
    """Width and height of each image without padding, (N, 2); measured if sizes are not given."""
    return image_extents(images, (0.0,) * 3) if sizes is None else sizes.flip(1)


def leveled(**maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Maps of all levels, finest first, by name and level: `features.0`."""
    return {f"{name}.{level}": one for name, some in maps.items() for level, one in enumerate(some)}


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: bfloat16 cannot resolve 0.1 pixels at 32, nor whole pixels at 512."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def logits_at(
    maps: Sequence[Tensor],
    levels: Sequence[Level],
    chosen: Tensor,
    boxes: Tensor,
    image_of: Tensor,
    num_classes: int,
) -> Tensor:
    """Class logits (M, C) at the place responsible for each box, the mean over its anchors.

    Args:
        maps: (N, A*C, h, w) of each level.
        levels: Their strides and offsets.
        chosen: Level of each box, (M,) int64.
        boxes: (M, 4); the place is that whose anchors' centre is nearest to the box's.
        image_of: (M,).
        num_classes: C.
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
    """Detections of each image, best first, as one tensor (N, K, 6) float32 without a gradient.

    Args:
        found: torchvision's `boxes` (k, 4), `scores` (k,), `labels` (k,), sorted by score.
        top: K; further ones are left out, missing ones are rows of zeros.
        first: The label of class 0.
    """
    whole = found[0]["boxes"].new_zeros(len(found), top, 6, dtype=torch.float32)
    for image, one in enumerate(found):
        rows = [one["boxes"], one["scores"][:, None], (one["labels"] - first)[:, None]]
        best = torch.cat([part.detach().float() for part in rows], dim=1)[:top]
        whole[image, : len(best)] = best
    return whole


def pairs(sizes: Tensor) -> list[tuple[int, int]]:
    """Height and width of each image, (N, 2), as torchvision takes them."""
    return [(height, width) for height, width in sizes.tolist()]


REACH = 0.15  # largest shift of a box's centre, as a fraction of its sides
STRETCH = 1.25  # largest factor that a side is scaled by
_GRAIN = 16  # coordinates are hashed to a sixteenth of a pixel
_PRIME = 2_147_483_629  # below 2**31: products of two remainders fit into 63 bits
# A row for each of the four changes, a column for each coordinate.
_FACTORS = (
    (1_597_334_677, 381_201_580, 1_103_515_245, 747_796_405),
    (277_803_737, 1_664_525_003, 921_234_587, 1_812_433_253),
    (1_013_904_223, 134_775_813, 1_566_083_941, 214_013_501),
    (69_069_137, 1_289_706_101, 453_806_245, 1_099_087_573),
)
_STEPS = 1 << 20  # resolution of the hashed numbers, exact in float32


def moved_boxes(boxes: Tensor, frame: tuple[int, int]) -> Tensor:
    """A pseudo-random box near each box, a function of its coordinates alone.

    So student and teacher evaluate the same boxes in a step, and other boxes once an image is
    shifted, mirrored or scaled. The centre moves by at most `REACH` of width and height, the sides
    by a factor of at most `STRETCH` either way, uniformly: the IoU with the original is at least
    0.52, as of the regions that a second stage learns from (0.5), and 0.72 on average.

    Args:
        boxes: (M, 4) xyxy pixels.
        frame: Height and width that moved boxes are clipped to.

    Returns:
        (M, 4) of the same type, without a gradient.
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
    """Hash boxes to four numbers in [0, 1) each, (M, 4) float32, in integers: equal on any device.

    A weighted sum of the coordinates, squared, modulo a prime.
    """
    places = (boxes.float() * _GRAIN).round().long() % _PRIME
    factors = torch.tensor(_FACTORS, device=boxes.device)
    mixed = (places[:, None, :] * factors % _PRIME).sum(dim=2) % _PRIME
    return (mixed * mixed % _PRIME % _STEPS).float() / _STEPS
