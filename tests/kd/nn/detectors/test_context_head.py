"""What is around a box: what is read of it and what is not, and how two experts' opinions join."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd.errors import UserError
from kd.nn.detectors.context_head import Around, BoxContext, box_sums
from kd.nn.detectors.faster_rcnn import FasterRCNN
from kd.nn.networks import DETECTORS
from kd.nn.regions import box_geometry, coverage, log_prior

CLASSES = 3
SMALL = {"trunk": "resnet18", "width": 0.25, "levels": [2, 3], "channels": 16, "scales": [2.0],
         "canonical": 32.0, "hidden": 32, "region_size": 3, "candidates": [50, 50],
         "proposals": [40, 20], "sampled_anchors": 32, "sampled_regions": 32,
         "least_score": 0.0}  # fmt: skip
PRIOR = [0.5, 0.3, 0.2]
SIZES = torch.tensor([[48, 64], [64, 40]])
BOXES = torch.tensor([[8.0, 8.0, 16.0, 17.0], [2.0, 2.0, 30.0, 26.0], [20.0, 20.0, 33.0, 47.0]])
LABELS, IMAGE_OF = torch.tensor([0, 2, 1]), torch.tensor([1, 0, 1])


def test_a_sum_over_a_box_counts_places_by_their_share() -> None:
    maps = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]])
    boxes = torch.tensor([[0.0, 0, 3, 2], [0.5, 0, 1, 2], [1, 0.25, 2.5, 1], [3, 2, 3, 2]])
    sums = box_sums(maps, boxes, torch.zeros(4, dtype=torch.int64))
    assert sums[:, 0].tolist() == pytest.approx([21.0, 2.5, 0.75 * (2 + 1.5), 0.0], abs=1e-5)
    assert box_sums(maps, boxes[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, 1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(0, 1))
def test_a_sum_over_a_box_is_that_of_the_shares_it_covers(at: list[float], image: int) -> None:
    maps = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    x1, x2 = sorted(7 * one for one in at[:2])
    y1, y2 = sorted(5 * one for one in at[2:])
    box = torch.tensor([[x1, y1, x2, y2]])
    expected = (maps[image] * coverage(box, (5, 7), 1)).sum(dim=(1, 2))
    found = box_sums(maps, box, torch.tensor([image]))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def read(maps: list[Tensor], boxes: Tensor = BOXES, image_of: Tensor = IMAGE_OF) -> Tensor:
    around = Around(4, (4, 8), margin=0.5)
    found: Tensor = around(maps, boxes, image_of, SIZES.flip(1))
    assert found.shape == (len(boxes), around.width)
    return found


def pyramid(seed: int = 1) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, side, side, generator=drawn) for side in (16, 8)]


def test_ring_and_scene_are_means_without_the_box_in_the_image() -> None:
    maps = pyramid()
    found = read(maps).split([4, 4, 4, 4, 8], dim=1)
    for row, (box, image) in enumerate(zip(BOXES, IMAGE_OF.tolist(), strict=True)):
        height, width = SIZES[image].tolist()
        grown = (box[2:] - box[:2]) * 0.5
        ring = torch.cat([box[:2] - grown, box[2:] + grown])
        ring = ring.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        scene = torch.tensor([0.0, 0, width, height])
        for level, stride in enumerate((4, 8)):
            grid = (64 // stride, 64 // stride)
            hole = coverage(box[None], grid, stride)
            for kind, outer in enumerate((ring, scene)):
                weights = coverage(outer[None], grid, stride) - hole
                mean = (maps[level][image] * weights).sum(dim=(1, 2)) / weights.sum()
                torch.testing.assert_close(found[2 * level + kind][row], mean, rtol=1e-4, atol=1e-4)
        place = box / torch.tensor([width, height, width, height])
        torch.testing.assert_close(found[4][row], box_geometry(place[None])[0])


def test_nothing_on_the_box_or_in_the_padding_is_read() -> None:
    maps = pyramid()
    box = torch.tensor([[8.0, 16.0, 24.0, 32.0]])  # on the border of places of both levels
    before = read(maps, box, torch.tensor([0]))
    for level, stride in enumerate((4, 8)):
        maps[level][0, :, 16 // stride : 32 // stride, 8 // stride : 24 // stride] += 100.0
        maps[level][0, :, 48 // stride :] += 100.0
        maps[level][1] += 100.0
    torch.testing.assert_close(read(maps, box, torch.tensor([0])), before, rtol=1e-3, atol=1e-3)
    maps[0][0, :, 3] += 1.0  # pixels 12 to 16: above it
    assert not torch.allclose(read(maps, box, torch.tensor([0])), before, atol=1e-2)


def test_around_a_box_over_the_whole_image_there_is_nothing() -> None:
    box = torch.tensor([[0.0, 0.0, 64.0, 48.0], [-9.0, -9.0, 99.0, 99.0]])
    found = read(pyramid(), box, torch.zeros(2, dtype=torch.int64))
    assert not found[:, :16].any()
    torch.testing.assert_close(found[0], found[1])
    assert read(pyramid(), BOXES[:0], IMAGE_OF[:0]).shape == (0, 24)


def head(strength: float = 0.5) -> BoxContext:
    prior = log_prior("a detector", CLASSES, PRIOR)
    return BoxContext(4, (4, 8), prior, hidden=6, margin=0.5, strength=strength)


def test_two_experts_join_by_hand() -> None:
    context = head(strength=2.0)
    logits = torch.tensor([[1.0, 0.5, -1.0, 0.0]])
    said = torch.tensor([[0.25, 0.5, 0.25]]).log() + 3.0  # a constant says nothing
    prior = torch.tensor(PRIOR)
    expected = logits.clone()
    expected[0, 1:] += 2.0 * (torch.tensor([0.25, 0.5, 0.25]) / prior).log()
    torch.testing.assert_close(context.joined(logits, said), expected)
    # Surroundings that say no more than the prior change nothing.
    torch.testing.assert_close(context.joined(logits, prior.log()[None]), logits)
    # Of no strength neither do those that say much.
    assert torch.equal(head(strength=0.0).joined(logits, said), logits)


def test_a_new_head_says_what_the_prior_says() -> None:
    said = head()(pyramid(), BOXES, IMAGE_OF, SIZES.flip(1))
    torch.testing.assert_close(said.softmax(dim=1), torch.tensor([PRIOR] * 3), rtol=2e-2, atol=2e-2)


def test_the_head_moves_maps_and_its_own_weights_but_no_box() -> None:
    context, maps = head(), [one.requires_grad_() for one in pyramid()]
    boxes = BOXES.clone().requires_grad_()
    context.joined(
        torch.randn(3, 4), context(maps, boxes, IMAGE_OF, SIZES.flip(1))
    ).square().sum().backward()
    assert all(one.grad is not None and one.grad.any() for one in maps)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in context.parameters())
    assert context.strength.grad is not None and context.strength.grad != 0
    assert boxes.grad is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"prior": [0.5, 0.5]},
            r"prior must hold 3 probabilities above 0, got 2, the smallest of them 0\.5",
        ),
        ({"prior": [0.5, 0.5, 0.0]}, "prior must hold 3 probabilities above 0, got 3"),
        ({"context_hidden": 0}, "context_hidden must be 1 or more"),
        ({"context_margin": 0.0}, "context_margin above 0, got 128 and 0"),
    ],
)
def test_options_out_of_range_are_refused(changed: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        DETECTORS["fasterrcnn"].load()(num_classes=CLASSES, context=True, **{**SMALL, **changed})


def pair(strength: float) -> tuple[FasterRCNN, FasterRCNN]:
    """A bare network and one with a head that says something, their other weights equal."""
    built = []
    for context in (False, True):
        torch.manual_seed(0)
        given = {"context": context, "strength": strength, "prior": PRIOR, **SMALL}
        built.append(DETECTORS["fasterrcnn"].load()(num_classes=CLASSES, **given))
    bare, full = built
    assert isinstance(bare, FasterRCNN) and isinstance(full, FasterRCNN)
    ours, theirs = full.state_dict(), bare.state_dict()
    assert {name.split(".")[0] for name in ours.keys() - theirs.keys()} == {"context"}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert full.context is not None
    torch.nn.init.normal_(full.context.get_parameter("layers.3.weight"), std=0.5)
    return bare, full


def pictures() -> Tensor:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    for image, (height, width) in zip(images, SIZES.tolist(), strict=True):
        image[:, height:], image[:, :, width:] = 0.0, 0.0
    return images


def test_without_strength_detections_are_those_of_the_bare_network() -> None:
    images, found = pictures(), []
    for network in (*pair(0.0), pair(1.0)[1]):
        with torch.no_grad():
            found.append(network.eval()(images, SIZES)["detections"])
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_what_it_says_of_given_boxes_is_both_experts_opinion() -> None:
    (bare, full), images = pair(0.7), pictures()
    with torch.no_grad():
        asked = {"boxes": BOXES, "image_of": IMAGE_OF, "near_boxes": BOXES}
        alone = bare.eval()(images, **asked)
        both = full.eval()(images, **asked)
        told = full(images, SIZES, BOXES, LABELS, IMAGE_OF)
    assert "context" not in alone and both["context"].shape == (3, CLASSES)
    assert full.context is not None
    joined = full.context.joined(alone["object_logits"], both["context"])
    torch.testing.assert_close(both["object_logits"], joined)
    assert torch.equal(both["object_logits"][:, 0], alone["object_logits"][:, 0])
    assert torch.equal(both["object_deltas"], alone["object_deltas"])
    # Asked elsewhere, the head still speaks of what is around the boxes themselves.
    with torch.no_grad():
        moved = full(images, boxes=BOXES, image_of=IMAGE_OF, near_boxes=BOXES + 2.0)
    assert torch.equal(moved["context"], both["context"])
    assert not torch.allclose(moved["object_logits"], both["object_logits"])
    # Where sizes are not given they are seen.
    torch.testing.assert_close(both["context"], told["context"])
    # Rows follow the batch's order, whatever it is.
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        again = full(images, boxes=BOXES[order], image_of=IMAGE_OF[order])
    torch.testing.assert_close(again["context"], both["context"][order])


def test_supervised_losses_reach_the_head_and_images_without_boxes_are_harmless() -> None:
    _, full = pair(0.5)
    output = full.train()(pictures(), SIZES, BOXES, LABELS, IMAGE_OF)
    output["loss.classes"].backward()
    assert full.context is not None
    assert all(p.grad is not None and p.grad.any() for p in full.context.parameters())
    none = full(pictures(), SIZES, BOXES[:0], LABELS[:0], IMAGE_OF[:0])
    assert none["context"].shape == (0, CLASSES)
    losses = [value for name, value in none.items() if name.startswith("loss.")]
    torch.stack(losses).sum().backward()
    assert all(value.isfinite() for value in losses)
    assert all(p.grad is None or p.grad.isfinite().all() for p in full.parameters())


def test_in_bfloat16_the_head_still_answers_in_float32() -> None:
    _, full = pair(0.5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        objects = (SIZES, BOXES, LABELS, IMAGE_OF)
        given = copy.deepcopy(full).eval()(pictures(), *objects, near_boxes=BOXES)
    assert given["context"].dtype == given["object_logits"].dtype == torch.float32
    assert given["detections"].isfinite().all()
