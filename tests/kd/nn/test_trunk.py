"""Torchvision classifiers as feature trunks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from kd.errors import UserError
from kd.nn.freeze import FrozenBatchNorm, freeze, freeze_batch_norm
from kd.nn.trunk import build_trunk
from kd.nn.weights import _modern

SMALL = {
    "mobilenet_v3_small": (576, 32),
    "resnet18": (512, 32),
    "shufflenet_v2_x0_5": (1024, 32),
    "squeezenet1_1": (512, 16),
}
# The other families go through the students' contract.
LARGE = {
    "alexnet": (256, 32),
    "densenet121": (1024, 32),
    "inception_v3": (2048, 32),
    "swin_v2_t": (768, 32),
}
FAMILIES = [
    *[pytest.param(name, *shape) for name, shape in SMALL.items()],
    *[pytest.param(name, *shape, marks=pytest.mark.slow) for name, shape in LARGE.items()],
]


@pytest.mark.parametrize(("name", "channels", "stride"), FAMILIES)
def test_a_trunk_knows_its_channels_and_stride(name: str, channels: int, stride: int) -> None:
    trunk = build_trunk(name).eval()
    assert (trunk.channels, trunk.stride) == (channels, stride)
    images = torch.randn(1, 3, 97, 129)
    with torch.no_grad():
        features, levels = trunk(images), trunk.forward_levels(images)
    assert features.shape[:2] == (1, channels)
    for side, pixels in zip(features.shape[2:], images.shape[2:], strict=True):
        assert abs(side - pixels / stride) <= 2.1  # stems without padding lose some
    torch.testing.assert_close(levels[-1], features)
    assert [one.shape[1] for one in levels] == list(trunk.level_channels)
    assert trunk.level_strides == tuple(sorted(trunk.level_strides))
    for one, level_stride in zip(levels, trunk.level_strides, strict=True):
        assert abs(one.shape[3] - 129 / level_stride) <= 5


@pytest.mark.parametrize("name", ["resnet18", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_a_trunk_computes_what_torchvision_pools(name: str) -> None:
    classifier = models.get_model(name, weights=None).eval()
    trunk = build_trunk(name).eval()
    state = {
        key: value
        for key, value in classifier.state_dict().items()
        if not key.startswith(("fc.", "classifier."))
    }
    trunk.load_state_dict(state)
    head = classifier.fc if name == "resnet18" else classifier.classifier
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(head(trunk(images).mean(dim=(2, 3))), classifier(images))


@pytest.mark.slow
def test_a_transformers_trunk_ends_in_the_tokens_that_torchvision_computes() -> None:
    classifier = models.get_model("vit_b_32", weights=None).eval()
    trunk = build_trunk("vit_b_32").eval()
    state = {k: v for k, v in classifier.state_dict().items() if not k.startswith("heads.")}
    trunk.load_state_dict(state)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = classifier.conv_proj(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([classifier.class_token, tokens], dim=1)
        expected = classifier.encoder(tokens)[0, 1:].T.unflatten(1, (7, 7))
        torch.testing.assert_close(trunk(images)[0], expected)
        assert trunk(images[:, :, :64, :96]).shape == (1, 768, 2, 3)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_from_torchvisions_files_head_or_not(tmp_path: Path, suffix: str) -> None:
    classifier = models.get_model("shufflenet_v2_x0_5", weights=None)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": classifier.state_dict()}, path)
    else:
        save_file({k: v.clone() for k, v in classifier.state_dict().items()}, path)
    trunk = build_trunk("shufflenet_v2_x0_5", weights=str(path))
    torch.testing.assert_close(trunk.state_dict()["conv5.0.weight"], classifier.conv5[0].weight)


def test_the_names_in_old_densenet_files_are_understood() -> None:
    new = "features.denseblock1.denselayer1.norm1.weight"
    assert _modern("features.denseblock1.denselayer1.norm.1.weight") == new
    assert _modern(new) == new


def test_the_real_mobilenet_file_loads(shared_data: Path) -> None:
    path = shared_data / "weights" / "mobilenet_v2_features.pth"
    if not path.is_file():
        pytest.skip(f"no {path}")
    trunk = build_trunk("mobilenet_v2", weights=str(path)).eval()
    with torch.no_grad():
        assert trunk(torch.zeros(1, 3, 64, 64)).shape == (1, 1280, 2, 2)


def test_a_file_of_another_model_names_file_and_keys(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(build_trunk("squeezenet1_1").state_dict(), path)
    with pytest.raises(
        UserError, match=r"other\.pth does not fit resnet18: missing conv1.weight"
    ) as e:
        build_trunk("resnet18", weights=str(path))
    assert "unexpected features.0.weight" in str(e.value)


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "thin.pth"
    state = build_trunk("squeezenet1_1").state_dict()
    state["features.0.weight"] = torch.zeros(1, 3, 3, 3)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"features\.0\.weight \(1, 3, 3, 3\) for \(64, 3, 3, 3\)"):
        build_trunk("squeezenet1_1", weights=str(path))


class Harm:
    """Would run on unpickling."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.mkdir, (Path("harm"),))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["missing", "cut", "code", "number", "safetensors"])
