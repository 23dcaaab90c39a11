"""Requirements on every loss: gradients, low precision, compilation and error messages.

A case is a loss with what it needs besides student and teacher, built from the student's shape.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses import (
    channel_wise,
    cross_entropy_labelled,
    decoupled,
    hint,
    imitation,
    kl_logits,
    masked_bce,
    pair_wise,
    pixel_wise,
    saliency_kld,
    saliency_maps,
)
from kd.losses.holistic import Critic, critic_loss, holistic

Loss = Callable[[Tensor, Tensor], Tensor]
ROWS, MAPS, SALIENCY = (5, 4), (2, 3, 4, 4), (2, 1, 4, 4)
BAD = (math.nan, math.inf, -math.inf)


@dataclass(frozen=True)
class Case:
    """A loss as a function of student and teacher."""

    name: str
    loss: Loss
    shape: tuple[int, ...]  # of the student, and of the teacher unless that is given
    teacher: tuple[int, ...] | None = ()  # None where the loss has none
    learns: bool = True  # whether the student has a gradient
    single: tuple[int, ...] | None = None  # nothing to compare: one class, one place or one node
    excluded: Callable[[Tensor], Tensor] | None = None  # what takes no part, bool of that shape
    bfloat16: float = 1e-4  # relative error allowed, of the same numbers in float64

    def sides(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """A student, and a teacher where there is one."""
        shapes = [self.shape] if self.teacher is None else [self.shape, self.teacher or self.shape]
        return [torch.randn(shape).to(dtype) for shape in shapes]

    def __call__(self, student: Tensor, teacher: Tensor | None = None) -> Tensor:
        """The loss; what has no teacher is given the student, which it does not look at."""
        return self.loss(student, student if teacher is None else teacher)


def labels(rows: Tensor) -> Tensor:
    """0, -1, 2, 3, 0, ...: the second row's is unlabelled."""
    own = torch.arange(len(rows), device=rows.device) % 4
    return torch.where(own == 1, -1, own)


def places(maps: Tensor) -> Tensor:
    """Every place but each third."""
    count, _, height, width = maps.shape
    numbers = torch.arange(count * height * width, device=maps.device)
    return (numbers % 3 > 0).view(count, height, width)


def unlabelled(rows: Tensor) -> Tensor:
    return (labels(rows) < 0)[:, None].expand_as(rows)


def outside(maps: Tensor) -> Tensor:
    return ~places(maps)[:, None].expand_as(maps)


def images(maps: Tensor) -> Tensor:
    return torch.linspace(-1, 1, 192).view(1, 3, 8, 8).expand(len(maps), 3, 8, 8)


