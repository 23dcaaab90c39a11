"""pair_wise, in both forms."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kd.errors import UserError
from kd.losses import pair_wise


def slow_pair_wise(
    student: Tensor, teacher: Tensor, kernel: int, pool: str, valid: Tensor | None = None
) -> float:
    """The paper's double sum over nodes, with windows that may hang over the edge."""
    if valid is None:
        valid = torch.ones(len(student), *student.shape[2:], dtype=torch.bool)
    total, images = 0.0, 0
    for one_s, one_t, places in zip(student, teacher, valid, strict=True):
        images += bool(places.any())
        nodes = []
        for features in (one_s, one_t):
            _, height, width = features.shape
            columns = []
            for top in range(0, height, kernel):
                for left in range(0, width, kernel):
                    part = (slice(top, top + kernel), slice(left, left + kernel))
                    if not places[part].any():
                        continue
                    window = features[:, *part][:, places[part]]
                    column = window.amax(dim=1) if pool == "max" else window.mean(dim=1)
                    columns.append(column / column.norm())
            nodes.append(columns)
        count = len(nodes[0])
        for i in range(count):
            for j in range(count):
                gap = nodes[0][i] @ nodes[0][j] - nodes[1][i] @ nodes[1][j]
                total += gap.item() ** 2 / count**2
    return total / images


def test_pair_wise_of_two_nodes_by_hand() -> None:
    # Student: orthogonal nodes, affinity 0. Teacher: 45 degrees apart, affinity sqrt(1/2).
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[2.0, 3.0], [0.0, 3.0]]).view(1, 2, 1, 2)
    # Two of the four pairs differ, each by a half when squared: 2 * 0.5 / 4.
    assert pair_wise(student, teacher, kernel=1).item() == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("pool", ["max", "average"])
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("channels", [(2, 3), (40, 24)])
def test_pair_wise_agrees_with_the_double_sum(
    channels: tuple[int, int], kernel: int, pool: str
) -> None:
    student, teacher = (torch.randn(2, c, 5, 7, dtype=torch.float64) for c in channels)
    value = pair_wise(student, teacher, kernel=kernel, pool=pool).item()
    expected = slow_pair_wise(student, teacher, kernel, pool)
    assert value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("pool", ["max", "average"])
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("channels", [(2, 3), (40, 24)])
def test_pair_wise_of_valid_places_agrees_with_the_double_sum(
    channels: tuple[int, int], kernel: int, pool: str
) -> None:
    # All below 0, so that a void place that counted as 0 would be the maximum.
    student, teacher = (-torch.rand(3, c, 5, 7, dtype=torch.float64) for c in channels)
    valid = torch.rand(3, 5, 7) < 0.5
    valid[0, :3, :4] = False  # whole windows
    valid[1] = False
    value = pair_wise(student, teacher, kernel=kernel, pool=pool, valid=valid).item()
    expected = slow_pair_wise(student, teacher, kernel, pool, valid)
    assert expected > 0
    assert value == pytest.approx(expected, rel=1e-9)


def test_pair_wise_of_two_valid_nodes_of_three_by_hand() -> None:
    # The two nodes above, with a void one between them: still two of four pairs.
    student = torch.tensor([[1.0, 5.0, 0.0], [0.0, 6.0, 1.0]]).view(1, 2, 1, 3)
    teacher = torch.tensor([[2.0, -7.0, 3.0], [0.0, 8.0, 3.0]]).view(1, 2, 1, 3)
    valid = torch.tensor([[[True, False, True]]])
    value = pair_wise(student, teacher, kernel=1, valid=valid)
    assert value.item() == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("pool", ["max", "average"])
@pytest.mark.parametrize("side", [3, 12])  # fewer places than channels, and more
def test_gradients_are_those_of_the_definition_with_void_places_too(pool: str, side: int) -> None:
    student, teacher = (torch.randn(2, c, side, side, dtype=torch.float64) for c in (12, 16))
    valid = torch.rand(2, side, side) < 0.5
    valid[0, :2] = False
    leaf = student.clone().requires_grad_()
    value = pair_wise(leaf, teacher, kernel=1, pool=pool, valid=valid)
    (gradient,) = torch.autograd.grad(value, leaf)
    step = 1e-6 * torch.randn_like(student)
    ahead, behind = (
        slow_pair_wise(student + sign * step, teacher, 1, pool, valid) for sign in (1, -1)
    )
    assert (gradient * step).sum().item() == pytest.approx((ahead - behind) / 2, rel=1e-5)


