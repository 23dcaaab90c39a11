"""Random crops: image and label map agree, places know where they come from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd.errors import UserError
from kd.transforms.augment import ColourChange
from kd.transforms.crops import Crop, Crops, Flips, build_crops, build_flips
from kd.utils.images import VOID

SIZE, FRAME = (45, 62), (40, 48)
COLOURS = torch.tensor([[250, 10, 10], [10, 250, 10], [10, 10, 250], [250, 250, 250]])
STILL = Crops(jitter=0.0)


def draw(seed: int, crops: Crops = STILL, size: tuple[int, int] = SIZE, **options: float) -> Crop:
    return crops.draw(np.random.default_rng(seed), size, FRAME, **options)


def scene(size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor]:
    """An image of blocks, each class in its own colour, and its label map with some void."""
    coarse = torch.randint(4, (1, 1, 4, 5)).float()
    labels = F.interpolate(coarse, size, mode="nearest")[0, 0].long()
    picture = COLOURS[labels].permute(2, 0, 1).to(torch.uint8)
    return picture, labels.to(torch.uint8)


def away_from_borders(labels: Tensor, width: int = 3) -> Tensor:
    """Places around which all is of one class."""
    maps = labels[None, None].float()
    high = F.max_pool2d(maps, 2 * width + 1, 1, width)
    low = -F.max_pool2d(-maps, 2 * width + 1, 1, width)
    return (high == low)[0, 0]


@pytest.mark.parametrize("seed", range(12))
def test_image_and_label_map_stay_aligned(seed: int) -> None:
    picture, labels = scene()
    crop = draw(seed)
    colours = crop.image(picture, FRAME).permute(1, 2, 0).float()
    moved = crop.label_map(labels, FRAME)
    assert colours.shape[:2] == moved.shape == FRAME and moved.dtype == torch.uint8
    seen = (colours[..., None, :] - COLOURS).abs().sum(dim=-1).argmin(dim=-1)
    inside = away_from_borders(moved) & (moved != VOID)
    assert inside.sum() > 60
    assert torch.equal(seen[inside], moved[inside].long())
    assert set(moved.unique().tolist()) <= {*range(4), VOID}


def test_a_flip_mirrors_the_crop() -> None:
    picture, labels = scene()
    crop = Crop(window=(3, 5, 40, 48), size=FRAME)
    flipped = replace(crop, flip=True)
    cut = (slice(3, 43), slice(5, 53))
    assert torch.equal(crop.image(picture, FRAME), picture[:, *cut])
    assert torch.equal(crop.label_map(labels, FRAME), labels[cut])
    assert torch.equal(flipped.image(picture, FRAME), picture[:, *cut].flip(2))
    assert torch.equal(flipped.label_map(labels, FRAME), labels[cut].flip(1))


@pytest.mark.parametrize("flip", [False, True])
def test_a_frame_larger_than_the_image_is_padded_below_and_right(flip: bool) -> None:
    picture, labels = torch.full((3, *SIZE), 200, dtype=torch.uint8), torch.ones(SIZE).byte()
    brighter = ColourChange(brightness=1.0, contrast=0.5)
    crop = Crop(window=(0, 0, *SIZE), size=(20, 30), flip=flip, colour=brighter)
    image, moved = crop.image(picture, FRAME), crop.label_map(labels, FRAME)
    assert (image[:, :20, :30] == 200).all() and (moved[:20, :30] == 1).all()
    assert not image[:, 20:].any() and not image[:, :, 30:].any()
    assert (moved[20:] == VOID).all() and (moved[:, 30:] == VOID).all()


@given(st.integers(0, 10_000), st.integers(20, 120), st.integers(20, 120))
@settings(max_examples=80, deadline=None)
def test_a_frame_within_the_scaled_image_is_not_padded(seed: int, height: int, width: int) -> None:
    crop = draw(seed, size=(height, width))
    top, left, rows, columns = crop.window
    assert 0 <= top <= height - rows and 0 <= left <= width - columns
    for side, part, scaled, frame in zip(
        (height, width), (rows, columns), crop.size, FRAME, strict=True
    ):
        # Void is only where the whole side of the image is there.
        assert scaled == frame if part < side else scaled <= frame


def test_scales_are_relative_to_the_working_size() -> None:
    crops = Crops(scale=(0.8, 1.6), flip=0.0, jitter=0.0)
    size = (400, 400)
    for factor in (1.0, 0.5):
        drawn = [draw(seed, crops, size, factor=factor) for seed in range(200)]
        scales = np.array([crop.size[1] / crop.window[3] for crop in drawn]) / factor
        assert scales.min() == pytest.approx(0.8, abs=0.03)
        assert scales.max() == pytest.approx(1.6, abs=0.05)


def test_flips_and_colours_occur_with_their_probability() -> None:
    drawn = [draw(seed, Crops(flip=0.3, jitter=0.8)) for seed in range(400)]
    assert np.mean([crop.flip for crop in drawn]) == pytest.approx(0.3, abs=0.06)
    colours = [crop.colour for crop in drawn if crop.colour is not None]
    assert len(colours) / 400 == pytest.approx(0.8, abs=0.06)
    changes = np.array([(one.brightness, one.contrast, one.saturation) for one in colours])
    assert changes.min() >= 0.7 and changes.max() <= 1.3 and (changes.std(axis=0) > 0.1).all()
    geometry = [replace(crop, colour=None) for crop in drawn]
    assert geometry == [draw(seed, Crops(flip=0.3, jitter=0.0)) for seed in range(400)]


def test_without_options_images_are_only_cropped() -> None:
    crop = draw(4, build_crops(None))
    assert crop.window[2:] == crop.size == FRAME
    assert not crop.flip and crop.colour is None


@given(st.integers(0, 10_000), st.integers(6, 38), st.integers(6, 55), st.booleans())
@settings(max_examples=80, deadline=None)
def test_sources_invert_the_crop(seed: int, y: int, x: int, upside_down: bool) -> None:
    """A marked point is found at the place that comes from it."""
    picture = torch.zeros(3, *SIZE, dtype=torch.uint8)
    picture[:, y - 2 : y + 3, x - 2 : x + 3] = 255
    crop = replace(draw(seed), upside_down=upside_down)
    top, left, height, width = crop.window
    inside = top + 4 <= y < top + height - 4 and left + 4 <= x < left + width - 4
    seen = crop.image(picture, FRAME)[0].double()
    if not inside:
        return
    down, right = torch.arange(FRAME[0]) + 0.5, torch.arange(FRAME[1]) + 0.5
    place = [float((seen * right).sum() / seen.sum()), float((seen * down[:, None]).sum())]
    place[1] /= float(seen.sum())
    back = crop.sources() @ np.array([*place, 1.0])
    assert back == pytest.approx([x + 0.5, y + 0.5], abs=0.1)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=60, deadline=None)
def test_of_mirrored_gives_the_same_crop(seed: int, upside_down: bool) -> None:
    picture, labels = scene()
    crop = replace(draw(seed), flip=True, upside_down=upside_down)
    mirrored = crop.of_mirrored(SIZE)
    assert not mirrored.flip
    first = crop.image(picture, FRAME).int()
    assert (mirrored.image(picture.flip(2), FRAME).int() - first).abs().max() <= 1
    same = mirrored.label_map(labels.flip(1), FRAME) == crop.label_map(labels, FRAME)
    assert same.float().mean() > 0.9  # the nearest of two that are equally near is another
    place = np.array([7.0, 11.0, 1.0])
    x, y = crop.sources() @ place
    assert mirrored.sources() @ place == pytest.approx([SIZE[1] - x, y])


def test_flips_of_whole_images_occur_with_their_probability() -> None:
    turns = Flips(flip=0.3, upside_down=0.6, jitter=0.2)
    drawn = [turns.draw(np.random.default_rng(seed), SIZE, FRAME) for seed in range(400)]
    assert all(crop.window == (0, 0, *SIZE) and crop.size == FRAME for crop in drawn)
    fractions = np.mean(
        [(crop.flip, crop.upside_down, crop.colour is not None) for crop in drawn], 0
    )
    assert fractions == pytest.approx([0.3, 0.6, 0.2], abs=0.07)
    assert not any(build_flips(None).draw(np.random.default_rng(s), SIZE, FRAME).flip
                   for s in range(20))  # fmt: skip
    with pytest.raises(UserError, match="augment: unknown option 'upsidedown'; did you mean"):
        build_flips({"upsidedown": 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jiter": 1.0}, "augment: unknown option 'jiter'; did you mean 'jitter'"),
        (
            {"scale": (0.0, 1.0)},
            r"augment.scale: got \(0.0, 1.0\), expected 0 < smallest",
        ),
        ({"scale": (2.0, 1.0)}, "augment.scale: .*expected 0 < smallest <= largest"),
        ({"scale": (1.0, 1.5, 2.0)}, "augment: option 'scale' must have at most 2 items, not 3"),
        ({"scale": 1.5}, "augment: option 'scale' must be a list, got 1.5"),
        ({"flip": 1.5}, r"augment.flip: got 1.5, expected 0 to 1"),
        ({"flip": "often"}, "augment: option 'flip' must be a valid number, got 'often'"),
        ({"jitter": -0.1}, r"augment.jitter: got -0.1, expected 0 to 1"),
        ({"max_jitter": 2}, r"augment.max_jitter: got 2, expected 0 to 1"),
    ],
)
def test_options_out_of_range_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        build_crops(options)


def test_options_are_used() -> None:
    crops = build_crops({"scale": [0.5, 1], "flip": 1, "max_jitter": 0.1})
    assert (tuple(crops.scale), crops.flip, crops.jitter) == ((0.5, 1), 1, 0.5)
