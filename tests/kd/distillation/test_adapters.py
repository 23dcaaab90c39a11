"""Adapters from a student's shape to the teacher's."""

from __future__ import annotations

import pytest
import torch

from kd.distillation.registry import ADAPTERS
from kd.errors import ConfigError, UserError
from kd.registry import build


@pytest.mark.parametrize("name", ["conv1x1", "conv3x3"])
def test_convolutions_change_the_channels_and_keep_an_odd_grid(name: str) -> None:
    adapter = build(ADAPTERS, name, {}, what="adapter", in_channels=3, out_channels=7)
    features = torch.randn(2, 3, 5, 9, requires_grad=True)
    adapted = adapter(features)
    assert adapted.shape == (2, 7, 5, 9)
    adapted.sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()


def test_conv3x3_starts_near_zero_and_ends_in_a_relu_unless_told_otherwise() -> None:
    features = torch.randn(2, 64, 8, 8)
    adapted = ADAPTERS["conv3x3"].load()(64, 8)(features)
    assert adapted.min() >= 0 and adapted.max() < 2
    assert ADAPTERS["conv3x3"].load()(64, 8, relu=False)(features).min() < 0


def both_ways(
    where: torch.Tensor, relu: bool
) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """Results and gradients of one convolution: everywhere, and where it counts; both maps."""
    torch.manual_seed(0)
    adapter = ADAPTERS["conv3x3"].load()(3, 5, relu=relu, init_std=0.5)
    features, factor = torch.randn(2, 3, 6, 7), torch.randn(2, 5, 6, 7)
    found, maps = [], []
    for given in ((), (where,)):
        own = features.clone().requires_grad_()
        adapter.zero_grad()
        adapted = adapter(own, *given)
        chosen = torch.where(where[:, None] > 0, adapted, 0.0)
        (chosen * factor).sum().backward()
        assert own.grad is not None
        weights = [one.grad.clone() for one in adapter.parameters() if one.grad is not None]
        found.append([chosen.detach(), own.grad, *weights])
        maps.append(adapted.detach())
    return found, maps


@pytest.mark.parametrize("relu", [True, False])
def test_conv3x3_where_few_places_count_is_the_same_there(relu: bool) -> None:
    where = torch.zeros(2, 6, 7)
    # A corner, an edge, neighbours, by weights; of the second image the last place.
    where[0, 0, 0] = where[0, 3, 6] = where[1, 5, 6] = 1.0
    where[0, 2, 3:5] = 0.25
    (whole, part), (_, sparse) = both_ways(where, relu)
    assert len(whole) == 4  # the result, gradients of features, weight and bias
    for one, other in zip(whole, part, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)
    assert not sparse[~(where > 0)[:, None].expand_as(sparse)].any()


def test_conv3x3_where_nothing_or_much_counts() -> None:
    (whole, part), _ = both_ways(torch.zeros(2, 6, 7, dtype=torch.bool), False)
    assert all(not one.any() for one in (*whole, *part))
    assert [one.shape for one in whole] == [one.shape for one in part]  # all have a gradient
    _, (whole_map, much) = both_ways(torch.ones(2, 6, 7, dtype=torch.bool), False)
    assert torch.equal(whole_map, much)


def test_conv3x3_takes_places_of_its_own_grid_alone_and_no_image_at_all() -> None:
    adapter = ADAPTERS["conv3x3"].load()(3, 5)
    with pytest.raises(UserError, match=r"mask \(2, 4, 6\) does not fit features \(2, 3, 6, 4\)"):
        adapter(torch.randn(2, 3, 6, 4), torch.ones(2, 4, 6))
    assert adapter(torch.randn(0, 3, 6, 4), torch.ones(0, 6, 4)).shape == (0, 5, 6, 4)


def test_linear_works_on_vectors() -> None:
    assert ADAPTERS["linear"].load()(6, 4)(torch.randn(5, 6)).shape == (5, 4)
    assert ADAPTERS["linear"].load()(6, 4)(torch.randn(0, 6)).shape == (0, 4)


@pytest.mark.parametrize("size", [[3, 4], [12, 10], [5, 9]])
def test_resize_gives_the_grid_that_was_asked_for(size: list[int]) -> None:
    for channels in (3, 8):
        adapter = build(
            ADAPTERS, "resize", {"size": size}, what="adapter", in_channels=3, out_channels=channels
        )
        assert adapter(torch.randn(2, 3, 5, 9)).shape == (2, channels, *size)


def test_resize_without_new_channels_has_no_weights_and_keeps_constants() -> None:
    adapter = ADAPTERS["resize"].load()(3, 3, size=(4, 4))
    assert not list(adapter.parameters())
    torch.testing.assert_close(
        adapter(torch.full((1, 3, 9, 7), 2.0)), torch.full((1, 3, 4, 4), 2.0)
    )


def test_adapters_survive_a_state_dict() -> None:
    for name, options in (("conv1x1", {}), ("conv3x3", {}), ("resize", {"size": (2, 2)})):
        first, second = (ADAPTERS[name].load()(3, 5, **options) for _ in range(2))
        second.load_state_dict(first.state_dict())
        features = torch.randn(1, 3, 4, 4)
        torch.testing.assert_close(first(features), second(features))


def test_a_wrong_size_or_option_is_named() -> None:
    with pytest.raises(UserError, match=r"size must be \(height, width\), got \[3\]"):
        ADAPTERS["resize"].load()(3, 5, size=[3])
    with pytest.raises(ConfigError, match="did you mean 'init_std'"):
        build(ADAPTERS, "conv3x3", {"init": 1.0}, what="adapter", in_channels=3, out_channels=5)


def test_resize_shrinks_bfloat16_maps_as_it_does_float32_ones() -> None:
    adapter = ADAPTERS["resize"].load()(3, 3, size=(2, 2))
    maps = torch.randn(1, 3, 8, 8).bfloat16()
    resized = adapter(maps)
    assert resized.dtype == torch.bfloat16
    torch.testing.assert_close(resized, adapter(maps.float()).bfloat16())
