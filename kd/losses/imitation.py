"""Feature imitation where a mask says so, and the mask around objects that detectors use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kd.errors import UserError
from kd.losses._checks import mask_shape, same_shape, wide_type

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
        mask: Places that count, bool (N, H, W); or their weights, float (N, H, W), 0 or above.

    Returns:
        Scalar; 0 with a zero gradient where nothing is masked.

    Raises:
        UserError: Shapes that differ.
    """
    same_shape("imitation", student, teacher, dimensions=4)
    mask_shape("imitation", "mask", mask, (student.shape[0], *student.shape[2:]))
    distance = (teacher - student).square().sum(dim=1, dtype=wide_type(student))  # (N, H, W)
    # Chosen, not multiplied: what lies outside the mask must not count even where it is not finite.
    chosen = distance.where(mask > 0, 0.0)
    if mask.dtype != torch.bool:
        chosen = chosen * mask.to(chosen.dtype)
    places = mask.sum(dtype=torch.float32 if mask.dtype == torch.bool else None)
    return chosen.sum() / (2 * places.where(places > 0, 1.0)).to(chosen.dtype)


def anchor_grid(
    height: int,
    width: int,
    *,
    stride: float,
    sides: Sequence[tuple[float, float]],
    device: torch.device | None = None,
) -> Tensor:
    """Anchors around the middle of each place of a grid.

    Args:
        height: Places down.
        width: Places across.
        stride: Pixels between places.
        sides: Width and height of each of the K anchors, pixels.
        device: Where the result lies.

    Returns:
        (H, W, K, 4), xyxy pixels.
    """
    x, y = ((torch.arange(count, device=device) + 0.5) * stride for count in (width, height))
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
    says. For anchors of one size the IoU rises with that product, so that the largest IoU comes
    from the largest width and height alone, and the rest of the work is one product and one
    comparison for each place, anchor and box.

    Args:
        boxes: One (G, 4) for each image, xyxy pixels; G may be 0.
        anchors: (H, W, K, 4), xyxy pixels. A grid: x is a function of column and anchor, y of row
            and anchor, and an anchor has one size everywhere.
        psi: Share of the largest IoU, 0..1.

    Returns:
        Bool, (N, H, W); all False for an image without boxes.

    Raises:
        UserError: Shapes that do not fit, anchors that are no grid, psi out of range, or boxes that
            are not finite or have their corners swapped.
    """
    _check_mask(boxes, anchors, psi)
    wide = wide_type(anchors)
    if anchors.numel() == 0 or not any(len(own) for own in boxes):
        places = len(boxes), *anchors.shape[:2]
        return torch.zeros(places, dtype=torch.bool, device=anchors.device)
    # Padded boxes have no area, overlap nothing and so choose nothing.
    padded = pad_sequence([own.to(anchors.device, wide) for own in boxes], batch_first=True)
    columns, rows = anchors[0, :, :, 0::2].to(wide), anchors[:, 0, :, 1::2].to(wide)
    overlap_x = _overlaps(padded[..., 0], padded[..., 2], columns)  # (N, G, K, W)
    overlap_y = _overlaps(padded[..., 1], padded[..., 3], rows)  # (N, G, K, H)
    sizes = (columns[0, :, 1] - columns[0, :, 0]) * (rows[0, :, 1] - rows[0, :, 0])  # (K,)
    sides = padded[..., 2:] - padded[..., :2]
    areas = sides.prod(dim=-1, keepdim=True) + sizes  # (N, G, K): of box and anchor together
    largest = overlap_x.amax(dim=-1) * overlap_y.amax(dim=-1)
    union = areas - largest
    best = (largest / union.where(union > 0, 1.0)).amax(dim=2, keepdim=True)  # (N, G, 1)
    limit = psi * best * (1 + TIE)
    # Solved for the overlap: where its IoU is the limit.
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
        if own.ndim != 2 or own.shape[1] != 4:
            raise UserError(
                f"imitation_mask: boxes of image {image} must be (G, 4), got {tuple(own.shape)}"
            )
    every = torch.cat([anchors.new_zeros(0, 4), *(own.to(anchors) for own in boxes)])
    sizes = anchors[..., 2:] - anchors[..., :2]
    regular = (
        (anchors[..., 0::2] == anchors[:1, :, :, 0::2]).all()
        & (anchors[..., 1::2] == anchors[:, :1, :, 1::2]).all()
        # The last bits of a size depend on where it is.
        & ((sizes - sizes[:1, :1]).abs() <= 1e-4 * (1 + sizes[:1, :1].abs())).all()
        & (sizes >= 0).all()
    )
    sound = (every[:, 2:] >= every[:, :2]).all() & every.isfinite().all()
    is_regular, is_sound = torch.stack([regular, sound]).tolist()  # one wait for the device
    if not is_regular:
        raise UserError(
            "imitation_mask: anchors must be a grid: x the same in every row, y in every column, "
            "one size for each of the K anchors"
        )
    if not is_sound:
        raise UserError("imitation_mask: boxes must be finite, with x1 <= x2 and y1 <= y2")
