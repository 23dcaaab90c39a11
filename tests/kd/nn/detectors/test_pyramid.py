"""Pyramids of trunks: which levels there are, what is cut off, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kd.errors import ConfigError, UserError
from kd.nn.detectors.pyramid import PyramidOptions, anchors_of, build_pyramid
from kd.nn.freeze import FrozenBatchNorm
from kd.nn.networks import DETECTORS
from kd.registry import build

PLAIN: dict[str, Any] = {
    "trunk": "resnet18", "weights": None, "width": 1.0, "until": None, "frozen": None,
    "batch_norm_frozen": False, "levels": (2, 3, 4, 5, 6), "channels": 16,
}  # fmt: skip


def pyramid(**options: Any) -> Any:
    return build_pyramid("fcos", 3, PyramidOptions(**(PLAIN | options)))


@pytest.mark.parametrize(
    ("trunk", "levels", "strides"),
    [
        ("resnet18", (2, 3, 4, 5, 6), (4, 8, 16, 32, 64)),
        ("resnet18", (3, 4, 5, 6, 7), (8, 16, 32, 64, 128)),
        ("resnet18", (1, 2), (2, 4)),
        ("mobilenet_v2", (3, 4), (8, 16)),
        ("vgg11_bn", (4,), (16,)),
        ("swin_t", (2, 3, 4, 5), (4, 8, 16, 32)),
        ("timm/resnet10t", (3, 4), (8, 16)),
        ("vit_b_16", (4, 5), (16, 32)),
    ],
)
def test_maps_have_the_strides_of_their_levels(
    trunk: str, levels: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        model = pyramid(trunk=trunk, levels=levels).eval()
        maps = list(model(torch.empty(2, 3, 256, 128)).values())
    assert model.strides == strides
    assert [tuple(one.shape) for one in maps] == [(2, 16, 256 // s, 128 // s) for s in strides]


def test_a_single_map_of_stride_16_does_without_the_trunk_s_last_steps() -> None:
    with torch.device("meta"):
        model = pyramid(levels=(4,))
    assert [path for path, _ in model.body.steps()][-1] == "layer3"
    assert not any("layer4" in path for path, _ in model.named_parameters())


def test_half_of_the_width_is_a_quarter_of_the_trunk() -> None:
    with torch.device("meta"):
        whole, half = (pyramid(trunk="resnet50", width=width).body for width in (1.0, 0.5))
    assert half.level_channels == tuple(one // 2 for one in whole.level_channels)
    fraction = sum(one.numel() for one in half.parameters()) / sum(
        one.numel() for one in whole.parameters()
    )
    assert 0.24 < fraction < 0.27


def test_steps_and_batch_norms_freeze() -> None:
    model = pyramid(frozen="layer1", batch_norm_frozen=True).train()
    learns = {path for path, one in model.body.named_parameters() if one.requires_grad}
    assert {path.partition(".")[0] for path in learns} == {"layer2", "layer3", "layer4"}
    norms = [one for one in model.body.modules() if isinstance(one, nn.BatchNorm2d)]
    assert norms and all(isinstance(one, FrozenBatchNorm) and not one.training for one in norms)
    assert not any(one.requires_grad for one in pyramid(frozen="all").body.parameters())


def test_what_cannot_be_had_is_named() -> None:
    for options, said in (
        ({"levels": (2, 4)}, r"levels must be consecutive, got \[2, 4\]"),
        ({"levels": ()}, "levels must be consecutive"),
        ({"levels": (0, 1)}, r"resnet18 cannot give levels \[0, 1\]: it has levels 1, 2, 3, 4, 5,"),
        ({"levels": (4, 5, 6, 7, 8)}, "one or two more can be added after the last"),
        ({"trunk": "vit_b_16"}, r"vit_b_16 cannot give .*: it has levels 4,"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"frozen": "layer9"}, "no step 'layer9'"),
    ):
        with torch.device("meta"), pytest.raises(UserError, match=said):
            pyramid(**options)


def test_anchors_follow_the_strides() -> None:
    levels = anchors_of("fcos", (4, 8), scales=(8, 2.6), ratios=(1, 4)).levels()
    # Sides of the square ones are whole pixels; halves of all are rounded to even.
    assert levels[0].sides == ((32.0, 32.0), (10.0, 10.0), (16.0, 64.0), (4.0, 20.0))
    assert levels[1].sides == ((64.0, 64.0), (20.0, 20.0), (32.0, 128.0), (10.0, 40.0))
    assert [one.offset for one in levels] == [0.0, 0.0]


def test_anchors_without_an_area_are_refused() -> None:
    for scales, ratios, said in (
        ((0.2,), (1,), "at a stride of 4, scales"),
        ((0.5,), (8,), "round to no area"),
        ((), (1,), r"scales must be above 0 each, got \[\]"),
        ((8,), (0.0,), r"ratios must be above 0 each"),
    ):
        with pytest.raises(UserError, match=said):
            anchors_of("retinanet", (4, 8), scales=scales, ratios=ratios)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fasterrcnn", {"proposals": (0, 10)}, "proposals must be two numbers above 0"),
        ("fasterrcnn", {"candidates": (10,)}, "candidates must be two numbers above 0"),
        ("fasterrcnn", {"sampled_regions": 1}, "sampled_regions must be at least 2"),
        ("fasterrcnn", {"hidden": 0}, "hidden must be at least 1"),
        ("retinanet", {"top": 0}, "top must be at least 1"),
        ("fcos", {"channels": 48}, "channels must be 64 or a higher multiple of 32"),
        ("fcos", {"channels": 32}, "channels must be 64 or a higher multiple of 32"),
        ("fcos", {"radius": 0.0}, "radius above 0"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=said):
        build(DETECTORS, name, options, what="student", num_classes=3)


def test_an_unknown_option_and_a_wrong_type_are_named_together() -> None:
    options = {"chanels": 3, "top": "all"}
    with pytest.raises(ConfigError) as caught:
        build(DETECTORS, "fcos_resnet18", options, what="student", num_classes=3)
    message = str(caught.value)
    assert "unknown option 'chanels'" in message and "'top' must be a valid integer" in message
