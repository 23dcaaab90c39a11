"""The boxes that detectors are asked about, student and teacher alike: near the true ones.

Of a box that fits, the right correction is none. A student that is taught what a teacher says of
true boxes learns to leave every box as it is; what it has to correct are proposals. So both are
asked about boxes as far from the true ones as the proposals that a second stage learns from.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
