"""Feature imitation where a mask says so, and the mask around objects that detectors use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from kd.errors import UserError
from kd.losses._checks import comparable, mask_fits, name_of, wide_type

CHUNK = 1 << 22  # overlaps held at a time: 16 MiB of float32
# Anchors of twice the side around one box have a quarter of its IoU, whatever the place: IoUs equal
# to the limit are common, and rounding must not let them in.
TIE = 1e-5


def imitation(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Half the squared distance between features, per masked place.

    Wang et al., 2019, https://arxiv.org/abs/1906.03609: the sum over masked places and all channels
    of `(teacher - student)^2`, divided by twice the number of masked places in the whole batch. The
    mask is an imitation mask around objects for detectors, and a ring around an object for what a
    context teacher knows of its surroundings.

    Args:
        student: Adapted features, (N, C, H, W).
        teacher: Features, (N, C, H, W).
        mask: Places that count, bool (N, H, W); or their weights, float (N, H, W), 0 or above. What
            the features are elsewhere does not matter, were they not even finite.

    Returns:
        Scalar; 0 with a zero gradient where nothing is masked.

    Raises:
        UserError: Shapes or devices that differ, integers for features or mask.
    """
    comparable("imitation", student, teacher, dimensions=4)
    mask_fits("imitation", "mask", mask, student, beside="student", weights=True)
    wide = wide_type(student, teacher)
    outside = ~(mask > 0)
    # The compiler fuses the formula by itself.
    distances = _distances if torch.compiler.is_compiling() else _Distances.apply
    chosen: Tensor = distances(student, teacher, outside, wide)
    if mask.dtype != torch.bool:
        chosen = chosen * mask.to(wide)
    places = mask.sum(dtype=wide)
    return chosen.sum() / (2 * places.where(places > 0, 1.0))


class _Distances(torch.autograd.Function):
    """Squared distance at each place, (N, H, W), 0 outside; the difference is taken twice.

    Left to autograd, a place outside that is not finite has a gradient of 0 times NaN, or else a
    pass over the maps must fill it, and the difference is held between the two passes.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, outside: Tensor, wide: torch.dtype
    ) -> Tensor:
        """The sum over channels of the squares."""
        ctx.save_for_backward(student, teacher, outside)
        ctx.wide = wide
        gap = student.to(wide) - teacher
        return gap.square_().sum(dim=1).masked_fill_(outside, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Twice the difference, and its opposite."""
        student, teacher, outside = ctx.saved_tensors
        gap = student.to(ctx.wide) - teacher
        gap.mul_(2 * upstream[:, None]).masked_fill_(outside[:, None], 0.0)
        wants_student, wants_teacher = ctx.needs_input_grad[:2]
        for_student = gap.to(student.dtype) if wants_student else None
        for_teacher = (-gap).to(teacher.dtype) if wants_teacher else None
        return for_student, for_teacher, None, None


def _distances(student: Tensor, teacher: Tensor, outside: Tensor, wide: torch.dtype) -> Tensor:
    gap = student.to(wide) - teacher
    return gap.masked_fill(outside[:, None], 0.0).square().sum(dim=1)


def anchor_grid(
    height: int,
    width: int,
    *,
    stride: float,
    sides: Sequence[tuple[float, float]],
    offset: float = 0.5,
    device: torch.device | None = None,
) -> Tensor:
    """Anchors around the middle of each place of a grid, or around another point of it.

    Args:
        height: Places down.
        width: Places across.
        stride: Pixels between places.
        sides: Width and height of each of the K anchors, pixels.
        offset: Where in a place the anchors' middle is, in strides; 0 for a detector of
            torchvision's, whose own anchors lie around the places' upper left corners.
        device: Where the result lies.

    Returns:
        (H, W, K, 4), xyxy pixels.
    """
    x, y = ((torch.arange(count, device=device) + offset) * stride for count in (width, height))
    middles = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[:, :, None]  # (H, W, 1, 2)
    half = torch.tensor(sides, device=device, dtype=middles.dtype).view(-1, 2) / 2
    return torch.cat([middles - half, middles + half], dim=-1)


