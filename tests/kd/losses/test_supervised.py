"""masked_bce, masked_cross_entropy, multilabel_bce and cross_entropy_labelled."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses.supervised import (
    cross_entropy_labelled,
    masked_bce,
    masked_cross_entropy,
    multilabel_bce,
)


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(3, 4, 5, 6, dtype=dtype)
    targets = torch.rand(3, 4, 5, 6) > 0.7
    hidden = torch.zeros(3, 5, 6, dtype=torch.bool)
    hidden[0, 1:3, 2:5] = True
    hidden[1, :, 0] = True
    hidden[2, 4, 5] = True
    return logits, targets, hidden


def slow_masked_bce(
    logits: Tensor, targets: Tensor, hidden: Tensor, valid: Tensor, weight: float
) -> float:
    per_input = []
    count, classes, height, width = logits.shape
    for k in range(count):
        inside: list[float] = []
        outside: list[float] = []
        for y in range(height):
            for x in range(width):
                if not valid[k, y, x]:
                    continue
                for c in range(classes):
                    p = 1 / (1 + math.exp(-logits[k, c, y, x].item()))
                    entropy = -math.log(p if targets[k, c, y, x] else 1 - p)
                    (inside if hidden[k, y, x] else outside).append(entropy)
        mean_in, mean_out = sum(inside) / len(inside), sum(outside) / len(outside)
        per_input.append((weight * mean_in + mean_out) / (weight + 1))
    return sum(per_input) / count


def test_masked_bce_by_hand() -> None:
    # One class, two pixels: hidden with p = 0.5 and target 1, visible with p = 0.8 and target 0.
    logits = torch.tensor([[[[0.0, math.log(4)]]]])
    targets = torch.tensor([[[[True, False]]]])
    hidden = torch.tensor([[[True, False]]])
    expected = (5 * math.log(2) + math.log(5)) / 6
    assert masked_bce(logits, targets, hidden).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.0, 5.0])
def test_masked_bce_agrees_with_a_slow_loop(weight: float) -> None:
    logits, targets, hidden = case()
    valid = torch.rand(3, 5, 6) > 0.2
    valid |= hidden
    value = masked_bce(logits, targets, hidden, valid=valid, hidden_weight=weight).item()
    expected = slow_masked_bce(logits, targets, hidden, valid, weight)
    assert value == pytest.approx(expected, rel=1e-9)


def test_masked_bce_of_a_batch_is_the_mean_of_its_parts() -> None:
    logits, targets, hidden = case()
    parts = [masked_bce(logits[k, None], targets[k, None], hidden[k, None]) for k in range(3)]
    torch.testing.assert_close(masked_bce(logits, targets, hidden), torch.stack(parts).mean())


def test_masked_bce_does_not_depend_on_the_order_of_the_classes() -> None:
    logits, targets, hidden = case()
    order = torch.randperm(4)
    torch.testing.assert_close(
        masked_bce(logits[:, order], targets[:, order], hidden), masked_bce(logits, targets, hidden)
    )


def test_masked_bce_ignores_padding() -> None:
    logits, targets, hidden = case()
    valid = torch.ones(3, 5, 6, dtype=torch.bool)
    valid[:, 3:] = False
    spoiled = logits.clone()
    spoiled[:, :, 3:] = float("nan")
    torch.testing.assert_close(
        masked_bce(spoiled, targets, hidden, valid=valid),
        masked_bce(logits, targets, hidden, valid=valid),
    )


def test_a_region_without_pixels_does_not_count() -> None:
    logits, targets, _ = case()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.double())
    everything = torch.ones(3, 5, 6, dtype=torch.bool)
    torch.testing.assert_close(masked_bce(logits, targets, everything), bce)
    torch.testing.assert_close(masked_bce(logits, targets, ~everything), bce)


def test_masked_bce_of_nothing_is_zero_with_zero_gradient() -> None:
    logits, targets, hidden = case(torch.float32)
    logits.requires_grad_()
    loss = masked_bce(logits, targets, hidden, valid=torch.zeros_like(hidden))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None and not logits.grad.any()
    assert masked_bce(logits[:0], targets[:0], hidden[:0]).item() == 0.0


def test_supervised_losses_reject_bad_input() -> None:
    logits, targets, hidden = case()
    with pytest.raises(UserError, match=r"hidden must be \(3, 5, 6\)"):
        masked_bce(logits, targets, hidden[0])
    with pytest.raises(UserError, match=r"logits \(3, 4, 5, 6\) and targets \(3, 2, 5, 6\) differ"):
        masked_bce(logits, targets[:, :2], hidden)
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match=f"hidden_weight must be 0 or above and.* got {weight}"):
            masked_bce(logits, targets, hidden, hidden_weight=weight)
    with pytest.raises(UserError, match="targets must be bool, got float32"):
        masked_bce(logits, targets.float(), hidden)
    with pytest.raises(UserError, match="hidden must be bool, got uint8"):
        masked_bce(logits, targets, hidden.byte())
    with pytest.raises(UserError, match="got logits on cpu, targets on meta"):
        masked_bce(logits, targets.to("meta"), hidden)
    with pytest.raises(UserError, match=r"got \(3, 4\) and \(2,\)"):
        cross_entropy_labelled(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64))
    rows, labels = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(UserError, match="labels must be int64, got float32"):
        cross_entropy_labelled(rows, labels.float())
    with pytest.raises(UserError, match="got logits on cpu, labels on meta"):
        cross_entropy_labelled(rows, labels.to("meta"))
    with pytest.raises(UserError, match=r"label_smoothing must be in 0\.\.1, got 1.5"):
        cross_entropy_labelled(rows, labels, label_smoothing=1.5)


def test_cross_entropy_labelled_by_hand_ignores_unlabelled_objects() -> None:
    logits = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]).log()
    labels = torch.tensor([1, -1, 0])
    expected = -(math.log(0.75) + math.log(0.9)) / 2
    assert cross_entropy_labelled(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_labelled_is_the_mean_over_the_labelled_alone() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, -1, 4, 2, -1, 3])
    known = labels >= 0
    for smoothing in (0.0, 0.1):
        torch.testing.assert_close(
            cross_entropy_labelled(logits, labels, label_smoothing=smoothing),
            torch.nn.functional.cross_entropy(
                logits[known], labels[known], label_smoothing=smoothing
            ),
        )


@pytest.mark.parametrize("count", [0, 3])
def test_cross_entropy_without_labels_is_zero_with_zero_gradient(count: int) -> None:
    logits = torch.randn(count, 4, requires_grad=True)
    loss = cross_entropy_labelled(logits, torch.full((count,), -1))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None and not logits.grad.any()


def test_cross_entropy_labelled_is_invariant_to_shifts_and_to_the_order_of_objects() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, -1, 4, 2, -1, 3])
    value = cross_entropy_labelled(logits, labels)
    torch.testing.assert_close(cross_entropy_labelled(logits + torch.randn(6, 1), labels), value)
    torch.testing.assert_close(cross_entropy_labelled(logits.flip(0), labels.flip(0)), value)


def test_masked_cross_entropy_by_hand() -> None:
    # Two classes, two pixels: hidden with p(target) = 1/2, visible with p(target) = 4/5.
    logits = torch.tensor([[[[0.0, math.log(4)]], [[0.0, 0.0]]]])
    targets, hidden = torch.tensor([[[1, 0]]]), torch.tensor([[[True, False]]])
    expected = (5 * math.log(2) + math.log(5 / 4)) / 6
    value = masked_cross_entropy(logits, targets, hidden, hidden_weight=5.0)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def slow_masked_cross_entropy(
    logits: Tensor, targets: Tensor, hidden: Tensor, valid: Tensor, weights: Tensor, fraction: float
) -> float:
    per_input = []
    for k in range(len(logits)):
        sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
        for y in range(logits.shape[2]):
            for x in range(logits.shape[3]):
                if valid[k, y, x]:
                    scores = [math.exp(value) for value in logits[k, :, y, x].tolist()]
                    target = int(targets[k, y, x])
                    own = sums[bool(hidden[k, y, x])]
                    own[0] -= weights[target].item() * math.log(scores[target] / sum(scores))
                    own[1] += weights[target].item()
        means = {side: total / mass for side, (total, mass) in sums.items()}
        per_input.append((fraction * means[True] + means[False]) / (fraction + 1))
    return sum(per_input) / len(per_input)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("weighted", [True, False])
def test_masked_cross_entropy_agrees_with_a_slow_loop(fraction: float, weighted: bool) -> None:
    logits, _, hidden = case()
    targets = torch.randint(4, (3, 5, 6))
    valid = (torch.rand(3, 5, 6) > 0.2) | hidden
    weights = torch.rand(4, dtype=torch.float64) + 0.1 if weighted else None
    value = masked_cross_entropy(
        logits, targets, hidden, valid=valid, class_weights=weights, hidden_weight=fraction
    )
    ones = torch.ones(4) if weights is None else weights
    expected = slow_masked_cross_entropy(logits, targets, hidden, valid, ones, fraction)
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_equal_class_weights_change_nothing() -> None:
    logits, _, hidden = case()
    targets = torch.randint(4, (3, 5, 6))
    plain = masked_cross_entropy(logits, targets, hidden)
    same = masked_cross_entropy(logits, targets, hidden, class_weights=torch.full((4,), 3.0))
    torch.testing.assert_close(same, plain)


def test_masked_cross_entropy_ignores_invalid_pixels() -> None:
    logits, _, hidden = case()
    targets = torch.randint(4, (3, 5, 6))
    valid = torch.ones_like(hidden)
    valid[:, 3:] = hidden[:, 3:]
    spoilt = torch.where(valid[:, None], logits, torch.inf).requires_grad_()
    value = masked_cross_entropy(spoilt, targets, hidden, valid=valid)
    torch.testing.assert_close(value, masked_cross_entropy(logits, targets, hidden, valid=valid))
    value.backward()
    assert spoilt.grad is not None and spoilt.grad.isfinite().all()
    empty = masked_cross_entropy(logits[:0], targets[:0], hidden[:0])
    assert empty.item() == 0


def test_multilabel_bce_by_hand() -> None:
    # p = 1/2 and present, p = 4/5 and absent; the second row is not known.
    logits = torch.tensor([[0.0, math.log(4)], [math.inf, 3.0]], requires_grad=True)
    targets = torch.tensor([[True, False], [False, False]])
    known = torch.tensor([True, False])
    value = multilabel_bce(logits, targets, known=known)
    assert value.item() == pytest.approx((math.log(2) + math.log(5)) / 2)
    value.backward()
    assert logits.grad is not None
    assert logits.grad[1].tolist() == [0.0, 0.0]
    # One sigmoid: the gradient is p - y, over the two numbers of the mean.
    assert logits.grad[0].tolist() == pytest.approx([-0.25, 0.4])
    weighted = multilabel_bce(logits, targets, known=known, pos_weight=torch.tensor([3.0, 9.0]))
    assert weighted.item() == pytest.approx((3 * math.log(2) + math.log(5)) / 2)


def test_multilabel_bce_of_nothing_is_zero() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    value = multilabel_bce(
        logits, torch.zeros(2, 3, dtype=torch.bool), known=torch.zeros(2, dtype=torch.bool)
    )
    value.backward()
    assert value.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_pixel_and_scene_losses_reject_mismatched_input() -> None:
    logits, _, hidden = case()
    ids = torch.zeros(3, 5, 6, dtype=torch.int64)
    with pytest.raises(UserError, match="targets must be int64"):
        masked_cross_entropy(logits, ids.int(), hidden)
    with pytest.raises(UserError, match="expected 4 class_weights, got 3"):
        masked_cross_entropy(logits, ids, hidden, class_weights=torch.ones(3))
    with pytest.raises(UserError, match="hidden_weight must be 0 or above"):
        masked_cross_entropy(logits, ids, hidden, hidden_weight=-1.0)
    rows = torch.zeros(2, 3)
    with pytest.raises(UserError, match="targets must be bool"):
        multilabel_bce(rows, rows)
    with pytest.raises(UserError, match="expected 3 values of pos_weight, got 2"):
        multilabel_bce(rows, rows > 0, pos_weight=torch.ones(2))
    with pytest.raises(UserError, match=r"known must be bool \(2,\), got \(3,\)"):
        multilabel_bce(rows, rows > 0, known=torch.ones(3, dtype=torch.bool))
