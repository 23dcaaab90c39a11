"""PSPNet: its published sizes, its pyramid, its trunks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd.errors import UserError
from kd.nn.segmentation import PyramidPooling, pspnet

QUICK = "shufflenet_v2_x0_5"


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("trunk", "millions"), [("resnet101", 70.4), ("resnet18", 13.1)])
def test_the_published_sizes(trunk: str, millions: float) -> None:
    with torch.device("meta"):
        assert count(pspnet(19, trunk=trunk)) / 1e6 == pytest.approx(millions, rel=0.03)


def test_half_the_width_has_a_quarter_of_the_weights_and_the_same_grid() -> None:
    whole, half = pspnet(5), pspnet(5, width=0.5)
    assert count(half) / count(whole) == pytest.approx(0.25, abs=0.005)
    assert (half.trunk.channels, half.stride) == (256, 8)
    with torch.no_grad():
        output = half(torch.randn(2, 3, 64, 96))
    assert {name: one.shape for name, one in output.items()} == {
        "logits": (2, 5, 8, 12),
        "auxiliary": (2, 5, 8, 12),
    }


def test_a_pyramid_joins_the_map_with_means_of_its_parts() -> None:
    pyramid = PyramidPooling(1, 1, bins=(1, 2), dropout=0.0).eval()
    pyramid.join = nn.Sequential()
    for stage in pyramid.stages:
        for part in range(1, len(stage)):  # type: ignore[arg-type]
            stage[part] = nn.Identity()  # type: ignore[operator]
    maps = torch.tensor([[1.0, 1, 3, 3], [1, 1, 3, 3], [5, 5, 7, 7], [5, 5, 7, 7]])[None, None]
    joined = pyramid(maps)
    assert joined.shape == (1, 3, 4, 4)
    assert torch.equal(joined[:, :1], maps)
    assert (joined[:, 1] == 4).all()
    # Corners of the grid of two lie outside of its centres, which up-sampling extends.
    assert joined[0, 2, ::3, ::3].tolist() == [[1, 3], [5, 7]]


@pytest.mark.parametrize(
    ("trunk", "tap"), [("resnet18", "layer3"), (QUICK, "stage3"), ("mobilenet_v2", "features.13")]
)
def test_the_auxiliary_classifier_sees_the_map_before_the_last_grid(trunk: str, tap: str) -> None:
    assert pspnet(3, trunk=trunk).tap == tap


@pytest.mark.parametrize(
    ("trunk", "stride"), [("densenet121", 16), ("swin_t", 32), ("googlenet", 32)]
)
@pytest.mark.slow
def test_a_trunk_of_any_layout_will_do(trunk: str, stride: int) -> None:
    model = pspnet(3, trunk=trunk, stride=stride, dropout=0.0)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        output = model(images)
        assert output["logits"].shape == (2, 3, 64 // stride, 96 // stride)
        assert output["auxiliary"].shape[:2] == (2, 3)
        model.eval()
        _, last = model.trunk.forward_at(images, (model.tap, model.last))
        torch.testing.assert_close(last, model.trunk(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": []}, r"pspnet: bins must be 1 or more each, got \[\]"),
        ({"bins": [1, 0]}, r"pspnet: bins must be 1 or more each, got \[1, 0\]"),
        ({"dropout": 1.0}, r"pspnet: dropout must be in \[0, 1\), got 1"),
        ({"trunk": "resnet19"}, "unknown torchvision classifier 'resnet19'; did you mean"),
        ({"stride": 12}, "resnet18: stride must be one of 2, 4, 8, 16, 32, got 12"),
        ({"width": 0.3}, r"resnet18: width 0\.3 leaves 19\.2 of 64 channels"),
        ({"width": 0.5, "weights": "w.pth"}, "weights are for the full width; leave out width 0.5"),
        ({"weights": "w.pth"}, r"weights file w\.pth does not exist"),
        pytest.param(
            {"trunk": "vit_b_32", "stride": 32},
            "vit_b_32 has feature maps of one stride only",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pspnet(3, **options)
