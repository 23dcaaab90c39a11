"""Segmentation losses ignore void places."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses import channel_wise, hint, pair_wise, pixel_wise

Loss = Callable[..., Tensor]

LOSSES = {
    "pixel_wise": functools.partial(pixel_wise, temperature=3.0),
    "channel_wise": channel_wise,
    "channel_wise, T = 1": functools.partial(channel_wise, temperature=1.0),
    "pair_wise": functools.partial(pair_wise, kernel=1),
    "pair_wise, maxima": pair_wise,
    "pair_wise, averages": functools.partial(pair_wise, pool="average", kernel=(2, 3)),
    "hint": hint,
}
WIDE = (3, 40, 5, 7)  # more channels than places: pair_wise goes by nodes
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
# That it is on is warned of: with it, a NaN anywhere on the way back is an error.
anomalies = pytest.mark.filterwarnings("ignore:Anomaly Detection")
every_shape = pytest.mark.parametrize("shape", [(3, 4, 5, 7), WIDE], ids=["narrow", "wide"])


def void_block(shape: tuple[int, ...]) -> Tensor:
    """Some places at random and whole windows; the second image has no valid place."""
    valid = torch.rand(shape[0], *shape[2:]) < 0.7
    valid[:, :2, :4] = False
    valid[0, 4, 6] = True
    valid[1] = False
    return valid


def sides(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for _ in range(2)]


def at_void(maps: Tensor, valid: Tensor, number: float) -> Tensor:
    return maps.masked_fill(~valid[:, None], number)


def with_gradients(loss: Loss, both: list[Tensor], **options: Tensor) -> list[Tensor]:
    """The value, then the gradient of each side."""
    leaves = [side.clone().requires_grad_() for side in both]
    value = loss(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@every_shape
@every_loss
@pytest.mark.parametrize("number", [1e30, -1e30, math.inf, -math.inf, math.nan])
def test_values_at_void_places_change_nothing(
    loss: Loss, shape: tuple[int, ...], number: float
) -> None:
    both, valid = sides(shape), void_block(shape)
    expected = with_gradients(loss, both, valid=valid)
    found = with_gradients(loss, [at_void(side, valid, number) for side in both], valid=valid)
    assert expected[0] > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    for gradient in found[1:]:
        outside = ~valid[:, None].expand_as(gradient)
        assert not gradient[outside].any() and gradient[~outside].any()


@every_shape
@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_full_mask_equals_no_mask(loss: Loss, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    both = sides(shape, dtype)
    valid = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
    found, expected = with_gradients(loss, both, valid=valid), with_gradients(loss, both)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)


@anomalies
@every_shape
@every_loss
def test_all_void_is_zero_with_zero_gradient(loss: Loss, shape: tuple[int, ...]) -> None:
    valid = torch.zeros(shape[0], *shape[2:], dtype=torch.bool)
    with torch.autograd.detect_anomaly(check_nan=True):
        found = with_gradients(loss, sides(shape), valid=valid)
    assert not any(one.any() for one in found)


@anomalies
@every_shape
@every_loss
def test_an_image_without_valid_places_does_not_count(loss: Loss, shape: tuple[int, ...]) -> None:
    both, valid = sides(shape), void_block(shape)
    there = torch.tensor([0, 2])
    with torch.autograd.detect_anomaly(check_nan=True):
        found = with_gradients(loss, both, valid=valid)
    expected = with_gradients(loss, [side[there] for side in both], valid=valid[there])
    assert not any(gradient[1].any() for gradient in found[1:])
    others = [found[0], *(gradient[there] for gradient in found[1:])]
    torch.testing.assert_close(others, expected)


@every_loss
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 9, 2, 3)], ids=["narrow", "wide"])
def test_gradients_of_both_sides_are_the_numerical_ones(loss: Loss, shape: tuple[int, ...]) -> None:
    valid = torch.rand(2, *shape[2:]) < 0.7
    valid[0, 0, :2] = True
    valid[0, 1, :2] = False
    valid[1, :, :3] = False  # of which a window consists
    both = [side.requires_grad_() for side in sides(shape)]
    assert torch.autograd.gradcheck(functools.partial(loss, valid=valid), both)


@every_loss
def test_equal_maps_have_zero_loss(loss: Loss) -> None:
    maps = torch.randn(3, 4, 5, 7)
    assert loss(maps, maps, valid=void_block(WIDE)).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("loss", [channel_wise, pair_wise])
def test_one_valid_place_alone_has_zero_loss(loss: Loss) -> None:
    valid = torch.zeros(3, 5, 7, dtype=torch.bool)
    valid[:, 2, 3] = True
    found = with_gradients(loss, sides((3, 4, 5, 7)), valid=valid)
    assert all(one.abs().max() < 1e-12 for one in found)


@every_shape
@every_loss
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_at_a_valid_place_makes_the_loss_not_finite(
    loss: Loss, shape: tuple[int, ...], side: int, bad: float
) -> None:
    both, valid = sides(shape), void_block(shape)
    for image, row, column in valid.nonzero()[::5].tolist():
        spoiled = [one.clone() for one in both]
        spoiled[side][image, 1, row, column] = bad
        assert not loss(*spoiled, valid=valid).isfinite()


@every_shape
@every_loss
def test_bfloat16_is_compared_in_float32(loss: Loss, shape: tuple[int, ...]) -> None:
    low, valid = sides(shape, torch.bfloat16), void_block(shape)
    exact = with_gradients(loss, [side.double() for side in low], valid=valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(loss, low, valid=valid)
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(exact[0].item(), rel=1e-4)
    for ours, theirs in zip(found[1:], exact[1:], strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.slow
@every_loss
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 9, 2, 3)], ids=["narrow", "wide"])
def test_compiled_loss_has_the_same_value_and_gradients(loss: Loss, shape: tuple[int, ...]) -> None:
    torch.compiler.reset()
    both = sides(shape)
    valid = torch.rand(2, *shape[2:]) < 0.6
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = with_gradients(compiled, both, valid=valid)
    torch.testing.assert_close(found, with_gradients(loss, both, valid=valid))


@pytest.mark.parametrize("loss", [channel_wise, pair_wise])
def test_mismatched_masks_are_rejected(loss: Loss) -> None:
    maps, name = torch.zeros(1, 2, 3, 4), loss.__name__
    with pytest.raises(UserError, match=rf"{name}: valid must be \(1, 3, 4\), got \(3, 4\)"):
        loss(maps, maps, valid=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(UserError, match=rf"{name}: valid must be bool, got float32"):
        loss(maps, maps, valid=torch.ones(1, 3, 4))
    with pytest.raises(UserError, match=rf"{name}: .*got student on cpu, valid on meta"):
        loss(maps, maps, valid=torch.ones(1, 3, 4, dtype=torch.bool, device="meta"))
