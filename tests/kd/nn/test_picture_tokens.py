"""Patches that know no others but their near ones, and which of them a region has got into."""

from __future__ import annotations

import pytest
import torch

from kd.errors import UserError
from kd.nn.scene_transformer import Patches, place_boxes


@pytest.mark.parametrize("reach", [0, 1, 2])
def test_what_changes_with_a_region_is_what_it_touched(reach: int) -> None:
    patches = Patches(8, patch=4, reach=reach).eval()
    picture = torch.randn(1, 3, 30, 42)
    region = torch.zeros(1, 30, 42, dtype=torch.bool)
    region[0, 9:15, 17:22] = True
    with torch.no_grad():
        before = patches(picture)
        after = patches(torch.where(region[:, None], torch.randn_like(picture), picture))
    assert before.shape == (1, 8, 8, 11)
    changed = ((before - after).abs() > 1e-6).any(dim=1)[0]
    touched = patches.touched(region)[0]
    assert not (changed & ~touched).any()  # nothing leaks
    assert torch.equal(changed, touched)  # and nothing is left out for nothing


def test_places_cover_the_frame() -> None:
    boxes = place_boxes((2, 4), (0.5, 1.0), torch.zeros(()))
    assert boxes[0].tolist() == [0, 0, 0.25, 0.25] and boxes[-1].tolist() == [0.75, 0.25, 1, 0.5]


def test_sizes_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match="patch 0 must be 1 or more"):
        Patches(8, patch=0, reach=1)
