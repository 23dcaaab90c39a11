"""CenterNet's losses: by hand, against slow loops, gradients, and batches without objects."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd.losses.centernet import CenterTargets, center_targets, centernet_losses

GRID, CLASSES, IMAGES = (5, 6), 3, 2


def some_targets(*, ignored: bool = False) -> CenterTargets:
    boxes = torch.tensor(
        [[0.0, 0.0, 20.0, 18.0], [1.0, 3.0, 8.0, 9.0], [6.0, 6.0, 20.0, 14.0], [4.0, 4.0, 4.0, 9.0]]
    )
    flags = torch.tensor([False, False, True, False]) if ignored else None
    return center_targets(
        boxes, torch.tensor([0, 0, 2, 1]), torch.tensor([0, 0, 1, 1]), IMAGES, CLASSES, GRID, 4,
        ignored=flags,
    )  # fmt: skip


def some_maps(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"heatmap": CLASSES, "size": 2, "offset": 2}
    return {name: torch.randn(IMAGES, c, *GRID, dtype=dtype) for name, c in shapes.items()}


def slow_focal(logits: Tensor, targets: CenterTargets) -> float:
    total, peaks = 0.0, 0
    for place in torch.ones_like(logits).nonzero().tolist():
        x, y = float(logits[tuple(place)]), float(targets.heatmap[tuple(place)])
        p = 1 / (1 + math.exp(-x))
        if y == 1:
            peaks += 1
            total -= (1 - p) ** 2 * math.log(p)
        elif targets.loss_mask is None or bool(targets.loss_mask[tuple(place)]):
            total -= (1 - y) ** 4 * p**2 * math.log(1 - p)
    return total / max(peaks, 1)


def slow_distance(maps: Tensor, truth: Tensor, targets: CenterTargets) -> float:
    gaps: list[float] = []
    for row in targets.valid.nonzero()[:, 0].tolist():
        y, x = divmod(int(targets.cell[row]), GRID[1])
        found = maps[int(targets.image_of[row]), :, y, x]
        gaps += (found - truth[row]).abs().tolist()
    return sum(gaps) / len(gaps)


def test_the_losses_of_one_object_by_hand() -> None:
    # A box of 8 x 4 pixels around (6, 6): cell (1, 1), 2 x 1 cells, offset (.5, .5), radius 0.
    targets = center_targets(
        torch.tensor([[2.0, 4.0, 10.0, 8.0]]), torch.tensor([0]), torch.tensor([0]), 1, 1, (2, 2), 4
    )
    channels = {"heatmap": 1, "size": 2, "offset": 2}
    maps = {name: torch.zeros(1, count, 2, 2) for name, count in channels.items()}
    found = {name: value.item() for name, value in centernet_losses(maps, targets).items()}
    # p = 1/2 in all four cells: each costs 1/4 log 2, and there is one peak.
    assert found["heatmap"] == pytest.approx(math.log(2))
    assert found["size"] == pytest.approx((2 + 1) / 2)
    assert found["offset"] == pytest.approx(0.5)


@pytest.mark.parametrize("ignored", [False, True])
def test_the_losses_are_those_of_slow_loops(ignored: bool) -> None:
    maps, targets = some_maps(), some_targets(ignored=ignored)
    found = centernet_losses(maps, targets)
    assert int((targets.heatmap == 1).sum()) == (2 if ignored else 3)
    assert found["heatmap"].item() == pytest.approx(slow_focal(maps["heatmap"], targets), rel=1e-5)
    for name, truth in (("size", targets.size), ("offset", targets.offset)):
        slow = slow_distance(maps[name], truth, targets)
        assert found[name].item() == pytest.approx(slow, rel=1e-5)


def test_gradients_are_the_numerical_ones() -> None:
    targets = some_targets(ignored=True)
    names = ("heatmap", "size", "offset")

    def losses(*maps: Tensor) -> tuple[Tensor, ...]:
        return tuple(centernet_losses(dict(zip(names, maps, strict=True)), targets).values())

    maps = [one.requires_grad_() for one in some_maps(torch.float64).values()]
    assert torch.autograd.gradcheck(losses, maps)


def test_without_objects_all_is_background_and_size_losses_are_zero() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    targets = center_targets(torch.zeros(0, 4), none, none, IMAGES, CLASSES, GRID, 4)
    maps = {name: one.requires_grad_() for name, one in some_maps().items()}
    found = centernet_losses(maps, targets)
    slow = slow_focal(maps["heatmap"].detach(), targets)
    assert found["heatmap"].item() == pytest.approx(slow, rel=1e-5)
    assert found["size"].item() == found["offset"].item() == 0.0
    torch.stack(list(found.values())).sum().backward()
    for name, one in maps.items():
        assert one.grad is not None and one.grad.isfinite().all()
        assert bool(one.grad.any()) == (name == "heatmap")


def test_an_empty_batch_has_zero_loss() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    targets = center_targets(torch.zeros(0, 4), none, none, 0, CLASSES, GRID, 4)
    found = centernet_losses({name: one[:0] for name, one in some_maps().items()}, targets)
    assert [value.item() for value in found.values()] == [0.0, 0.0, 0.0]


def test_excluded_places_may_be_nan() -> None:
    targets = some_targets(ignored=True)
    assert targets.loss_mask is not None
    maps = some_maps()
    expected = centernet_losses(maps, targets)
    at_objects = torch.zeros(IMAGES, 1, *GRID, dtype=torch.bool)
    for row in targets.valid.nonzero()[:, 0].tolist():
        at_objects[targets.image_of[row]].view(-1)[targets.cell[row]] = True
    spoiled = {
        "heatmap": maps["heatmap"].masked_fill(~targets.loss_mask, math.nan).requires_grad_(),
        "size": maps["size"].masked_fill(~at_objects, math.nan).requires_grad_(),
        "offset": maps["offset"].masked_fill(~at_objects, math.nan).requires_grad_(),
    }
    found = centernet_losses(spoiled, targets)
    torch.testing.assert_close(found, expected)
    torch.stack(list(found.values())).sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in spoiled.values())


def test_extreme_logits_have_finite_loss() -> None:
    targets = some_targets()
    sure = torch.where(targets.heatmap == 1, 200.0, -200.0)
    right = centernet_losses({**some_maps(), "heatmap": sure}, targets)["heatmap"]
    wrong = centernet_losses({**some_maps(), "heatmap": -sure}, targets)["heatmap"]
    assert right.item() == 0.0 and 200 < wrong.item() < 200 * targets.heatmap.numel()


def test_half_precision_is_summed_in_float32() -> None:
    maps, targets = some_maps(), some_targets()
    low = {name: one.bfloat16() for name, one in maps.items()}
    found = centernet_losses(low, targets)
    exact = centernet_losses({name: one.float() for name, one in low.items()}, targets)
    torch.testing.assert_close(found, exact)
    assert all(value.dtype == torch.float32 for value in found.values())


@pytest.mark.slow
def test_compiled_targets_and_losses_are_the_same() -> None:
    boxes = torch.tensor([[0.0, 0.0, 20.0, 18.0], [6.0, 6.0, 20.0, 14.0]])
    labels, image_of = torch.tensor([0, 2]), torch.tensor([0, 1])
    ignored = torch.tensor([False, True])

    def losses(*maps: Tensor) -> list[Tensor]:
        targets = center_targets(boxes, labels, image_of, IMAGES, CLASSES, GRID, 4, ignored=ignored)
        names = ("heatmap", "size", "offset")
        return list(centernet_losses(dict(zip(names, maps, strict=True)), targets).values())

    maps = list(some_maps().values())
    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*maps), losses(*maps))