@pytest.mark.parametrize(("channels", "side"), [(8, 16), (64, 4)])
def test_pair_wise_takes_the_form_with_fewer_products(channels: int, side: int) -> None:
    student, teacher = torch.randn(2, 1, channels, side, side).unbind()
    with FlopCounterMode(display=False) as counter:
        pair_wise(student, teacher, kernel=1)
    nodes = side * side
    by_nodes, by_channels = 2 * nodes * nodes * channels, 3 * channels * channels * nodes
    assert counter.get_total_flops() == 2 * min(by_nodes, by_channels)


def test_pair_wise_is_zero_at_equality_and_invariant_to_scale_and_rotation() -> None:
    student, teacher = torch.randn(2, 2, 6, 4, 4).unbind()
    assert pair_wise(teacher, teacher, kernel=1).item() == pytest.approx(0.0, abs=1e-6)
    scale = torch.rand(2, 1, 4, 4) + 0.5
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    turned = torch.einsum("dc,nchw->ndhw", rotation, student * scale)
    torch.testing.assert_close(
        pair_wise(turned, teacher, kernel=1), pair_wise(student, teacher, kernel=1)
    )


def test_pair_wise_has_a_finite_gradient_where_a_node_is_zero() -> None:
    student = torch.zeros(1, 3, 2, 2, requires_grad=True)
    pair_wise(student, torch.randn(1, 3, 2, 2), kernel=1).backward()
    assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("pool", ["max", "average"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channels", [3, 24])  # the form of channels, that of nodes
@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-12, 1e-9, 5e-7])
def test_a_zero_node_has_no_affinity_and_no_gradient(
    length: float, channels: int, masked: bool, pool: str
) -> None:
    student, teacher = torch.randn(2, 1, channels, 4, 4).unbind()
    direction = torch.nn.functional.normalize(torch.rand(channels), dim=0)
    student[0, :, 1, 2] = length * direction
    leaf = student.clone().requires_grad_()
    valid = torch.ones(1, 4, 4, dtype=torch.bool) if masked else None
    value = pair_wise(leaf, teacher, kernel=1, pool=pool, valid=valid)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert not gradient[0, :, 1, 2].any()
    assert 0 < gradient.abs().max() < 1
    student[0, :, 1, 2] = 0.0
    assert value.item() == pair_wise(student, teacher, kernel=1, pool=pool, valid=valid).item()


def test_a_short_node_with_a_direction_counts_fully() -> None:
    student, teacher = torch.randn(2, 1, 3, 4, 4).unbind()
    short = student.clone()
    short[0, :, 1, 2] *= 1e-5
    torch.testing.assert_close(
        pair_wise(short, teacher, kernel=1), pair_wise(student, teacher, kernel=1)
    )


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_nan_node_makes_the_loss_nan(broken: float) -> None:
    student, teacher = torch.randn(2, 1, 3, 4, 4).unbind()
    student[0, 1, 1, 2] = broken
    assert not pair_wise(student, teacher, kernel=1).isfinite()


def test_pair_wise_rejects_bad_input() -> None:
    with pytest.raises(UserError, match=r"differ in batch or grid.*'resize' adapter"):
        pair_wise(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 5, 4))
    with pytest.raises(UserError, match="'max' or 'average', got 'mean'"):
        pair_wise(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), pool="mean")
    with pytest.raises(UserError, match="kernel must be above 0"):
        pair_wise(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), kernel=0)
    with pytest.raises(UserError, match=r"expected features \(N, C, H, W\)"):
        pair_wise(torch.zeros(2, 4), torch.zeros(2, 4))
    for kernel in (1.5, (2, 2, 2), ()):
        with pytest.raises(UserError, match="kernel must be one integer or two integers, got"):
            pair_wise(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), kernel=kernel)  # type: ignore[arg-type]


def test_a_window_larger_than_the_map_leaves_one_node() -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 5).unbind()
    assert pair_wise(student, teacher, kernel=9).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler"
)
@pytest.mark.parametrize("pool", ["max", "average"])
def test_inductor_gradient_of_windows_over_the_edge(pool: str) -> None:
    torch.compiler.reset()
    student, teacher = torch.randn(2, 2, 3, 5, 7).unbind()
    valid = torch.rand(2, 5, 7) < 0.6
    valid[0, :3, :3] = False  # a whole window
    found = []
    for loss in (pair_wise, torch.compile(pair_wise, fullgraph=True)):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, kernel=3, pool=pool, valid=valid)
        found.append([value.detach(), *torch.autograd.grad(value, leaf)])
    torch.testing.assert_close(found[0], found[1])
