"""The critic of holistic distillation, its loss and the student's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kd.errors import UserError
from kd.losses.holistic import Critic, SelfAttention, critic_loss, holistic


class Weighted(nn.Module):
    """A critic that is linear in the map: its gradient is known."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, scores: Tensor, images: Tensor) -> Tensor:
        return (scores * self.weight).sum(dim=(1, 2, 3))


def small() -> Critic:
    return Critic(3, widths=(8, 16, 16))


def maps(count: int = 2, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(count, 3, size, size),
        torch.randn(count, 3, size, size),
        torch.randn(count, 3, 32, 32),
    )


def test_the_critics_loss_by_hand() -> None:
    # One place, two classes; D = 3 p0 - 4 p1, slope (3, -4), length 5, penalty 10 * 16.
    critic = Weighted(torch.tensor([3.0, -4.0]).view(1, 2, 1, 1))
    student = torch.tensor([0.75, 0.25]).log().view(1, 2, 1, 1)
    teacher = torch.tensor([0.50, 0.50]).log().view(1, 2, 1, 1)
    images = torch.zeros(1, 3, 2, 2)
    loss = critic_loss(critic, student, teacher, images)
    # D(student) = 2.25 - 1 = 1.25, D(teacher) = -0.5.
    assert loss.item() == pytest.approx(1.25 + 0.5 + 160.0)
    assert holistic(student, images, critic).item() == pytest.approx(-1.25)
    gone = critic_loss(critic, student, teacher, images, penalty=0.0)
    assert gone.item() == pytest.approx(1.75)


def test_gradient_penalty_agrees_with_the_paper() -> None:
    critic = small().eval()
    student, teacher, images = maps()
    loss = critic_loss(critic, student, teacher, images, generator=torch.Generator().manual_seed(3))
    mix = torch.rand(2, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    fake, real = student.softmax(dim=1), teacher.softmax(dim=1)
    expected = 0.0
    for i in range(2):
        between = (fake[i] + mix[i] * (real[i] - fake[i]))[None].requires_grad_()
        (slope,) = torch.autograd.grad(critic(between, images[i : i + 1]).sum(), between)
        judged = [critic(one[i : i + 1], images[i : i + 1]).item() for one in (fake, real)]
        expected += judged[0] - judged[1] + 10.0 * (slope.norm().item() - 1) ** 2
    assert loss.item() == pytest.approx(expected / 2, rel=1e-4)


def test_critic_loss_gives_the_maps_no_gradient() -> None:
    student, teacher, images = maps()
    student.requires_grad_()
    teacher.requires_grad_()
    critic = small()
    critic_loss(critic, student, teacher, images).backward()
    assert student.grad is None and teacher.grad is None
    grads = [p.grad for p in critic.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert any(bool(g.abs().sum() > 0) for g in grads if g is not None)


def test_the_student_loss_raises_the_critic_score() -> None:
    student, _, images = maps()
    student.requires_grad_()
    critic = small().eval()
    before = holistic(student, images, critic)
    before.backward()
    assert student.grad is not None
    with torch.no_grad():
        after = holistic(student - 10.0 * student.grad, images, critic)
    assert after < before


def test_for_equal_maps_the_loss_is_the_penalty() -> None:
    student, _, images = maps()
    critic = small().eval()
    assert critic_loss(critic, student, student, images, penalty=0.0).item() == pytest.approx(
        0.0, abs=1e-6
    )
    shifted = student + torch.randn(2, 1, 16, 16)  # logits plus a constant at each place
    torch.testing.assert_close(holistic(shifted, images, critic), holistic(student, images, critic))


def test_attention_starts_as_identity_and_is_permutation_equivariant() -> None:
    attention = SelfAttention(8)
    features = torch.randn(2, 8, 3, 4)
    assert torch.equal(attention(features), features)
    nn.init.ones_(attention.gamma)
    order = torch.randperm(12)
    mixed = features.flatten(2)[..., order].view_as(features)
    out = attention(features).flatten(2)[..., order].view_as(features)
    torch.testing.assert_close(attention(mixed), out)


def test_attention_agrees_with_a_loop_over_places() -> None:
    attention = SelfAttention(8)
    nn.init.ones_(attention.gamma)
    features = torch.randn(1, 8, 2, 3)
    places = features[0].flatten(1).T  # (6, 8)
    out = attention(features)[0].flatten(1).T

    def through(layer: nn.Conv2d, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, layer.weight.flatten(1), layer.bias)

    for i in range(6):
        query = through(attention.query, places[i])
        looks = [query @ through(attention.key, places[j]) for j in range(6)]
        weights = torch.stack(looks).softmax(dim=0)
        seen = sum(weights[j] * through(attention.value, places[j]) for j in range(6))
        torch.testing.assert_close(out[i], places[i] + seen)


def test_every_convolution_but_the_last_has_spectral_norm_one() -> None:
    critic = small()
    student, _, images = maps()
    for _ in range(50):  # the estimate takes a few steps
        critic(student.softmax(dim=1), images)
    for layer in critic.layers:
        if isinstance(layer, nn.Conv2d):
            norm = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item()
            assert norm == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (64, 33)])
