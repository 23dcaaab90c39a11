"""saliency_kld and saliency_maps: distributions over the places of an image."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses import saliency_kld, saliency_maps

Loss = Callable[..., Tensor]
both_forms = pytest.mark.parametrize("published", [False, True])
every_loss = pytest.mark.parametrize("loss", [saliency_kld, saliency_maps])


def row(*values: float) -> Tensor:
    """One image of one row."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


def pair(count: int = 3, height: int = 4, width: int = 5) -> tuple[Tensor, Tensor]:
    """Logits, and a density with zeros in it."""
    logits = torch.randn(count, 1, height, width, dtype=torch.float64)
    density = torch.rand(count, 1, height, width, dtype=torch.float64)
    return logits, density.where(density > 0.3, torch.zeros_like(density))


def test_kld_of_three_places_by_hand() -> None:
    # Prediction (1/6, 1/3, 1/2), truth (1/2, 0, 1/2): what has no mass costs nothing.
    logits = row(0.0, math.log(2), math.log(3))
    expected = 0.5 * math.log(3) + 0.5 * math.log(1)
    assert saliency_kld(logits, row(4, 0, 4)).item() == pytest.approx(expected, rel=1e-12)


def test_published_kld_of_two_places_by_hand() -> None:
    # Sigmoids 1/2 and 3/4, by their sum 2/5 and 3/5; truth 1/4 and 3/4.
    logits = row(0.0, math.log(3))
    expected = 0.25 * math.log(0.625) + 0.75 * math.log(1.25)
    value = saliency_kld(logits, row(10, 30), published=True)
    assert value.item() == pytest.approx(expected, abs=1e-6)
    assert saliency_kld(logits, row(10, 30)).item() == pytest.approx(0.0, abs=1e-12)


def test_maps_of_two_places_by_hand() -> None:
    # Student: even. Teacher: softmax (0, 2 ln 3) / 2 = (1/4, 3/4).
    student, teacher = row(0, 0), row(0, 2 * math.log(3))
    expected = 4 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    value = saliency_maps(student, teacher, temperature=2.0)
    assert value.item() == pytest.approx(expected, rel=1e-12)


@both_forms
def test_kld_agrees_with_a_loop_over_valid_places(published: bool) -> None:
    logits, density = pair()
    valid = torch.rand(3, 4, 5) < 0.7
    total, eps = 0.0, 1e-7
    for image in range(3):
        places = valid[image].nonzero().tolist()
        truth = [density[image, 0, y, x].item() for y, x in places]
        raw = [logits[image, 0, y, x].item() for y, x in places]
        if published:
            maps = [1 / (1 + math.exp(-one)) for one in raw]
            for one, two in zip(truth, maps, strict=True):
                q, p = one / (eps + sum(truth)), two / (eps + sum(maps))
                total += q * math.log(eps + q / (eps + p))
        else:
            maps = [math.exp(one) for one in raw]
            for one, two in zip(truth, maps, strict=True):
                q, p = one / sum(truth), two / sum(maps)
                total += q * math.log(q / p) if q else 0.0
    value = saliency_kld(logits, density, valid, published=published)
    assert value.item() == pytest.approx(total / 3, rel=1e-9)


@both_forms
def test_maps_agree_with_a_loop_over_valid_places(published: bool) -> None:
    student, teacher = torch.randn(2, 3, 1, 4, 5, dtype=torch.float64).unbind()
    valid = torch.rand(3, 4, 5) < 0.7
    total, eps = 0.0, 1e-7
    for image in range(3):
        mask = valid[image].flatten()
        s, t = (one[image].flatten()[mask] for one in (student, teacher))
        if published:
            s, t = s.sigmoid() / 3, t.softmax(dim=0) / 3
            p, q = s / (eps + s.sum()), t / (eps + t.sum())
            total += sum((q[i] * (eps + q[i] / (eps + p[i])).log()).item() for i in range(len(q)))
        else:
            p, q = (s / 3).softmax(dim=0), (t / 3).softmax(dim=0)
            total += 9 * sum((q[i] * (q[i] / p[i]).log()).item() for i in range(len(q)))
    value = saliency_maps(student, teacher, valid, temperature=3.0, published=published)
    assert value.item() == pytest.approx(total / 3, rel=1e-9)


def test_temperature_has_no_effect_in_the_published_form_only() -> None:
    student, teacher = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64).unbind()

    def values(published: bool) -> list[Tensor]:
        found = []
        for temperature in (1.0, 3.0, 10.0):
            leaf = student.clone().requires_grad_()
            value = saliency_maps(leaf, teacher, temperature=temperature, published=published)
            found.append(torch.cat([value[None], *torch.autograd.grad(value, leaf)[0].flatten(1)]))
        return found

    quirk, soft = values(published=True), values(published=False)
    for one in quirk[1:]:
        torch.testing.assert_close(one, quirk[0], rtol=1e-5, atol=1e-7)
    for one in soft[1:]:
        assert (one - soft[0]).abs().max() > 0.01
        assert abs(one[0] / soft[0][0] - 1) > 0.05


