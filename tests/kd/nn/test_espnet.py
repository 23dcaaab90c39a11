"""ESPNet: its published size, and its spatial pyramid worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd.errors import UserError
from kd.nn.espnet import BRANCHES, ESPNet, ESPNetC, SpatialPyramid


def convolutions(made: SpatialPyramid) -> list[nn.Conv2d]:
    return [branch for branch in made.branches if isinstance(branch, nn.Conv2d)]


def pyramid(*, residual: bool) -> SpatialPyramid:
    """Five channels in and out, one of the first channel for each branch; no norm at the end."""
    made = SpatialPyramid(5, 5, residual=residual)
    made.end = nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        made.reduce.weight.copy_(torch.tensor([1.0, 0, 0, 0, 0]).view(1, 5, 1, 1))
        for branch in convolutions(made):
            branch.weight.zero_()
    return made


def test_the_published_sizes() -> None:
    def millions(model: nn.Module) -> float:
        return sum(parameter.numel() for parameter in model.parameters()) / 1e6

    assert millions(ESPNetC(20)) == pytest.approx(0.349, rel=0.03)
    assert millions(ESPNet(20)) == pytest.approx(0.364, rel=0.03)


def test_each_dilation_is_added_to_the_next_and_the_smallest_stands_alone() -> None:
    made = pyramid(residual=True)
    with torch.no_grad():
        for factor, branch in enumerate(convolutions(made), start=1):
            branch.weight[:, :, 1, 1] = factor
        maps = torch.tensor([2.0, 10, 20, 30, 40]).view(1, 5, 1, 1)
        # The reduced map is 2, the branches' are 2, 4, 6, 8, 10; sums begin at the second one.
        expected = [2 + 2.0, 4 + 10, (4 + 6) + 20, (4 + 6 + 8) + 30, (4 + 6 + 8 + 10) + 40]
        assert made(maps).flatten().tolist() == expected
        made.residual = False
        assert made(maps).flatten().tolist() == [2, 4, 10, 18, 28]


def test_each_branch_looks_as_far_as_its_dilation() -> None:
    made = pyramid(residual=False)
    with torch.no_grad():
        for branch in convolutions(made):
            branch.weight[:, :, 0, 0] = 1  # up and to the left
        maps = torch.zeros(1, 5, 40, 40)
        maps[0, 0, 10, 10] = 1
        found = [channel.nonzero().tolist() for channel in made(maps)[0]]
    places = [[10 + dilation, 10 + dilation] for dilation in BRANCHES]
    assert found == [places[:1], *(places[1:end] for end in range(2, 6))]


def test_a_pyramid_that_halves_the_grid_has_no_residual() -> None:
    assert not SpatialPyramid(10, 10, stride=2).residual
    assert not SpatialPyramid(5, 10).residual
    made = SpatialPyramid(7, 13, stride=2)
    # What five branches do not share out evenly is the first one's.
    assert [branch.out_channels for branch in convolutions(made)] == [5, 2, 2, 2, 2]
    assert made(torch.randn(2, 7, 9, 12)).shape == (2, 13, 5, 6)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UserError, match="espnet: shallow must be at least 1, got 0"):
        ESPNet(3, shallow=0)
    with pytest.raises(UserError, match="espnet: deep must be at least 1, got 0"):
        ESPNetC(3, deep=0)
    with pytest.raises(UserError, match=r"espnet: dropout must be in \[0, 1\), got 1"):
        ESPNetC(3, dropout=1.0)
