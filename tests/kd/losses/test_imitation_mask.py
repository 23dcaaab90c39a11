"""The imitation mask: places whose anchors overlap an object nearly as well as the best does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from kd.errors import UserError
from kd.losses import anchor_grid, imitation_mask


def grid(
    height: int,
    width: int,
    *,
    stride: float = 16.0,
    sides: tuple[tuple[float, float], ...] = ((16.0, 16.0),),
) -> Tensor:
    return anchor_grid(height, width, stride=stride, sides=sides)


FASTER_RCNN = tuple(
    (16.0 * scale / ratio**0.5, 16.0 * scale * ratio**0.5)
    for scale in (8, 16, 32)
    for ratio in (0.5, 1.0, 2.0)
)


def random_boxes(count: int, generator: torch.Generator, extent: tuple[float, float]) -> Tensor:
    middles = torch.rand(count, 2, generator=generator) * torch.tensor(extent)
    sides = torch.rand(count, 2, generator=generator) * 300 + 4
    return torch.cat([middles - sides / 2, middles + sides / 2], dim=1)


def slow_mask(boxes: list[Tensor], anchors: Tensor, psi: float) -> tuple[Tensor, Tensor]:
    """The definition box by box; and where an IoU is so near the limit that rounding decides."""
    masks, close = [], []
    for own in boxes:
        mask = torch.zeros(anchors.shape[:2], dtype=torch.bool)
        near = mask.clone()
        for box in own.double():
            iou = box_iou(box[None], anchors.double().flatten(0, 2)).view(anchors.shape[:3])
            limit = psi * iou.max()
            mask |= (iou > limit).any(dim=-1)
            near |= ((iou - limit).abs() < 3e-5 * limit).any(dim=-1)
        masks.append(mask)
        close.append(near)
    return torch.stack(masks), torch.stack(close)


def test_anchors_are_centred_on_the_cells() -> None:
    anchors = anchor_grid(2, 3, stride=8.0, sides=[(4.0, 2.0), (16.0, 16.0)])
    assert anchors.shape == (2, 3, 2, 4)
    assert anchors[1, 2, 0].tolist() == [18.0, 11.0, 22.0, 13.0]
    assert anchors[0, 0, 1].tolist() == [-4.0, -4.0, 12.0, 12.0]


def test_the_mask_of_one_box_by_hand() -> None:
    # 8 pixels to the right of the first anchor: IoU 128 / 384 with the first two, 0 with the last.
    box = torch.tensor([[8.0, 0.0, 24.0, 16.0]])
    anchors = grid(2, 3)
    expected = torch.tensor([[[True, True, False], [False, False, False]]])
    assert torch.equal(imitation_mask([box], anchors), expected)
    # 4 pixels to the right: 192 / 320 = 0.6 with the first, 64 / 448 = 0.14 with the second.
    box = torch.tensor([[4.0, 0.0, 20.0, 16.0]])
    expected[0, 0, 1] = False
    assert torch.equal(imitation_mask([box], anchors), expected)
    expected[0, 0, 1] = True
    assert torch.equal(imitation_mask([box], anchors, psi=0.2), expected)


@pytest.mark.parametrize("psi", [0.0, 0.25, 0.5, 0.9])
def test_the_mask_agrees_with_the_definition(psi: float) -> None:
    generator = torch.Generator().manual_seed(3)
    anchors = grid(12, 17, sides=FASTER_RCNN)
    boxes = [random_boxes(count, generator, (272.0, 192.0)) for count in (5, 0, 1, 9)]
    expected, close = slow_mask(boxes, anchors, psi)
    mask = imitation_mask(boxes, anchors, psi=psi)
    assert mask.dtype == torch.bool and mask.shape == (4, 12, 17)
    assert torch.equal(mask | close, expected | close)
    assert (mask != expected).float().mean() < 0.02
    assert not mask[1].any()


def test_an_iou_equal_to_the_limit_is_excluded() -> None:
    # A box inside anchors of side 32 and 64: IoU 1/16 and 1/64, a quarter of the best.
    anchors = grid(1, 5, stride=4.0, sides=((32.0, 32.0), (64.0, 64.0)))
    box = torch.tensor([[6.0, -2.0, 14.0, 6.0]])
    alone = imitation_mask([box], grid(1, 5, stride=4.0, sides=((32.0, 32.0),)), psi=0.25)
    assert torch.equal(imitation_mask([box], anchors, psi=0.25), alone)
    only = torch.cat([anchors[..., :1, :] + 1000.0, anchors[..., 1:, :]], dim=2)
    far = torch.tensor([[1006.0, 998.0, 1014.0, 1006.0]])
    assert not imitation_mask([torch.cat([box, far])], only, psi=1.0).any()


def test_psi_0_selects_all_overlapping_places_and_psi_1_none() -> None:
    generator = torch.Generator().manual_seed(5)
    anchors = grid(9, 9, sides=FASTER_RCNN[:2])
    boxes = [random_boxes(4, generator, (144.0, 144.0)) for _ in range(3)]
    assert not imitation_mask(boxes, anchors, psi=1.0).any()
    flat = anchors.flatten(0, 2)
    touched = torch.stack(
        [box_iou(own, flat).view(4, 9, 9, 2).amax(dim=(0, 3)) > 0 for own in boxes]
    )
    assert torch.equal(imitation_mask(boxes, anchors, psi=0.0), touched)


def test_the_mask_is_the_union_over_boxes_in_any_order() -> None:
    generator = torch.Generator().manual_seed(7)
    anchors = grid(10, 11, sides=FASTER_RCNN[:4])
    boxes = random_boxes(6, generator, (176.0, 160.0))
    whole = imitation_mask([boxes], anchors)
    parts = imitation_mask([boxes[:2], boxes[2:]], anchors)
    assert torch.equal(whole[0], parts.any(dim=0))
    assert torch.equal(whole, imitation_mask([boxes.flip(0)], anchors))


def test_the_mask_moves_with_box_and_scale() -> None:
    anchors = grid(8, 8, sides=((40.0, 24.0), (24.0, 40.0)))
    box = torch.tensor([[30.0, 40.0, 61.0, 77.0]])
    mask = imitation_mask([box], anchors)
    moved = imitation_mask([box + torch.tensor([16.0, 32.0, 16.0, 32.0])], anchors)
    assert torch.equal(moved[0, 2:, 1:], mask[0, :-2, :-1])
    assert torch.equal(imitation_mask([box * 3], anchors * 3), mask)


def test_empty_input_and_boxes_without_area_select_nothing() -> None:
    anchors = grid(4, 5)
    assert not imitation_mask([torch.zeros(0, 4)], anchors).any()
    assert imitation_mask([], anchors).shape == (0, 4, 5)
    line = torch.tensor([[10.0, 10.0, 10.0, 30.0]])
    assert not imitation_mask([line], anchors).any()
    point = torch.tensor([[8.0, 8.0, 8.0, 8.0]])
    assert not imitation_mask([point], anchors, psi=0.0).any()


def test_boxes_across_the_border_count_and_those_outside_do_not() -> None:
    anchors = grid(4, 5)  # an image of 80 x 64
    for outside in ([500.0, 500.0, 520.0, 520.0], [-40.0, -40.0, -8.0, -8.0]):
        assert not imitation_mask([torch.tensor([outside])], anchors, psi=0.0).any()
    # A quarter inside: IoU 64 / (256 + 256 - 64) with the first anchor alone.
    over = imitation_mask([torch.tensor([[-8.0, -8.0, 8.0, 8.0]])], anchors)
    assert over.nonzero().tolist() == [[0, 0, 0]]
    # Anchors outside the image count as well, and may fit such a box better.
    wider = anchors - 16.0
    over = imitation_mask([torch.tensor([[-16.0, -16.0, 0.0, 0.0]])], wider)
    assert over.nonzero().tolist() == [[0, 0, 0]]


def test_boxes_may_be_half_precision_or_integers() -> None:
    anchors = grid(6, 6, sides=((40.0, 24.0),))
    box = torch.tensor([[30.0, 40.0, 62.0, 77.0]])
    expected = imitation_mask([box], anchors)
    for dtype in (torch.bfloat16, torch.float64, torch.int64):
        assert torch.equal(imitation_mask([box.to(dtype)], anchors), expected)


@pytest.mark.slow
def test_the_compiled_mask_is_the_same() -> None:
    generator = torch.Generator().manual_seed(9)
    anchors = grid(7, 6, sides=FASTER_RCNN[:2])
    boxes = [random_boxes(3, generator, (96.0, 112.0))]
    compiled = torch.compile(imitation_mask, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(boxes, anchors), imitation_mask(boxes, anchors))


@pytest.mark.slow
def test_unchecked_invalid_boxes_select_nothing() -> None:
    # Compiled, as on an accelerator, the values are not looked at beforehand.
    compiled = torch.compile(imitation_mask, backend="aot_eager", fullgraph=True)
    anchors = grid(6, 6, sides=FASTER_RCNN[:2])
    box = torch.tensor([[30.0, 40.0, 62.0, 77.0]])
    left, top, right, bottom = box[0].tolist()
    nan, inf = float("nan"), float("inf")
    unsound = torch.tensor(
        [
            [right, top, left, bottom],
            [left, bottom, right, top],
            [right, bottom, left, top],
            [nan, top, right, bottom],
            [left, top, right, nan],
            [left, top, inf, bottom],
            [-inf, -inf, inf, inf],
            [inf, inf, inf, inf],
        ]
    )
    found = compiled([torch.cat([unsound, box])], anchors, psi=0.0)
    assert torch.equal(found, imitation_mask([box], anchors, psi=0.0))


@pytest.mark.parametrize(
    ("boxes", "anchors", "psi", "message"),
    [
        ([torch.zeros(3)], grid(2, 2), 0.5, r"boxes of image 0 must be \(G, 4\), got \(3,\)"),
        ([torch.zeros(1, 4)], torch.zeros(8, 4), 0.5, r"anchors must be \(H, W, K, 4\)"),
        ([torch.zeros(1, 4)], grid(2, 2), 1.5, "psi must be in 0..1, got 1.5"),
        ([torch.tensor([])], grid(2, 2), 0.5, r"got \(0,\); use \(0, 4\) for no boxes"),
        ([torch.zeros(0, 5)], grid(2, 2), 0.5, r"boxes of image 0 must be \(G, 4\), got \(0, 5\)"),
        ([torch.ones(1, 4) > 0], grid(2, 2), 0.5, "boxes of image 0 must be coordinates, got bool"),
        ([torch.zeros(1, 4)], grid(2, 2), float("nan"), "psi must be in 0..1, got nan"),
        (
            [torch.zeros(2, 4), torch.tensor([[0.0, 0, 1, 5], [9, 0, 1, 5]])],
            grid(2, 2),
            0.5,
            r"boxes of image 1 must be .* x1 <= x2 .*; box 1 is \[9.0, 0.0, 1.0, 5.0\]",
        ),
        ([torch.tensor([[0.0, 0, float("nan"), 5]])], grid(2, 2), 0.5, "must be finite"),
        ([torch.tensor([[0.0, 0, float("inf"), 5]])], grid(2, 2), 0.5, "must be finite"),
        ([torch.zeros(1, 4)], torch.rand(2, 2, 3, 4), 0.5, "anchors must be a grid"),
        ([torch.zeros(1, 4)], grid(2, 2).flip(-1), 0.5, "anchors must be a grid"),
    ],
)
def test_imitation_mask_rejects_bad_input(
    boxes: list[Tensor], anchors: Tensor, psi: float, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        imitation_mask(boxes, anchors, psi=psi)
