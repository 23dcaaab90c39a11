"""Imitation masks of a detector with one map and no anchors, as CenterNet is."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kd.nn.detectors.contract import Level
from kd.nn.networks import DETECTORS
from kd.problems.detection.task import Detection, anchor_sides, anchors_of

SIZE, STRIDE = 256, 4
GRID = (SIZE // STRIDE, SIZE // STRIDE)
LARGE, TALL, SMALL = (
    [60.0, 50.0, 180.0, 170.0],
    [20.0, 20.0, 68.0, 116.0],
    [200.0, 8.0, 212.0, 20.0],
)
PSIS = (0.2, 0.35, 0.5, 0.65, 0.8)


def task(psi: float = 0.5) -> Detection:
    network = DETECTORS["centernet"].load()(num_classes=3, trunk="resnet18", width=0.25, hidden=8)
    return Detection(num_classes=3, levels=network.levels, psi=psi)


def mask(kind: str, boxes: list[list[float]], psi: float = 0.5) -> Tensor:
    batch = {
        "images": torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8),
        "boxes": torch.tensor(boxes),
        "image_of": torch.zeros(len(boxes), dtype=torch.int64),
    }
    return task(psi).masks(batch)[kind](GRID)[0]


def test_the_only_map_has_squares_from_four_strides_to_the_images_side() -> None:
    alone = torch.tensor(anchor_sides(Level(4), 256.0))
    areas = alone.prod(dim=1).sqrt().view(-1, 3)
    torch.testing.assert_close(areas[:, 0], torch.tensor([16.0, 32.0, 64.0, 128.0, 256.0]))
    torch.testing.assert_close(areas, areas[:, :1].expand(-1, 3))
    assert anchor_sides(Level(4), 255.0) == anchor_sides(Level(4), 128.0)
    assert len(anchor_sides(Level(4))) == 3  # of a pyramid's level
    own = Level(4, ((9.0, 9.0),))
    assert anchor_sides(own, 256.0) == own.sides
    assert anchors_of(Level(4), (64, 48), alone=True).shape == (64, 48, 15, 4)
    assert anchors_of(Level(4), (64, 48)).shape == (64, 48, 3, 4)


@pytest.mark.parametrize("box", [LARGE, TALL, SMALL])
def test_near_objects_is_not_inside_boxes_and_grows_as_psi_falls(box: list[float]) -> None:
    inside = mask("inside", [box])
    near = [mask("imitation", [box], psi) for psi in PSIS]
    for looser, stricter in pairwise(near):
        assert (looser | stricter).equal(looser)
    counts = [int(one.sum()) for one in near]
    assert counts[0] > counts[2] > counts[-1] > 0
    assert not any(one.equal(inside) for one in near[2:])
    # At psi = 0.2 it reaches out of the box, at 0.8 it leaves the box's border alone.
    assert (near[0] & ~inside).any() and (inside & ~near[-1]).any()


def test_a_large_boxs_mask_is_its_middle_as_a_matching_anchor_has_it() -> None:
    # 128 x 128, cells' middles 2 off the box's: the best anchor shares 126 x 126 of it, an IoU
    # of 0.940. Half of it needs 10,476 shared: 126 x 83.1, so that it may be off by 44.9 across.
    near = mask("imitation", [[64.0, 64.0, 192.0, 192.0]])
    row = near[GRID[0] // 2].nonzero().flatten()
    assert row.tolist() == [k for k in range(64) if abs(4 * k + 2 - 128) < 44.9]
    assert len(row) == 22 and near.sum() < mask("inside", [[64.0, 64.0, 192.0, 192.0]]).sum()