def test_the_critic_accepts_any_size_above_the_minimum(size: tuple[int, int]) -> None:
    critic = small()
    judged = critic(torch.rand(3, 3, *size), torch.randn(3, 3, 20, 50))
    assert judged.shape == (3,) and judged.isfinite().all()


def test_the_critic_stays_in_float32_under_autocast() -> None:
    critic = small().eval()
    student, teacher, images = maps()
    exact = critic_loss(
        critic, student, teacher, images, generator=torch.Generator().manual_seed(0)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = critic_loss(
            critic, student, teacher, images, generator=torch.Generator().manual_seed(0)
        )
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact)
    half = critic_loss(critic, student.bfloat16(), teacher.bfloat16(), images.bfloat16())
    assert half.isfinite() and half.dtype == torch.float32


def test_critic_copy_and_state_dict_round_trip() -> None:
    critic = small()
    student, _, images = maps()
    critic(student.softmax(dim=1), images)
    other = copy.deepcopy(critic)
    fresh = small()
    fresh.load_state_dict(critic.state_dict())
    for one in (other, fresh):
        torch.testing.assert_close(
            one.eval()(student.softmax(dim=1), images),
            critic.eval()(student.softmax(dim=1), images),
        )


def test_the_critic_rejects_maps_that_are_too_small() -> None:
    with pytest.raises(UserError, match="need maps of at least 8 x 8, got 8 x 7"):
        small()(torch.rand(2, 3, 8, 7), torch.rand(2, 3, 8, 8))


def test_a_critic_without_classes_or_convolutions_is_rejected() -> None:
    with pytest.raises(UserError, match="at least one class and two widths"):
        Critic(0)
    with pytest.raises(UserError, match="at least one class and two widths"):
        Critic(3, widths=(8,))


def test_maps_that_differ_in_shape_are_rejected() -> None:
    with pytest.raises(UserError, match="differ in shape"):
        critic_loss(small(), torch.rand(1, 3, 8, 8), torch.rand(1, 3, 9, 8), torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("penalty", [-1.0, float("nan"), float("inf")])
def test_a_negative_or_infinite_penalty_is_rejected(penalty: float) -> None:
    maps = torch.rand(1, 3, 8, 8)
    with pytest.raises(UserError, match=f"penalty must be 0 or above and finite, got {penalty}"):
        critic_loss(small(), maps, maps, maps, penalty=penalty)


@pytest.mark.slow
def test_the_critics_loss_has_the_right_gradient() -> None:
    critic = Critic(2, widths=(1, 1)).double().eval()
    for module in critic.modules():
        if isinstance(module, SelfAttention):
            nn.init.ones_(module.gamma)
    student, teacher = torch.randn(2, 1, 2, 4, 4, dtype=torch.float64).unbind()
    images = torch.randn(1, 3, 4, 4, dtype=torch.float64)

    def loss(*_: Tensor) -> Tensor:  # gradcheck changes the critic's weights in place
        points = torch.Generator().manual_seed(3)
        value: Tensor = critic_loss(critic, student, teacher, images, generator=points)
        return value

    assert torch.autograd.gradcheck(loss, tuple(critic.parameters()))


@pytest.mark.slow
# torch's compiler looks at .grad of what a function outside of it returned.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_critic_loss_is_the_same_within_compiled_code() -> None:
    critic = small().eval()
    student, teacher, images = maps()
    found = []
    for loss in (critic_loss, torch.compile(critic_loss, backend="aot_eager")):
        critic.zero_grad()
        torch.manual_seed(3)
        value = loss(critic, student, teacher, images)
        value.backward()
        found.append([value.detach(), *(p.grad for p in critic.parameters())])
    torch.testing.assert_close(found[0], found[1])
