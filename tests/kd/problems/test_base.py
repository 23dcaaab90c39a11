"""What tasks share: counts of a batch, strides of grids, the ring around a hidden object."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from torch import Tensor

from kd.errors import UserError
from kd.problems import tasks
from kd.problems.base import stride_of
from kd.problems.objects.batch import (
    hidden_boxes,
    hidden_labels,
    image_rows,
    object_counts,
    ring_mask,
)
from kd.registry import accepted


def make_batch(size: int = 64, picture: tuple[int, int] = (64, 48)) -> dict[str, Tensor]:
    """Two images, three objects, the first and the last hidden; the last has no label."""
    return {
        "images": torch.zeros(2, 3, size, size, dtype=torch.uint8),
        "sizes": torch.tensor([picture, picture]),
        "boxes": torch.tensor([[16.0, 16, 32, 32], [0, 0, 8, 8], [24, 40, 44, 60]]),
        "labels": torch.tensor([2, 0, -1]),
        "image_of": torch.tensor([0, 0, 1]),
        "hidden": torch.tensor([0, 2]),
    }


def test_hidden_objects_are_rows_of_the_batch() -> None:
    batch = make_batch()
    assert image_rows(batch).tolist() == [0, 1]
    assert hidden_labels(batch).tolist() == [2, -1]
    assert hidden_boxes(batch)[1].tolist() == [24, 40, 44, 60]


def test_units_are_counted_from_the_batch_alone() -> None:
    counts = object_counts(make_batch(), {"hidden", "labelled", "ring"})
    assert counts["hidden"] == 2
    assert counts["labelled"] == 1
    # Box of 16 grown to 32; box of 20 grown to 40, cut at x 48 and y 64: 34 by 34.
    assert counts["ring"] == (32 * 32 - 16 * 16) + (34 * 34 - 20 * 20)
    with pytest.raises(UserError, match="no mask 'pixels'"):
        object_counts(make_batch(), {"pixels"})


@pytest.mark.parametrize("grid", [2, 4, 8, 16, 64])
def test_the_ring_has_its_area_on_every_grid(grid: int) -> None:
    batch = make_batch()
    ring = ring_mask(batch)((grid, grid))
    assert ring.shape == (2, grid, grid)
    assert (ring >= 0).all()
    area = ring.sum() * (64 / grid) ** 2
    torch.testing.assert_close(area, object_counts(batch, {"ring"})["ring"], rtol=1e-4, atol=1e-2)


def test_the_ring_leaves_out_the_object_and_the_padding() -> None:
    ring = ring_mask(make_batch())((64, 64))
    assert ring[0, 16:32, 16:32].sum() == 0
    assert ring[0, 8:40, 8:40].sum() == 32 * 32 - 16 * 16
    assert ring[1, :, 48:].sum() == 0


@pytest.mark.parametrize(
    ("pixels", "places", "stride"),
    [
        (64, 2, 32),
        (64, 64, 1),
        (40, 3, 16),
        (33, 2, 32),
        (384, 24, 16),
        (299, 35, 9),
        (5, 5, 1),
        (100, 12, 8),
        (100, 6, 16),
    ],
)
def test_a_grids_stride_is_a_power_of_two_where_one_fits(
    pixels: int, places: int, stride: int
) -> None:
    assert stride_of(pixels, places) == stride


def test_tasks_are_frozen_and_hold_no_model() -> None:
    for builder in (entry.load() for entry in tasks().values()):
        task = builder(**accepted(builder, num_classes=3))
        for field in fields(task):
            with pytest.raises(FrozenInstanceError):
                setattr(task, field.name, getattr(task, field.name))