def critic() -> Critic:
    """A small one in evaluation mode, whose attention attends."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = Critic(3, widths=(4, 4))
    for name, parameter in built.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.ones_(parameter)
    return built.eval().requires_grad_(False)


CRITIC, DOUBLE_CRITIC = critic(), critic().double()


def holistic_case(student: Tensor, _: Tensor) -> Tensor:
    double = student.dtype == torch.float64
    return holistic(student, images(student), DOUBLE_CRITIC if double else CRITIC)


def critic_case(student: Tensor, teacher: Tensor) -> Tensor:
    point = torch.Generator().manual_seed(0)
    loss: Tensor = critic_loss(CRITIC, student, teacher, images(student), generator=point)
    return loss


def bce_case(logits: Tensor, _: Tensor) -> Tensor:
    valid = places(logits)
    return masked_bce(logits, logits.detach() > 0, valid.roll(1, dims=-1), valid=valid)


def kld_case(logits: Tensor, published: bool) -> Tensor:
    density = torch.arange(logits.numel(), device=logits.device).view_as(logits) % 5
    return saliency_kld(logits, density.to(logits.dtype), places(logits), published=published)


CASES = [
    Case("kl_logits", kl_logits, ROWS, single=(5, 1)),
    Case(
        "decoupled",
        lambda s, t: decoupled(s, t, labels(s), temperature=3.0),
        ROWS,
        single=(5, 1),
        excluded=unlabelled,
    ),
    Case("pixel_wise", functools.partial(pixel_wise, temperature=3.0), MAPS, single=(2, 1, 3, 3)),
    Case(
        "pixel_wise, valid", lambda s, t: pixel_wise(s, t, valid=places(s)), MAPS, excluded=outside
    ),
    Case("pair_wise, by channels", functools.partial(pair_wise, kernel=1), MAPS, (2, 2, 4, 4)),
    Case("pair_wise, by nodes", functools.partial(pair_wise, kernel=1), (2, 9, 2, 2), (2, 8, 2, 2)),
    Case("pair_wise, maxima", pair_wise, MAPS, single=(2, 3, 2, 2)),
    Case("pair_wise, averages", functools.partial(pair_wise, pool="average", kernel=(1, 3)), MAPS),
    Case("channel_wise", channel_wise, MAPS, single=(2, 3, 1, 1)),
    Case("saliency_maps", saliency_maps, SALIENCY, single=(2, 1, 1, 1)),
    Case(
        "saliency_maps, valid",
        lambda s, t: saliency_maps(s, t, places(s), temperature=3.0),
        SALIENCY,
        excluded=outside,
    ),
    Case(
        "saliency_maps, published",
        lambda s, t: saliency_maps(s, t, places(s), published=True),
        SALIENCY,
        excluded=outside,
    ),
    Case("saliency_kld", lambda s, _: kld_case(s, False), SALIENCY, None, excluded=outside),
    Case(
        "published saliency_kld", lambda s, _: kld_case(s, True), SALIENCY, None, excluded=outside
    ),
    Case("hint", hint, MAPS),
    Case("imitation", lambda s, t: imitation(s, t, places(s)), MAPS, excluded=outside),
    Case(
        "imitation, weights",
        lambda s, t: imitation(s, t, places(s).float() * 0.7),
        MAPS,
        excluded=outside,
    ),
    Case("holistic", holistic_case, MAPS, None),
    Case("critic_loss", critic_case, MAPS, learns=False),
    Case(
        "cross_entropy_labelled",
        lambda s, _: cross_entropy_labelled(s, labels(s), label_smoothing=0.1),
        ROWS,
        None,
        excluded=unlabelled,
    ),
    # Its logarithms are those of half precision: a wide copy would be the largest map there is.
    Case("masked_bce", bce_case, MAPS, None, excluded=outside, bfloat16=0.02),
]
LABELLED = (  # which call the student logits
    "cross_entropy_labelled", "masked_bce", "saliency_kld", "published saliency_kld"
)  # fmt: skip
LEARNING = [case for case in CASES if case.learns]
SIDES = [(case, side) for case in CASES for side in range(1 if case.teacher is None else 2)]


def named(value: object) -> str | None:
    return value.name if isinstance(value, Case) else None


def with_gradients(loss: Callable[..., Tensor], sides: list[Tensor]) -> list[Tensor | None]:
    """The value, then the gradient of each side."""
    leaves = [side.clone().requires_grad_() for side in sides]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was compiled before does not count against the limit of recompilations."""
    torch.compiler.reset()
    yield


@pytest.mark.parametrize("case", LEARNING, ids=named)
def test_gradients_of_both_sides_are_the_numerical_ones(case: Case) -> None:
    sides = [side.requires_grad_() for side in case.sides(torch.float64)]
    assert torch.autograd.gradcheck(case, sides)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_bfloat16_error_comes_from_rounding_the_inputs_only(case: Case) -> None:
    sides = case.sides()
    low = [side.bfloat16() for side in sides]
    # What rounding did to the inputs is not the loss's fault: the same numbers, held exactly.
    exact = case(*(side.double() for side in low)).item()
    value = case(*low)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact, rel=case.bfloat16)
    assert value.item() == pytest.approx(case(*sides).item(), rel=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert case(*low).item() == pytest.approx(exact, rel=case.bfloat16)
        assert case(*sides).item() == pytest.approx(case(*sides).item(), rel=1e-6)


@pytest.mark.parametrize("case", LEARNING, ids=named)
def test_bfloat16_gradients_are_close_to_float32(case: Case) -> None:
    low = case.sides(torch.bfloat16)
    exact = with_gradients(case, [side.double() for side in low])[1:]
    for ours, theirs in zip(with_gradients(case, low)[1:], exact, strict=True):
        assert ours is not None and theirs is not None and ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.slow
@pytest.mark.parametrize("case", LEARNING, ids=named)
def test_compiled_loss_has_the_same_value_and_gradients(case: Case) -> None:
    # Without code generation, which takes seconds a loss: the graphs are those it would be for.
    compiled = torch.compile(case.loss, backend="aot_eager", fullgraph=True)
    sides = case.sides() if case.teacher is not None else case.sides() * 2
    torch.testing.assert_close(with_gradients(compiled, sides), with_gradients(case.loss, sides))


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler"
)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("pixel_wise, valid", "imitation")], ids=named
)
def test_inductor_code_has_the_same_value_and_gradients(case: Case) -> None:
    sides = case.sides()
    compiled = torch.compile(case.loss, fullgraph=True)
    torch.testing.assert_close(with_gradients(compiled, sides), with_gradients(case.loss, sides))