def imitation_mask(boxes: Sequence[Tensor], anchors: Tensor, *, psi: float = 0.5) -> Tensor:
    """Places whose anchors overlap an object nearly as well as the best anchor does.

    Wang et al., 2019, https://arxiv.org/abs/1906.03609: for each box, its IoU with every anchor at
    every place, outside the picture too; a place counts where any of its anchors has an IoU
    strictly above `psi` times that box's largest; boxes are united. Coordinates are continuous: a
    box from 0 to 16 is 16 wide. At psi = 0 these are the places that overlap a box at all, at
    psi = 1 none.

    For a feature pyramid call it once a level, with that level's anchors and the boxes assigned to
    it: the largest IoU is then that of the level. With all boxes on every level each box finds a
    "best" anchor on levels that do not fit it, which teaches background.

    An anchor's overlap with a box is a width, which the column says, times a height, which the row
    says. For anchors of one size the IoU rises with that product, so that the largest comes from
    the largest width and height alone; the rest is a product and a comparison for each place.

    Args:
        boxes: One (G, 4) for each image, xyxy pixels; G may be 0. They may reach over the picture
            or lie outside. A box that no anchor overlaps, or without area, chooses nothing.
        anchors: (H, W, K, 4), xyxy pixels. A grid: x is a function of column and anchor, y of row
            and anchor, and an anchor has one size everywhere.
        psi: Share of the largest IoU, 0..1.

    Returns:
        Bool, (N, H, W); all False for an image without boxes.

    Raises:
        UserError: Shapes that do not fit, psi out of range; and of tensors on the CPU, anchors that
            are no grid, boxes that are not finite or have their corners swapped. On an accelerator
            looking would make each step wait: there, and under `torch.compile`, such boxes choose
            nothing, and such anchors are not noticed.
    """
    _check_mask(boxes, anchors, psi)
    wide = wide_type(anchors)
    if anchors.numel() == 0 or not any(len(own) for own in boxes):
        return anchors.new_zeros(len(boxes), *anchors.shape[:2], dtype=torch.bool)
    # Padded boxes have no area, overlap nothing and so choose nothing.
    padded = pad_sequence([own.to(anchors.device, wide) for own in boxes], batch_first=True)
    columns, rows = anchors[0, :, :, 0::2].to(wide), anchors[:, 0, :, 1::2].to(wide)
    overlap_x = _overlaps(padded[..., 0], padded[..., 2], columns)  # (N, G, K, W)
    overlap_y = _overlaps(padded[..., 1], padded[..., 3], rows)  # (N, G, K, H)
    sizes = (columns[0, :, 1] - columns[0, :, 0]) * (rows[0, :, 1] - rows[0, :, 0])  # (K,)
    # (N, G, K): of box and anchor together.
    areas = (padded[..., 2:] - padded[..., :2]).prod(dim=-1, keepdim=True) + sizes
    largest = overlap_x.amax(dim=-1) * overlap_y.amax(dim=-1)
    union = areas - largest
    best = (largest / union.where(union > 0, 1.0)).amax(dim=2, keepdim=True)  # (N, G, 1)
    limit = psi * best * (1 + TIE)  # solved for the overlap: where its IoU is the limit
    return _any_above(overlap_x, overlap_y, limit * areas / (1 + limit))


def _any_above(overlap_x: Tensor, overlap_y: Tensor, least: Tensor) -> Tensor:
    """Whether any box's overlap with any anchor at a place exceeds its least one: (N, H, W).

    Args:
        overlap_x: (N, G, K, W).
        overlap_y: (N, G, K, H).
        least: (N, G, K).
    """
    images, boxes, kinds, width = overlap_x.shape
    height = overlap_y.shape[3]
    found = torch.zeros(images, height, width, dtype=torch.bool, device=least.device)
    step = max(1, CHUNK // (boxes * height * width))
    for first in range(0, images, step):
        part = slice(first, first + step)
        for kind in range(kinds):  # one at a time stays in the processor's cache
            product = overlap_y[part, :, kind, :, None] * overlap_x[part, :, kind, None, :]
            found[part] |= (product > least[part, :, kind, None, None]).any(dim=1)
    return found


def _overlaps(low: Tensor, high: Tensor, spans: Tensor) -> Tensor:
    """Length shared by intervals (N, G) and anchors' intervals (L, K, 2): (N, G, K, L)."""
    spans = spans.transpose(0, 1)  # (K, L, 2)
    first = torch.maximum(low[..., None, None], spans[..., 0])
    last = torch.minimum(high[..., None, None], spans[..., 1])
    return (last - first).clamp(min=0.0)


def _check_mask(boxes: Sequence[Tensor], anchors: Tensor, psi: float) -> None:
    if anchors.ndim != 4 or anchors.shape[-1] != 4:
        raise UserError(f"imitation_mask: anchors must be (H, W, K, 4), got {tuple(anchors.shape)}")
    if not 0 <= psi <= 1:
        raise UserError(f"imitation_mask: psi must be in 0..1, got {psi}")
    for image, own in enumerate(boxes):
        what = f"imitation_mask: boxes of image {image}"
        if own.ndim != 2 or own.shape[1] != 4:
            raise UserError(
                f"{what} must be (G, 4), got {tuple(own.shape)}; an image without has (0, 4)"
            )
        if own.dtype == torch.bool or own.is_complex():
            raise UserError(f"{what} must be coordinates, got {name_of(own.dtype)}")
    if torch.compiler.is_compiling():  # values are not there yet
        return
    if anchors.is_cpu and not _is_grid(anchors):
        raise UserError(
            "imitation_mask: anchors must be a grid: x the same in every row, y in every column, "
            "one size for each of the K anchors"
        )
    for image, own in enumerate(boxes):
        if own.is_cpu:
            _check_corners(own, f"imitation_mask: boxes of image {image}")


def _is_grid(anchors: Tensor) -> bool:
    sizes = anchors[..., 2:] - anchors[..., :2]
    return bool(
        (anchors[..., 0::2] == anchors[:1, :, :, 0::2]).all()
        and (anchors[..., 1::2] == anchors[:, :1, :, 1::2]).all()
        # The last bits of a size depend on where it is.
        and ((sizes - sizes[:1, :1]).abs() <= 1e-4 * (1 + sizes[:1, :1].abs())).all()
        and (sizes >= 0).all()
    )


def _check_corners(boxes: Tensor, what: str) -> None:
    sound = (boxes[:, 2:] >= boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1)
    if not sound.all():
        number = int((~sound).nonzero()[0])
        raise UserError(
            f"{what} must be finite, with x1 <= x2 and y1 <= y2; box {number} is "
            f"{boxes[number].tolist()}"
        )
