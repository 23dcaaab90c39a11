"""Objects by image, the place that is responsible for a box, and detections in one tensor."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd.nn.detectors.contract import Level, logits_at, order_by_image, padded, targets_of
from kd.nn.detectors.one_stage import FCOS, RetinaNet


def test_objects_go_to_their_images_and_their_rows_come_back() -> None:
    boxes = torch.arange(20.0).view(5, 4)
    labels, image_of = torch.tensor([4, 3, 2, 1, 0]), torch.tensor([2, 0, 2, 0, 0])
    targets = targets_of(boxes, labels, image_of, 4, first=1)
    assert [one["labels"].tolist() for one in targets] == [[4, 2, 1], [], [5, 3], []]
    assert targets[1]["boxes"].shape == (0, 4) and targets[1]["labels"].dtype == torch.int64
    order, counts = order_by_image(image_of, 4)
    assert counts == [3, 0, 2, 0]
    back = torch.cat([one["boxes"] for one in targets])[order.argsort()]
    torch.testing.assert_close(back, boxes)


def test_no_object_at_all_gives_empty_targets() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    targets = targets_of(torch.zeros(0, 4), none, none, 2)
    assert [one["boxes"].shape for one in targets] == [(0, 4), (0, 4)]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.integers(0, 1),
    st.floats(0, 63.5),
    st.floats(0, 47.5),
    st.integers(0, 2),
    st.sampled_from([0.0, 0.5]),
)
def test_the_responsible_place_is_the_one_with_the_nearest_anchors(
    image: int, x: float, y: float, chosen: int, offset: float
) -> None:
    levels = [Level(stride, ((9.0, 9.0), (4.0, 6.0)), offset) for stride in (4, 8, 16)]
    maps = [torch.randn(2, 2 * 3, 48 // one.stride, 64 // one.stride) for one in levels]
    boxes = torch.tensor([[x - 3, y - 2, x + 3, y + 2]])
    found = logits_at(maps, levels, torch.tensor([chosen]), boxes, torch.tensor([image]), 3)
    stride, logits = levels[chosen].stride, maps[chosen][image]
    # A slow search over all places for the nearest middle.
    gaps = {
        (row, column): max(abs((column + offset) * stride - x), abs((row + offset) * stride - y))
        for row in range(logits.shape[1])
        for column in range(logits.shape[2])
    }
    least = min(gaps.values())
    nearest = [
        logits[:, row, column].view(2, 3).mean(dim=0)
        for (row, column), gap in gaps.items()
        if gap <= least + 1e-4
    ]
    assert any(torch.allclose(found[0], one) for one in nearest)


def test_a_box_beside_the_image_belongs_to_the_nearest_place_in_it() -> None:
    level, logits = Level(8), torch.arange(6.0).view(1, 1, 2, 3)
    boxes = torch.tensor([[-30.0, -30.0, -20.0, -20.0], [90.0, 90.0, 99.0, 99.0]])
    found = logits_at([logits], [level], torch.zeros(2).long(), boxes, torch.zeros(2).long(), 1)
    assert found.tolist() == [[0.0], [5.0]]


def squares(*sides: float) -> Tensor:
    return torch.tensor([[10.0, 10.0, 10.0 + side, 10.0 + side] for side in sides])


def test_retinanet_s_level_is_the_one_with_anchors_of_the_nearest_size() -> None:
    boxes = squares(1.0, 32.0, 45.0, 46.0, 64.0, 128.0, 1000.0)
    # Between 32 and 64 the geometric mean is 45.25.
    assert RetinaNet.level_of(boxes, (32.0, 64.0, 128.0)).tolist() == [0, 0, 0, 1, 1, 2, 2]
    wide = torch.tensor([[0.0, 0.0, 128.0, 32.0]])
    assert RetinaNet.level_of(wide, (32.0, 64.0, 128.0)).tolist() == [1]


def test_fcos_s_level_is_the_one_whose_range_holds_the_reach() -> None:
    # From the middle to the side: half of it; level of stride 8 up to 64, of stride 16 up to 128.
    boxes = squares(4.0, 127.0, 128.0, 255.0, 256.0, 900.0)
    assert FCOS.level_of(boxes, (8, 16, 32)).tolist() == [0, 0, 1, 1, 2, 2]
    assert FCOS.level_of(boxes, (16,)).tolist() == [0] * 6


def test_detections_are_padded_and_cut() -> None:
    some = {
        "boxes": squares(1.0, 2.0, 3.0).requires_grad_(),
        "scores": torch.tensor([0.9, 0.5, 0.1]),
        "labels": torch.tensor([2, 1, 3]),
    }
    none = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()}
    found = padded([some, none], 2, first=1)
    assert found.shape == (2, 2, 6) and not found.requires_grad
    assert found[0, 1].tolist() == [10.0, 10.0, 12.0, 12.0, 0.5, 0.0]
    assert not found[1].any()
    assert padded([some, none], 5)[0, 3:].tolist() == [[0.0] * 6] * 2


def test_no_box_has_no_level() -> None:
    assert RetinaNet.level_of(torch.zeros(0, 4), (8.0, 16.0)).tolist() == []
    assert FCOS.level_of(torch.zeros(0, 4), (8, 16)).tolist() == []
