"""What is around an object: rings, the scene, the inside, geometry, and never the padding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kd.nn.regions import Surroundings, image_extents, standardised
from kd.transforms.hide import normalise

CHANNELS, STRIDES = (3, 4), (8, 16)
# Two images in frames of 64 x 64: 64 wide and 48 high, 40 wide and 64 high.
EXTENTS = torch.tensor([[64, 48], [40, 64]])
BOXES = torch.tensor(
    [[8, 8, 24, 20], [33, 5, 59, 41], [4, 10, 36, 50], [0, 0, 40, 64], [20, 30, 22, 31]]
).float()
IMAGE_OF = torch.tensor([0, 0, 1, 1, 1])


def maps() -> list[Tensor]:
    return [
        torch.randn(2, channels, 64 // stride, 64 // stride)
        for channels, stride in zip(CHANNELS, STRIDES, strict=True)
    ]


def reader(**options: object) -> Surroundings:
    """In evaluation, with the running statistics of a new one: what is read is left as it is."""
    made = Surroundings(CHANNELS, STRIDES, **options).eval()  # type: ignore[arg-type]
    made.scale.fill_(1.0)
    return made


def painted(region: Tensor) -> list[Tensor]:
    """Maps of both strides that are 1 in some places of image 0 and 0 elsewhere."""
    return [
        nn.functional.avg_pool2d(region[None, None].float(), stride).expand(2, channels, -1, -1)
        for channels, stride in zip(CHANNELS, STRIDES, strict=True)
    ]


def slow_mean(features: Tensor, stride: int, weight: Tensor, picture: Tensor) -> Tensor:
    """The mean of a map (C, h, w) over pixels with weights (H, W), in double precision."""
    places = features.double().repeat_interleave(stride, 1).repeat_interleave(stride, 2)
    # Weights of a place cannot be told apart inside it, so a place's fraction is its mean weight.
    pooled = nn.functional.avg_pool2d(weight[None].double(), stride)[0]
    whole = nn.functional.avg_pool2d(picture[None].double(), stride)[0]
    fraction = (pooled + 1e-12 * whole).repeat_interleave(stride, 0).repeat_interleave(stride, 1)
    return (places * fraction).sum(dim=(1, 2)) / fraction.sum()


def filled(box: list[int]) -> Tensor:
    """1 inside a box of whole pixels, (64, 64)."""
    pixels = torch.zeros(64, 64)
    x1, y1, x2, y2 = box
    pixels[y1:y2, x1:x2] = 1
    return pixels


def test_what_is_read_agrees_with_a_slow_loop() -> None:
    margins, min_ring = (0.5, 1.0), 6
    read = reader(margins=margins, min_ring=float(min_ring), inside=True)
    features = maps()
    found = read(features, BOXES, IMAGE_OF, EXTENTS)
    assert found.shape == (5, read.width) == (5, 7 * 4 + 8)
    for row, box, image in zip(found, BOXES.int().tolist(), IMAGE_OF.tolist(), strict=True):
        wide, high = EXTENTS[image].tolist()
        picture, own = filled([0, 0, wide, high]), filled(box)
        weights = []
        for margin in margins:
            by_x = max(margin * (box[2] - box[0]), min_ring)
            by_y = max(margin * (box[3] - box[1]), min_ring)
            grown = [box[0] - by_x, box[1] - by_y, box[2] + by_x, box[3] + by_y]
            grown = [max(g, 0) for g in grown[:2]] + [min(grown[2], wide), min(grown[3], high)]
            assert all(float(side).is_integer() for side in grown)
            weights.append(filled([int(side) for side in grown]) - own)
        weights += [picture - own, own]
        expected = [
            slow_mean(level[image], stride, weight, picture)
            for level, stride in zip(features, STRIDES, strict=True)
            for weight in weights
        ]
        torch.testing.assert_close(row[:-8], torch.cat(expected).float(), rtol=1e-4, atol=1e-4)


def test_a_ring_leaves_the_box_out_and_reaches_no_further_than_its_margin() -> None:
    read = reader(margins=(0.5,), scene=False, geometry=False)
    boxes, image_of = torch.tensor([[16.0, 16.0, 32.0, 32.0]]), torch.tensor([0])
    in_box, in_ring = filled([16, 16, 32, 32]), filled([8, 8, 40, 40])
    beyond = 1 - in_ring
    assert read(painted(in_box), boxes, image_of, EXTENTS)[0, :3].abs().max() < 1e-9
    assert read(painted(beyond), boxes, image_of, EXTENTS)[0, :3].abs().max() < 1e-9
    ring = read(painted(in_ring - in_box), boxes, image_of, EXTENTS)[0, :3]
    torch.testing.assert_close(ring, torch.ones(3), rtol=0, atol=1e-4)


def test_a_ring_is_never_thinner_than_asked() -> None:
    boxes, image_of = torch.tensor([[16.0, 16.0, 24.0, 24.0]]), torch.tensor([0])
    far = painted(filled([0, 0, 40, 40]) - filled([8, 8, 32, 32]))  # 8 to 16 pixels away
    thin = reader(margins=(0.5,), min_ring=8.0, scene=False, geometry=False)
    thick = reader(margins=(0.5,), min_ring=16.0, scene=False, geometry=False)
    assert thin(far, boxes, image_of, EXTENTS)[0, :3].max() < 1e-4
    expected = (40**2 - 24**2) / (40**2 - 8**2)
    found = thick(far, boxes, image_of, EXTENTS)[0, :3]
    torch.testing.assert_close(found, torch.full((3,), expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("inside", [True, False])
def test_the_box_itself_is_read_only_where_asked(inside: bool) -> None:
    read = reader(inside=inside, geometry=False)
    boxes, image_of = torch.tensor([[16.0, 16.0, 32.0, 32.0]]), torch.tensor([0])
    quiet, loud = painted(torch.zeros(64, 64)), painted(filled([16, 16, 32, 32]))
    before, after = (read(one, boxes, image_of, EXTENTS) for one in (quiet, loud))
    assert before.shape[1] == read.width == 7 * (2 + inside)
    assert torch.allclose(before, after, rtol=0, atol=1e-9) is not inside


def test_geometry_is_relative_to_the_image_inside_its_padding() -> None:
    read = reader()
    whole = torch.tensor([[0.0, 0.0, 64.0, 48.0], [0.0, 0.0, 40.0, 64.0]])
    both = read(maps(), whole, torch.tensor([0, 1]), EXTENTS)[:, -8:]
    torch.testing.assert_close(both[0], both[1])
    torch.testing.assert_close(both[0, :6] * 8**0.5, torch.tensor([0.5, 0.5, 1.0, 1.0, 1.0, 1.0]))


def test_the_padding_is_never_read() -> None:
    read = reader(margins=(0.5, 9.0), min_ring=30.0, inside=True)
    features = maps()
    changed = copy.deepcopy(features)
    for level, stride in zip(changed, STRIDES, strict=True):
        for image, (wide, high) in enumerate(EXTENTS.tolist()):
            level[image, :, :, -(-wide // stride) :] = 1e4
            level[image, :, -(-high // stride) :] = -1e4
    outside = BOXES + torch.tensor([0.0, 0.0, 20.0, 20.0])  # even where a box reaches into it
    for boxes in (BOXES, outside):
        before = read(features, boxes, IMAGE_OF, EXTENTS)
        assert torch.equal(read(changed, boxes, IMAGE_OF, EXTENTS), before)
    assert not torch.equal(changed[0], features[0])


def test_a_box_over_the_whole_image_reads_the_image() -> None:
    read = reader(scene=True, inside=True, geometry=False)
    features = maps()
    found = read(features, BOXES[3:4], IMAGE_OF[3:4], EXTENTS)[0]
    for part in (found[:3], found[3:6], found[6:9]):
        torch.testing.assert_close(part, features[0][1, :, :, :5].mean(dim=(1, 2)))


def test_objects_in_another_order_are_read_alike() -> None:
    read = reader(inside=True)
    features, order = maps(), torch.tensor([3, 1, 4, 0, 2])
    whole = read(features, BOXES, IMAGE_OF, EXTENTS)
    shuffled = read(features, BOXES[order], IMAGE_OF[order], EXTENTS)
    torch.testing.assert_close(shuffled, whole[order])


@pytest.mark.parametrize("training", [True, False])
def test_no_object_and_bfloat16_are_fine(training: bool) -> None:
    read = Surroundings(CHANNELS, STRIDES, inside=True).train(training)
    features = [level.requires_grad_() for level in maps()]
    none = read(features, BOXES[:0], IMAGE_OF[:0], EXTENTS)
    assert none.shape == (0, read.width)
    none.sum().backward()
    assert all(value.isfinite().all() for value in read.state_dict().values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = read([level.bfloat16() for level in features], BOXES, IMAGE_OF, EXTENTS)
    assert found.dtype == torch.float32 and found.isfinite().all()


def test_every_level_and_part_has_the_same_power() -> None:
    channels, strides = (4, 64), (8, 16)
    read = Surroundings(channels, strides, scene=False, geometry=False).train()
    corners = torch.rand(200, 2, 2).sort(dim=1).values * 64
    boxes, image_of = corners.reshape(200, 4), torch.arange(200) % 2
    features = [torch.randn(2, 4, 8, 8) * 50, torch.randn(2, 64, 4, 4)]
    found = read(features, boxes, image_of, torch.full((2, 2), 64))
    power = torch.stack([found[:, :4].square().sum(1).mean(), found[:, 4:].square().sum(1).mean()])
    torch.testing.assert_close(power, torch.ones(2), rtol=0.1, atol=0.0)


def test_rows_are_brought_to_mean_0_and_deviation_1() -> None:
    norm = nn.BatchNorm1d(3, affine=False)
    rows = torch.randn(50, 3) * torch.tensor([1e-3, 1.0, 1e3]) + 5
    found = standardised(norm, rows)
    torch.testing.assert_close(found.mean(0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(found[:, 1:].std(0, correction=0), torch.ones(2), rtol=1e-3, atol=0)
    rows[0] = 1e9
    assert standardised(norm.eval(), rows).max() == 8


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_rows_take_the_running_statistics_and_leave_them(count: int) -> None:
    norm = nn.BatchNorm1d(3, affine=False)
    standardised(norm, torch.randn(20, 3) + 2)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    rows = torch.randn(count, 3, requires_grad=True)
    in_training = standardised(norm, rows)
    in_training.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    torch.testing.assert_close(in_training, standardised(norm.eval(), rows))


def test_extents_end_where_the_black_padding_starts() -> None:
    pixels = torch.zeros(4, 3, 20, 30, dtype=torch.uint8)
    pixels[0, :, :15, :30] = 90
    pixels[1, 2, :20, :11] = 1  # nearly black counts
    pixels[2, :, 4, 7] = 200  # black inside the image counts as well
    images = normalise(pixels)
    assert image_extents(images).tolist() == [[30, 15], [11, 20], [8, 5], [30, 20]]
    images[0, :, 5:8, 5:8] = 0.0  # a hole is no padding
    assert image_extents(images)[0].tolist() == [30, 15]
    assert image_extents(images[:0]).shape == (0, 2)
