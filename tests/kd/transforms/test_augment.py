"""Augmentations: everything follows together, the colour matrix against torchvision, drawing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from kd.errors import UserError
from kd.transforms.augment import Augment, ColourChange, Plan, build_augment, pad, visible
from kd.transforms.hide import hidden_regions

SIZE = (60, 80)
BOXES = torch.tensor([[8.0, 10.0, 28.0, 40.0], [40.0, 20.0, 70.0, 50.0]])


def marked() -> tuple[Tensor, Tensor]:
    """A black image with each box painted in a channel of its own, and the boxes' masks."""
    masks = hidden_regions(BOXES, SIZE)
    image = torch.zeros(3, *SIZE, dtype=torch.uint8)
    image[:2] = masks.to(torch.uint8) * 255
    return image, masks


def bounds(mask: Tensor) -> Tensor:
    """The box around a mask, xyxy."""
    rows, columns = mask.nonzero().unbind(1)
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


@pytest.mark.parametrize(
    ("plan", "tolerance"),
    [
        (Plan(size=SIZE), 0.0),
        (Plan(size=SIZE, flip=True), 0.0),
        (Plan(size=SIZE, shift=(5, -4)), 0.0),
        (Plan(size=SIZE, shift=(-6, 3), flip=True), 0.0),
        (Plan(size=(80, 72), crop=(5, 4, 50, 45)), 1.0),
        (Plan(size=SIZE, angle=8.0), 1.5),
        (Plan(size=SIZE, angle=-5.0, flip=True, shift=(2, 2)), 1.5),
    ],
)
def test_image_boxes_and_masks_move_together(plan: Plan, tolerance: float) -> None:
    image, masks = marked()
    moved, moved_masks = plan.image(image), plan.masks(masks)
    boxes, _ = visible(plan.boxes(BOXES, SIZE), plan.size, 0.0)
    assert moved.shape == (3, *plan.size)
    assert moved.dtype == torch.uint8
    assert moved_masks.dtype == torch.bool
    for channel, box, mask in zip(moved[:2], boxes, moved_masks, strict=True):
        assert (bounds(mask) - box).abs().max() <= tolerance + 0.5 * (tolerance > 0)
        assert (bounds(channel > 127) - box).abs().max() <= tolerance + 0.5 * (tolerance > 0)
        agreement = ((channel > 127) == mask).float().mean()
        assert agreement > (0.97 if tolerance else 0.9999)


def test_pixels_from_outside_are_zero() -> None:
    image = torch.full((3, *SIZE), 200, dtype=torch.uint8)
    moved = Plan(size=SIZE, shift=(5, -4)).image(image)
    assert not moved[:, :, :5].any()
    assert not moved[:, -4:].any()
    assert (moved[:, :-4, 5:] == 200).all()


def test_boxes_outside_the_image_are_dropped_and_others_clipped() -> None:
    boxes = torch.tensor(
        [[-30.0, 0.0, -1.0, 20.0], [-10.0, 5.0, 30.0, 25.0], [70.0, 10.0, 110.0, 20.0]]
    )
    cut, kept = visible(boxes, SIZE, 0.3)
    assert kept.tolist() == [False, True, False]
    assert cut[1].tolist() == [0.0, 5.0, 30.0, 25.0]
    assert visible(boxes, SIZE, 0.25)[1].tolist() == [False, True, True]


def test_a_sliver_below_a_pixel_is_dropped() -> None:
    assert not visible(torch.tensor([[0.0, 0.0, 0.9, 40.0]]), SIZE, 0.0)[1].any()


def middle_tones() -> Tensor:
    """Pixels that no change below drives out of 0..255, where rounding order would matter."""
    return torch.randint(90, 160, (3, 20, 30), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "reference"),
    [
        (ColourChange(brightness=1.15), lambda x: F.adjust_brightness(x, 1.15)),
        (ColourChange(contrast=0.8), lambda x: F.adjust_contrast(x, 0.8)),
        (ColourChange(saturation=1.2), lambda x: F.adjust_saturation(x, 1.2)),
        (ColourChange(grey=True), lambda x: F.rgb_to_grayscale(x, num_output_channels=3)),
        (ColourChange(order=(2, 0, 1)), lambda x: F.permute_channels(x, [2, 0, 1])),
        (
            ColourChange(brightness=0.9, contrast=1.1, saturation=0.8),
            lambda x: F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(x, 0.9), 1.1), 0.8),
        ),
    ],
)
def test_the_colour_matrix_agrees_with_torchvision(change: ColourChange, reference: object) -> None:
    image = middle_tones()
    assert callable(reference)
    difference = change(image).int() - reference(image).int()
    assert difference.abs().max() <= 3  # torchvision rounds down after each step