@pytest.mark.parametrize("case", [c for c in CASES if c.excluded], ids=named)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_excluded_elements_may_be_nan(case: Case, compiled: bool) -> None:
    assert case.excluded is not None
    sides = case.sides()
    spoiled = [side.masked_fill(case.excluded(side), math.nan) for side in sides]
    loss = torch.compile(case, backend="aot_eager") if compiled else case
    found = with_gradients(loss, spoiled)
    torch.testing.assert_close(found, with_gradients(case, sides))
    for gradient, side in zip(found[1:], sides, strict=True):
        assert gradient is not None and not gradient[case.excluded(side)].any()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("case", "side"), SIDES, ids=named)
def test_what_is_not_finite_makes_the_loss_not_finite(case: Case, side: int, bad: float) -> None:
    if case.name in LABELLED and bad == -math.inf:
        bad = math.inf  # -inf is a probability of 0, with which a label may agree
    sides = case.sides()
    kept = torch.ones_like(sides[side], dtype=torch.bool)
    if case.excluded is not None:
        kept = ~case.excluded(sides[side])
    for place in kept.nonzero()[:: max(1, int(kept.sum()) // 7)]:
        spoiled = [one.clone() for one in sides]
        spoiled[side][tuple(place)] = bad
        assert not case(*spoiled).isfinite(), place


@pytest.mark.parametrize("case", CASES, ids=named)
def test_empty_input_has_zero_loss(case: Case) -> None:
    empty = [side[:0] for side in case.sides()]
    assert case(*empty).item() == 0.0
    if case.learns:
        assert all(gradient is not None for gradient in with_gradients(case, empty))


@pytest.mark.parametrize("case", [c for c in CASES if c.single], ids=named)
def test_one_class_place_or_node_has_zero_loss(case: Case) -> None:
    assert case.single is not None
    value, *gradients = with_gradients(case, [torch.randn(case.single) for _ in range(2)])
    assert value is not None and value.item() == pytest.approx(0.0, abs=1e-6)
    for gradient in gradients:
        assert gradient is not None and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("case", [c for c in CASES if c.teacher is not None], ids=named)
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float16, torch.float64])
def test_mixed_dtypes_are_compared_in_the_wider_one(case: Case, other: torch.dtype) -> None:
    student, teacher = case.sides(torch.bfloat16)  # numbers that every type holds exactly
    wide = torch.promote_types(other, torch.float32)
    expected = case(student.to(wide), teacher.to(wide))
    for types in ((torch.float32, other), (other, torch.float32)):
        value = case(student.to(types[0]), teacher.to(types[1]))
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("case", "side"), SIDES, ids=named)
def test_integer_tensors_are_rejected(case: Case, side: int) -> None:
    sides = case.sides()
    sides[side] = sides[side].long()
    name = ("student", "teacher")[side] if case.name not in LABELLED else "logits"
    with pytest.raises(UserError, match=rf"\w+: {name} must be floating point, got int64"):
        case(*sides)


@pytest.mark.parametrize("case", [c for c in CASES if c.teacher is not None], ids=named)
def test_tensors_on_two_devices_are_rejected(case: Case) -> None:
    student, teacher = case.sides()
    with pytest.raises(UserError, match="expected one device, got student on cpu, teacher on meta"):
        case(student, teacher.to("meta"))
