"""Grey input: a trunk summed over RGB answers to it as it did to the image."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision import models

from kd.nn.trunk import build_trunk
from kd.nn.trunk_base import LUMA, grey_and_region


def test_luma_lies_beside_the_region_and_hidden_stays_zero() -> None:
    images = torch.randn(2, 4, 5, 6)
    images[:, :3, 1:3] = 0
    seen = grey_and_region(images)
    assert seen.shape == (2, 2, 5, 6)
    assert torch.equal(seen[:, 1], images[:, 3])
    assert not seen[:, 0, 1:3].any()
    expected = sum(weight * images[:, channel] for channel, weight in enumerate(LUMA))
    torch.testing.assert_close(seen[:, 0], expected)


def test_a_grey_trunk_keeps_its_response(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(models.get_model("squeezenet1_1", weights=None).state_dict(), path)
    colour = build_trunk("squeezenet1_1", weights=str(path)).eval()
    grey = build_trunk("squeezenet1_1", weights=str(path), in_channels=2, grey=True).eval()
    picture = torch.randn(2, 1, 64, 64)
    region = (torch.rand(2, 1, 64, 64) > 0.5).float()
    images = torch.cat([picture.expand(-1, 3, -1, -1), region], dim=1)
    with torch.no_grad():  # the region's weights start at 0
        torch.testing.assert_close(grey(grey_and_region(images)), colour(images[:, :3]))