def test_an_rgb_shift_adds_to_each_channel() -> None:
    image = middle_tones()
    shifted = ColourChange(rgb_shift=(5.0, -7.0, 0.0))(image)
    assert torch.equal(
        shifted.int() - image.int(), torch.tensor([5, -7, 0])[:, None, None].expand(image.shape)
    )


def test_hue_turns_colours_and_leaves_greys() -> None:
    grey = torch.full((3, 4, 4), 120, dtype=torch.uint8)
    assert (ColourChange(hue=0.2)(grey).int() - grey.int()).abs().max() <= 1
    image = middle_tones()
    back = ColourChange(hue=-0.1)(ColourChange(hue=0.1)(image))
    assert (back.int() - image.int()).abs().max() <= 3
    assert (ColourChange(hue=0.1)(image).int() - image.int()).abs().max() > 5


def test_colours_are_clipped() -> None:
    white = torch.full((3, 2, 2), 255, dtype=torch.uint8)
    assert (ColourChange(brightness=2.0)(white) == 255).all()
    assert (ColourChange(rgb_shift=(-300.0, -300.0, -300.0))(white) == 0).all()


def test_equal_seeds_draw_equal_plans() -> None:
    augment = Augment(crop=0.5, shift=0.5, rotate=0.5, jitter=0.5, shuffle=0.5, blur=0.5)
    plans = [augment.draw(np.random.default_rng(seed), SIZE) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_each_augmentation_occurs_with_its_probability() -> None:
    random = np.random.default_rng(0)
    augment = Augment(crop=0.2)
    plans = [augment.draw(random, SIZE) for _ in range(2000)]
    counts = {
        "flip": sum(plan.flip for plan in plans),
        "rotate": sum(plan.angle != 0 for plan in plans),
        "crop": sum(plan.crop is not None for plan in plans),
        "blur": sum(plan.blur > 0 for plan in plans),
        "grey": sum(plan.colour is not None and plan.colour.grey for plan in plans),
    }
    expected = {"flip": 0.5, "rotate": 0.1, "crop": 0.2, "blur": 0.1, "grey": 0.1}
    for name, fraction in expected.items():
        assert counts[name] / 2000 == pytest.approx(fraction, abs=0.035), name


def test_zero_probabilities_do_nothing() -> None:
    never = Augment(flip=0, shift=0, rotate=0, rgb_shift=0, shuffle=0, grey=0, blur=0, jitter=0)
    assert never.draw(np.random.default_rng(0), SIZE) == Plan(size=SIZE)


@pytest.mark.parametrize("seed", range(20))
def test_a_crop_lies_in_the_image_and_fills_the_long_side(seed: int) -> None:
    plan = Augment(crop=1.0, crop_scale=(0.3, 0.9)).draw(np.random.default_rng(seed), SIZE)
    assert plan.crop is not None
    top, left, height, width = plan.crop
    assert 0 <= top <= top + height <= SIZE[0]
    assert 0 <= left <= left + width <= SIZE[1]
    assert max(plan.size) == max(SIZE)


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"flip": 1.5}, "augment.flip"),
        ({"max_angle": -1.0}, "augment.max_angle"),
        ({"crop_scale": [0.9, 0.5]}, "augment.crop_scale"),
        ({"fliip": 0.5}, "unknown option 'fliip'"),
    ],
)
def test_wrong_options_are_rejected(options: dict[str, object], place: str) -> None:
    with pytest.raises(UserError, match=place):
        build_augment(options)


def test_no_options_mean_no_augmentation() -> None:
    assert build_augment(None) is None
    assert build_augment({}) == Augment()


def test_padding_goes_below_and_right() -> None:
    padded = pad(torch.ones(3, 2, 5, dtype=torch.uint8), 6)
    assert padded.shape == (3, 6, 6)
    assert padded[:, :2, :5].all()
    assert padded.sum() == 30
