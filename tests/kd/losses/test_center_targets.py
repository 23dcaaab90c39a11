"""CenterNet's targets: radii by hand and by search, maps against a slow loop, invalid boxes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd.losses import centernet as module
from kd.losses.centernet import CenterTargets, center_targets, gaussian_radius

GRID, STRIDE, CLASSES, IMAGES = (12, 16), 4, 3, 4


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def made(
    boxes: Tensor, labels: Tensor, image_of: Tensor, ignored: Tensor | None = None
) -> CenterTargets:
    return center_targets(boxes, labels, image_of, IMAGES, CLASSES, GRID, STRIDE, ignored=ignored)


def one(box: list[float], label: int = 0, ignored: bool | None = None) -> CenterTargets:
    flag = None if ignored is None else torch.tensor([ignored])
    return made(torch.tensor([box]), ints(label), ints(0), flag)


def peaks_of(targets: CenterTargets) -> int:
    return int((targets.heatmap == 1).sum())


def random_objects(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of all sizes, some with their middles outside; the last image has none."""
    first = torch.rand(count, 2) * torch.tensor([64.0, 48.0]) * 1.2 - 6
    boxes = torch.cat([first, first + torch.rand(count, 2) ** 2 * 60 + 0.1], dim=1)
    labels = torch.randint(CLASSES, (count,))
    return boxes, labels, torch.randint(IMAGES - 1, (count,)).sort().values


def slow_radius(width: float, height: float) -> float:
    """The least of the smaller roots of the three quadratics, for an IoU of 0.7."""
    quadratics = (
        (1.0, -(width + height), width * height * 0.3 / 1.7),
        (4.0, -2 * (width + height), width * height * 0.3),
        (2.8, 1.4 * (width + height), -0.3 * width * height),
    )
    found = []
    for number, (a, b, c) in enumerate(quadratics):
        spread = math.sqrt(b * b - 4 * a * c)
        found.append((-b + (spread if number == 2 else -spread)) / (2 * a))
    return min(found)


def slow_targets(
    boxes: Tensor, labels: Tensor, image_of: Tensor
) -> tuple[Tensor, list[tuple[float, ...]]]:
    """The heat map and (object, cell, width, height, x, y) of each that has a peak."""
    heatmap = torch.zeros(IMAGES, CLASSES, *GRID)
    peaks: list[tuple[float, ...]] = []
    for row, (box, label, image) in enumerate(
        zip(boxes.tolist(), labels.tolist(), image_of.tolist(), strict=True)
    ):
        x, y = (box[0] + box[2]) / 2 / STRIDE, (box[1] + box[3]) / 2 / STRIDE
        width, height = (box[2] - box[0]) / STRIDE, (box[3] - box[1]) / STRIDE
        if not (0 <= x < GRID[1] and 0 <= y < GRID[0]):
            continue
        column, line = int(x), int(y)
        radius = int(slow_radius(math.ceil(width), math.ceil(height)))
        deviation = (2 * radius + 1) / 6
        for v in range(GRID[0]):
            for u in range(GRID[1]):
                if abs(u - column) <= radius and abs(v - line) <= radius:
                    distance = (u - column) ** 2 + (v - line) ** 2
                    value = math.exp(-distance / (2 * deviation**2))
                    old = float(heatmap[image, label, v, u])
                    heatmap[image, label, v, u] = max(old, value)
        peaks.append((row, line * GRID[1] + column, width, height, x - column, y - line))
    return heatmap, peaks


def test_the_radius_of_a_square_of_ten_is_the_one_worked_by_hand() -> None:
    side = torch.tensor([10.0])
    # Inside: (10 - 2r)^2 = 70, r = (10 - 8.3666) / 2.
    assert gaussian_radius(side, side).item() == pytest.approx(0.8167, abs=1e-4)


def test_radii_are_those_of_the_quadratics() -> None:
    sides = torch.rand(2, 20, dtype=torch.float64) * 50
    found = gaussian_radius(sides[0], sides[1])
    slow = [slow_radius(w, h) for w, h in sides.T.tolist()]
    torch.testing.assert_close(found, torch.tensor(slow, dtype=torch.float64))


def test_corners_that_move_by_the_radius_keep_the_overlap_and_one_case_just_does() -> None:
    width, height = 30.0, 12.0
    r = gaussian_radius(torch.tensor([width]), torch.tensor([height])).item()
    area, shared = width * height, (width - r) * (height - r)
    cases = [
        shared / (2 * area - shared),
        (width - 2 * r) * (height - 2 * r) / area,
        area / ((width + 2 * r) * (height + 2 * r)),
    ]
    assert min(cases) == pytest.approx(module.OVERLAP, abs=1e-6)