def test_files_that_are_no_weights_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "cut":
        torch.save(nn.Linear(9, 9).state_dict(), path)
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "code":
        torch.save({"conv1.weight": Harm()}, path)
    elif kind == "number":
        torch.save({"epoch": 3}, path)
    elif kind == "safetensors":
        path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"weights file .*weights"):
        build_trunk("squeezenet1_1", weights=str(path))


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown torchvision classifier 'resnet17'.*'resnet18'"):
        build_trunk("resnet17")
    with pytest.raises(UserError, match="one input size only"):
        build_trunk("maxvit_t")


@pytest.mark.parametrize("in_channels", [1, 4])
def test_other_numbers_of_input_channels_start_out_as_rgb(tmp_path: Path, in_channels: int) -> None:
    path = tmp_path / "weights.pth"
    original = build_trunk("squeezenet1_1").eval()
    torch.save(original.state_dict(), path)
    trunk = build_trunk("squeezenet1_1", weights=str(path), in_channels=in_channels).eval()
    grey = torch.randn(1, 1, 64, 64).expand(-1, in_channels, -1, -1)
    with torch.no_grad():
        expected = original(grey[:, :1].expand(-1, 3, -1, -1))
        torch.testing.assert_close(trunk(grey), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "stride"), [("resnet18", 8), ("shufflenet_v2_x0_5", 16), ("mobilenet_v3_small", 16)]
)
def test_a_kept_stride_gives_a_finer_grid_from_the_same_weights(name: str, stride: int) -> None:
    trunk = build_trunk(name, stride=stride).eval()
    assert trunk.stride == stride
    trunk.load_state_dict(build_trunk(name).state_dict())
    with torch.no_grad():
        assert trunk(torch.randn(1, 3, 64, 64)).shape[2:] == (64 // stride, 64 // stride)


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("resnet50", "regnet_x_400mf")),
    ],
)
def test_a_dilated_trunk_gives_the_published_map_at_the_published_places(
    name: str, stride: int
) -> None:
    published = build_trunk(name).eval()
    dilated = build_trunk(name, stride=stride, dilate=True).eval()
    dilated.load_state_dict(published.state_dict())
    images, every = torch.randn(1, 3, 64, 96), 32 // stride
    with torch.no_grad():
        expected, found = published(images), dilated(images)
    assert found.shape[2:] == (64 // stride, 96 // stride)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found[..., ::every, ::every], expected, rtol=0, atol=1e-5 * scale)


def test_a_dilated_resnet_is_torchvisions() -> None:
    ours = build_trunk("resnet50", stride=8, dilate=True)
    known = models.resnet50(replace_stride_with_dilation=[False, True, True])
    for path, module in known.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            own = ours.get_submodule(path)
            assert isinstance(own, torch.nn.Conv2d)
            assert (own.stride, own.dilation) == (module.stride, module.dilation), path


@pytest.mark.slow
def test_convolutions_after_a_dropped_pooling_are_dilated() -> None:
    trunk = build_trunk("vgg11_bn", stride=8, dilate=True)
    convs = [m for m in trunk.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.dilation[0] for m in convs] == [1, 1, 1, 1, 1, 1, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stride"), [("densenet121", 16), ("vgg11", 8)])
def test_pooling_of_windows_side_by_side_is_left_out(name: str, stride: int) -> None:
    plain, fine = build_trunk(name), build_trunk(name, stride=stride)
    assert fine.stride == stride and fine.channels == plain.channels
    fine.load_state_dict(plain.state_dict())  # no weight is lost
    with torch.no_grad():
        assert fine.eval()(torch.randn(1, 3, 64, 64)).shape[2:] == (64 // stride, 64 // stride)


@pytest.mark.parametrize(
    ("name", "until", "shape"),
    [("resnet18", "layer2", (128, 8)), ("mobilenet_v3_small", "features.3", (24, 8))],
)
def test_a_cut_trunk_ends_in_what_its_last_step_gives(
    name: str, until: str, shape: tuple[int, int]
) -> None:
    whole = build_trunk(name).eval()
    short = build_trunk(name, until=until).eval()
    assert (short.channels, short.stride) == shape
    short.load_state_dict({key: whole.state_dict()[key] for key in short.state_dict()})
    kept: list[torch.Tensor] = []
    whole.get_submodule(until).register_forward_hook(lambda *args: kept.append(args[2]))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        whole(images)
        torch.testing.assert_close(short(images), kept[0])


def test_an_unknown_last_step_is_named() -> None:
    with pytest.raises(UserError, match="resnet18 has no step 'layer5'; did you mean 'layer4'"):
        build_trunk("resnet18", until="layer5")


def test_a_stride_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(UserError, match="resnet18: stride must be one of 2, 4, 8, 16, 32, got 12"):
        build_trunk("resnet18", stride=12)
    with pytest.raises(UserError, match=r"squeezenet1_1: cannot keep stride 8.*MaxPool2d"):
        build_trunk("squeezenet1_1", stride=8)


def test_a_deep_copy_is_a_trunk_of_its_own() -> None:
    trunk = build_trunk("resnet18").eval()
    copied = copy.deepcopy(trunk)
    nn.init.zeros_(copied.get_parameter("conv1.weight"))
    images = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        assert not torch.equal(copied(images), trunk(images))


def test_frozen_batch_norm_keeps_its_statistics_in_training() -> None:
    trunk = build_trunk("resnet18")
    state = copy.deepcopy(trunk.state_dict())
    freeze_batch_norm(trunk)
    trunk.train()(torch.randn(2, 3, 32, 32))
    assert list(trunk.state_dict()) == list(state)
    for key, value in trunk.state_dict().items():
        torch.testing.assert_close(value, state[key])
    assert not trunk.get_parameter("bn1.weight").requires_grad
    assert trunk.get_parameter("conv1.weight").requires_grad


def test_freezing_stops_at_the_named_step() -> None:
    trunk = build_trunk("resnet18")
    freeze(trunk, "layer2")
    assert isinstance(trunk.bn1, FrozenBatchNorm)
    assert not trunk.get_parameter("layer2.1.conv2.weight").requires_grad
    assert trunk.get_parameter("layer3.0.conv1.weight").requires_grad
    assert not isinstance(trunk.get_submodule("layer3.0.bn1"), FrozenBatchNorm)
    freeze(trunk, "all")
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    with pytest.raises(UserError, match=r"resnet18 has no step 'layer9' to freeze; did you mean"):
        freeze(trunk, "layer9")