def test_saliency_losses_are_zero_at_equality() -> None:
    logits, density = pair()
    truth = logits.flatten(1).softmax(dim=1).view_as(logits)
    assert saliency_kld(logits, 7 * truth).item() == pytest.approx(0, abs=1e-12)
    assert saliency_kld(logits, logits.sigmoid(), published=True).item() == pytest.approx(
        0, abs=1e-5
    )
    assert saliency_maps(logits, logits + 5, temperature=3.0).item() == pytest.approx(0, abs=1e-12)
    assert saliency_kld(logits, density).item() > 0.01


@both_forms
def test_kld_is_invariant_to_the_densitys_scale_and_to_the_order_of_places(published: bool) -> None:
    logits, density = pair()
    value = saliency_kld(logits, density, published=published)
    scaled = saliency_kld(logits, 255 * density, published=published)
    torch.testing.assert_close(scaled, value, rtol=1e-5, atol=1e-8)
    flipped = saliency_kld(logits.flip(3), density.flip(3), published=published)
    torch.testing.assert_close(flipped, value, rtol=1e-5, atol=1e-8)


def test_shifting_logits_matters_in_the_published_form_only() -> None:
    logits, density = pair()
    torch.testing.assert_close(saliency_kld(logits + 9, density), saliency_kld(logits, density))
    shifted = saliency_kld(logits + 9, density, published=True)
    assert abs(shifted - saliency_kld(logits, density, published=True)) > 0.01


@both_forms
def test_images_without_density_or_valid_places_do_not_count(published: bool) -> None:
    logits, density = pair(count=4)
    density[1] = 0.0
    valid = torch.ones(4, 4, 5, dtype=torch.bool)
    valid[2] = False
    logits[2] = math.nan
    leaf = logits.requires_grad_()
    value = saliency_kld(leaf, density, valid, published=published)
    kept = [0, 3]
    torch.testing.assert_close(
        value, saliency_kld(logits[kept], density[kept], published=published)
    )
    value.backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert not leaf.grad[1:3].any() and leaf.grad[kept].any()
    none = saliency_kld(logits, torch.zeros_like(density), valid, published=published)
    assert none.item() == 0


@both_forms
def test_a_teacher_without_valid_places_does_not_count(published: bool) -> None:
    student, teacher = torch.randn(2, 3, 1, 4, 4).unbind()
    valid = torch.ones(3, 4, 4, dtype=torch.bool)
    valid[1] = False
    value = saliency_maps(student, teacher, valid, published=published)
    expected = saliency_maps(student[::2], teacher[::2], published=published)
    torch.testing.assert_close(value, expected)
    assert saliency_maps(student, teacher, ~valid & False, published=published).item() == 0


@both_forms
def test_gradients_stay_finite_for_extreme_logits(published: bool) -> None:
    logits = torch.full((1, 1, 6, 6), -60.0)
    logits[0, 0, 0, 0] = 60.0
    logits.requires_grad_()
    density = torch.zeros(1, 1, 6, 6)
    density[0, 0, 5, 5] = 1.0
    for loss in (saliency_kld(logits, density, published=published),
                 saliency_maps(logits, -logits.detach(), published=published)):  # fmt: skip
        assert loss.isfinite() and loss > 1
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all()
        # A softmax learns from a map that is all wrong; saturated sigmoids do not.
        assert bool(gradient.abs().max() > 1e-3) != published


@both_forms
def test_a_density_that_is_not_finite_makes_the_loss_not_finite(published: bool) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        logits, density = pair()
        density[1, 0, 2, 2] = bad
        assert not saliency_kld(logits, density, published=published).isfinite()


def test_gradients_of_the_density_are_the_numerical_ones() -> None:
    logits = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    density = (torch.rand(2, 1, 3, 3, dtype=torch.float64) + 0.1).requires_grad_()
    for published in (False, True):
        assert torch.autograd.gradcheck(
            lambda one, two: saliency_kld(one, two, published=published),  # noqa: B023
            (logits, density),
        )


@every_loss
def test_saliency_losses_reject_bad_input(loss: Loss) -> None:
    maps, name = torch.rand(2, 1, 4, 4), loss.__name__
    with pytest.raises(UserError, match=rf"{name}: \w+ \(2, 1, 4, 4\) and \w+ \(2, 1, 4, 3\) dif"):
        loss(maps, maps[..., :3])
    with pytest.raises(UserError, match=rf"{name}: expected 4 dimensions, got \w+ \(2, 4, 4\)"):
        loss(maps[:, 0], maps[:, 0])
    wide = maps.expand(2, 3, 4, 4)
    with pytest.raises(UserError, match=rf"{name}: \w+ must have one channel, got \(2, 3, 4, 4\)"):
        loss(wide, wide)
    with pytest.raises(UserError, match=rf"{name}: \w+ must be floating point, got int64"):
        loss(maps, maps.long())
    with pytest.raises(UserError, match=rf"{name}: valid must be \(2, 4, 4\), got \(2, 1, 4, 4\)"):
        loss(maps, maps, maps > 0)
    with pytest.raises(UserError, match=rf"{name}: valid must be bool, got float32"):
        loss(maps, maps, maps[:, 0])
    with pytest.raises(UserError, match=rf"{name}: expected one device, got .* on meta"):
        loss(maps, maps.to("meta"))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_must_be_above_0(temperature: float) -> None:
    maps = torch.rand(2, 1, 4, 4)
    with pytest.raises(UserError, match="saliency_maps: temperature must be above 0 and finite"):
        saliency_maps(maps, maps, temperature=temperature)
