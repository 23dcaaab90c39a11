"""timm's models as feature trunks: shapes, steps, weights, input channels, messages."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from kd.errors import UserError
from kd.nn.freeze import FrozenBatchNorm, freeze, freeze_batch_norm
from kd.nn.inference import for_answers
from kd.nn.trunk import build_trunk
from kd.nn.trunk_base import Trunk
from kd.transforms.hide import IMAGENET_MEAN, IMAGENET_STD

CASES = [
    ("timm/resnet10t", (64, 64, 128, 256, 512), (2, 4, 8, 16, 32)),
    ("timm/mobilenetv3_small_050", (16, 8, 16, 24, 288), (2, 4, 8, 16, 32)),
    ("timm/test_efficientnet", (16, 24, 32, 48, 64), (2, 4, 8, 16, 32)),
    ("timm/test_convnext", (24, 32, 48, 64), (4, 8, 16, 32)),
    ("timm/test_vit", (64,), (16,)),
]
SMALL = "timm/mobilenetv3_small_050"
NAMES = [name for name, *_ in CASES]


@pytest.mark.parametrize(("name", "channels", "strides"), CASES)
def test_a_trunk_knows_its_channels_and_strides(
    name: str, channels: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    trunk = build_trunk(name).eval()
    assert (trunk.level_channels, trunk.level_strides) == (channels, strides)
    assert (trunk.channels, trunk.stride) == (channels[-1], strides[-1])
    images = torch.randn(1, 3, 97, 129)
    with torch.no_grad():
        levels = trunk.forward_levels(images)
        assert torch.equal(trunk(images), levels[-1])
        last = [trunk.last_step(stride) for stride in strides]
        for one, again in zip(levels, trunk.forward_at(images, last), strict=True):
            assert torch.equal(one, again)
    for one, width, stride in zip(levels, channels, strides, strict=True):
        assert one.shape[1] == width
        for side, pixels in zip(one.shape[2:], images.shape[2:], strict=True):
            assert abs(side - pixels / stride) < 1.01


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns_from_the_last_map(name: str) -> None:
    trunk = build_trunk(name)
    trunk(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert [path for path, one in trunk.named_parameters() if one.grad is None] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_step_can_be_tapped_under_its_path(name: str) -> None:
    trunk = build_trunk(name).eval()
    paths = [path for path, _ in trunk.steps()]
    assert (
        set(path for path, _ in trunk.stages())
        <= set(paths)
        <= set(path for path, _ in trunk.named_modules())
    )


def test_it_computes_what_timm_does_with_images_normalised_as_the_model_was_trained() -> None:
    model: Any = timm.create_model("test_vit", dynamic_img_size=True).eval()
    trunk = build_trunk("timm/test_vit").eval()
    trunk.get_submodule("network.model").load_state_dict(model.state_dict(), strict=False)
    pixels = torch.rand(1, 3, 64, 96)
    cfg = model.pretrained_cfg
    ours = (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(
        3, 1, 1
    )
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert cfg["mean"] != IMAGENET_MEAN
    with torch.no_grad():
        expected = model.forward_features((pixels - mean) / std)[:, model.num_prefix_tokens :]
        found = trunk(ours)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-4)


def test_images_that_the_stride_does_not_divide_are_padded_where_a_model_needs_it() -> None:
    trunk = build_trunk("timm/test_vit").eval()
    images = torch.randn(1, 3, 40, 56)
    about: Any = timm.get_pretrained_cfg("test_vit")
    mean = torch.tensor(about.mean)  # of its weights
    colour = (mean - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    padded = colour.view(1, 3, 1, 1).expand(1, 3, 48, 64).clone()
    padded[:, :, :40, :56] = images
    with torch.no_grad():
        assert trunk(images).shape == (1, 64, 3, 4)
        torch.testing.assert_close(trunk(images), trunk(padded), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", ["timm/resnet10t", SMALL])
def test_a_kept_stride_dilates_and_keeps_the_weights(name: str, stride: int) -> None:
    published = build_trunk(name).eval()
    dilated = build_trunk(name, stride=stride).eval()
    dilated.load_state_dict(published.state_dict())
    assert dilated.stride == stride == dilated.level_strides[-1]
    assert len(dilated.stages()) == 5 and dilated.middle() == dilated.stages()[-2]
    with torch.no_grad():
        assert dilated(torch.randn(1, 3, 64, 96)).shape[2:] == (64 // stride, 96 // stride)


def test_a_cut_trunk_ends_in_what_its_last_step_gives() -> None:
    whole = build_trunk("timm/resnet10t").eval()
    short = copy.deepcopy(whole)
    short.cut("network.layer2")
    assert (short.channels, short.stride) == (128, 8)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (expected,) = whole.forward_at(images, ["network.layer2"])
        torch.testing.assert_close(short(images), expected)
    assert not any("layer3" in path for path in short.state_dict())
    assert build_trunk("timm/resnet10t", until="network.layer2").channels == 128
    with pytest.raises(UserError, match=r"has no step 'layer2'; did you mean 'network\.layer2'"):
        whole.cut("layer2")


def test_freezing_keeps_activations_inside_of_batch_norms() -> None:
    trunk = build_trunk("timm/test_efficientnet").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = trunk(images)
        freeze_batch_norm(trunk)
        torch.testing.assert_close(trunk.train()(images), expected, rtol=0, atol=0)
        torch.testing.assert_close(copy.deepcopy(trunk)(images), expected, rtol=0, atol=0)
    norms = [one for one in trunk.modules() if isinstance(one, nn.BatchNorm2d)]
    assert norms and all(isinstance(one, FrozenBatchNorm) for one in norms)


def test_folding_keeps_activations_inside_of_batch_norms() -> None:
    trunk = nn.Sequential(build_trunk("timm/test_efficientnet"))
    images = torch.randn(2, 3, 64, 64)
    trunk(images)
    with torch.no_grad():
        expected = trunk.eval()(images)
        torch.testing.assert_close(for_answers(trunk)(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_freezing_all_leaves_nothing_to_learn(name: str) -> None:
    trunk = build_trunk(name)
    freeze(trunk, next(iter(trunk.steps()))[0])
    assert any(parameter.requires_grad for parameter in trunk.parameters())
    freeze(trunk, "all")
    assert not any(parameter.requires_grad for parameter in trunk.parameters())


def same(first: Trunk, second: Trunk) -> bool:
    return all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


@pytest.mark.parametrize("name", [SMALL, "timm/test_convnext", "timm/test_vit"])
def test_weights_come_from_timms_files_and_from_runs(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name.removeprefix("timm/"))
    file = tmp_path / "timm.safetensors"
    save_file(model.state_dict(), file)
    trunk = build_trunk(name, weights=str(file))
    first = next(model.parameters())
    assert any(torch.equal(first, parameter) for parameter in trunk.parameters())
    inside = tmp_path / "run.safetensors"
    save_file({f"trunk.trunk.{k}": v for k, v in trunk.state_dict().items()}, inside)
    assert same(trunk, build_trunk(name, weights=str(inside)))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    with pytest.raises(UserError, match=r"other.* does not fit timm/mobilenetv3_small_050: miss"):
        build_trunk(SMALL, weights=str(file))


@pytest.mark.parametrize("name", [SMALL, "timm/resnet10t"])
def test_other_numbers_of_input_channels_start_out_as_rgb(name: str, tmp_path: Path) -> None:
    original = build_trunk(name).eval()
    file = tmp_path / "trunk.pth"
    torch.save(original.state_dict(), file)
    four = build_trunk(name, weights=str(file), in_channels=4).eval()
    grey = build_trunk(name, weights=str(file), in_channels=2, grey=True).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        extra = torch.cat([images, torch.randn(1, 1, 64, 64)], dim=1)
        torch.testing.assert_close(four(extra), original(images), rtol=1e-3, atol=1e-5)
        expected = original(images[:, :1].expand(-1, 3, -1, -1))
        torch.testing.assert_close(grey(images[:, :2]), expected, rtol=1e-3, atol=1e-5)
    assert build_trunk(name, in_channels=4)(torch.randn(2, 4, 64, 64)).shape[0] == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm/resnet11t", {}, "unknown timm model 'resnet11t'; did you mean .*'resnet10t'"),
        ("timm/resnet10t.nobody", {}, r"timm/resnet10t\.nobody cannot serve as a trunk: Invalid"),
        ("timm/levit_128s", {}, "levit_128s works at one input size only"),
        ("timm/test_vit", {"stride": 8}, "timm/test_vit: cannot keep stride 8"),
        (SMALL, {"width": 0.5}, "width is for torchvision's"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_trunk(name, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_downloaded_are_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("timm.models._builder.load_pretrained", unreachable)
    expected = (
        r"^weights: imagenet: timm's weights of timm/resnet10t cannot be downloaded \(no route to h"
    )
    with pytest.raises(UserError, match=expected) as caught:
        build_trunk("timm/resnet10t", weights="imagenet")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_timm_is_imported_only_for_its_models() -> None:
    code = "import sys, kd.nn.trunk as t; t.build_trunk('resnet18'); print('timm' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False"]