def test_an_object_by_hand() -> None:
    # 52 x 48 pixels around (30, 25): 13 x 12 cells, radius 1.01, middle in cell (7, 6).
    targets = one([4.0, 1.0, 56.0, 49.0], label=2)
    assert targets.valid.tolist() == [True] and peaks_of(targets) == 1
    assert targets.cell.tolist() == [6 * 16 + 7]
    assert targets.size.tolist() == [[13.0, 12.0]] and targets.offset.tolist() == [[0.5, 0.25]]
    side = math.exp(-1 / (2 * 0.5**2))
    expected = torch.zeros(IMAGES, CLASSES, *GRID)
    expected[0, 2, 5:8, 6:9] = torch.tensor(
        [[side**2, side, side**2], [side, 1.0, side], [side**2, side, side**2]]
    )
    torch.testing.assert_close(targets.heatmap, expected)
    assert targets.loss_mask is None


@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_targets_are_those_of_a_slow_loop(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    objects = random_objects(30)
    heatmap, peaks = slow_targets(*objects)
    targets = made(*objects)
    torch.testing.assert_close(targets.heatmap, heatmap)
    rows = [int(peak[0]) for peak in peaks]
    assert targets.valid.nonzero()[:, 0].tolist() == rows and len(rows) < 30
    assert targets.cell[rows].tolist() == [int(peak[1]) for peak in peaks]
    numbers = torch.tensor([peak[2:] for peak in peaks])
    found = torch.cat([targets.size, targets.offset], dim=1)
    torch.testing.assert_close(found[rows], numbers)
    assert not found[~targets.valid].any()
    assert not targets.heatmap[-1].any()


def test_overlapping_gaussians_take_the_maximum_and_share_a_peak() -> None:
    boxes = torch.tensor([[0.0, 0.0, 64.0, 48.0], [8.0, 0.0, 64.0, 48.0], [0.0, 0.0, 66.0, 48.0]])
    targets = made(boxes, ints(0, 0, 0), ints(0, 0, 0))
    alone = [made(boxes[n : n + 1], ints(0), ints(0)).heatmap for n in range(3)]
    torch.testing.assert_close(targets.heatmap, torch.stack(alone).amax(dim=0))
    assert targets.cell[0] == targets.cell[2] != targets.cell[1]
    assert peaks_of(targets) == 2


def test_an_ignored_region_has_no_peak_and_no_loss() -> None:
    boxes = torch.tensor([[4.0, 4.0, 20.0, 12.0], [8.0, 4.0, 14.0, 10.0]])
    targets = made(boxes, ints(1, 1), ints(2, 2), torch.tensor([True, False]))
    assert targets.valid.tolist() == [False, True] and peaks_of(targets) == 1
    expected = torch.ones(IMAGES, CLASSES, *GRID, dtype=torch.bool)
    expected[2, 1, 1:3, 1:5] = False
    expected[2, 1, 1, 2] = True  # the other object's peak
    assert targets.loss_mask is not None and torch.equal(targets.loss_mask, expected)


def test_a_region_covers_cells_whose_centres_it_contains() -> None:
    targets = one([2.0, 2.1, 6.0, 9.0], ignored=True)
    assert targets.loss_mask is not None
    # Middles at 2, 6, 10 pixels: across the first only (6 is the far edge), down the second.
    assert (~targets.loss_mask).nonzero().tolist() == [[0, 0, 1, 0]]


def test_an_ignored_region_of_unknown_class_excludes_all_classes() -> None:
    targets = one([0.0, 0.0, 8.0, 4.0], label=-1, ignored=True)
    assert targets.loss_mask is not None
    left_out = (~targets.loss_mask).nonzero().tolist()
    assert left_out == [[0, c, 0, x] for c in range(CLASSES) for x in range(2)]


@pytest.mark.parametrize(
    "box",
    [
        [10.0, 10.0, 10.0, 20.0],  # no width
        [10.0, 10.0, 10.0, 10.0],  # no area at all
        [60.0, 10.0, 70.0, 20.0],  # its middle is right of the grid
        [-9.0, 10.0, 4.0, 20.0],
        [10.0, 44.0, 20.0, 52.0],
    ],
)
def test_objects_without_area_or_off_the_grid_are_left_out(box: list[float]) -> None:
    targets = one(box)
    assert not targets.valid.any() and not targets.heatmap.any() and peaks_of(targets) == 0
    assert not targets.size.any() and not targets.offset.any()


def test_no_object_gives_empty_maps() -> None:
    none = made(torch.zeros(0, 4), ints(), ints(), torch.zeros(0, dtype=torch.bool))
    assert none.heatmap.shape == (IMAGES, CLASSES, *GRID) and not none.heatmap.any()
    assert none.loss_mask is not None and none.loss_mask.all()
    assert none.size.shape == none.offset.shape == (0, 2) and none.cell.shape == (0,)
