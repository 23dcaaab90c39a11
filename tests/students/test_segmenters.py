"""The contract of the networks for semantic segmentation, as students and as teachers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import students
import teachers
from kd.errors import ConfigError, UserError
from kd.nn.networks import SEGMENTERS
from kd.registry import build

CLASSES = 5
# Name -> stride as the options leave it; slow ones apart.
QUICK = {
    "espnet": 1,
    "espnet_c": 8,
    "pspnet": 8,
    "lraspp_mobilenet_v3_large": 8,
    "deeplabv3_mobilenet_v3_large": 16,
}
SLOW = {"deeplabv3_resnet50": 8, "fcn_resnet50": 8}
# The same with a deeper trunk.
DEEP = {"deeplabv3_resnet101": 8, "fcn_resnet101": 8}
SMALL: dict[str, dict[str, object]] = {
    "espnet": {"shallow": 1, "deep": 1},
    "espnet_c": {"shallow": 1, "deep": 1},
    "pspnet": {"trunk": "shufflenet_v2_x0_5"},
}
WITH_AUXILIARY = ("pspnet", "deeplabv3_mobilenet_v3_large", *SLOW)
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def make(name: str, /, **options: object) -> nn.Module:
    chosen = SMALL.get(name, {}) | options
    built: nn.Module = build(SEGMENTERS, name, chosen, what="student", num_classes=CLASSES)
    return built


def pictures(height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(2, 3, height, width)


def test_every_network_is_in_the_contract_and_in_both_registries() -> None:
    assert SEGMENTERS.keys() == QUICK.keys() | SLOW.keys() | DEEP.keys()
    assert SEGMENTERS.keys() <= students.STUDENTS.keys()
    assert SEGMENTERS.keys() <= teachers.TEACHERS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_logits_lie_on_the_grid_that_the_stride_says(name: str) -> None:
    model = make(name).eval()
    assert model.stride == {**QUICK, **SLOW}[name]
    for height, width in ((64, 96), (37, 51)):
        with torch.no_grad():
            output = model(pictures(height, width))
        assert list(output) == ["logits"]
        grid = (-(-height // model.stride), -(-width // model.stride))
        assert output["logits"].shape == (2, CLASSES, *grid)
        assert output["logits"].isfinite().all()


@pytest.mark.parametrize(
    ("trunk", "stride"),
    [
        ("resnet18", 8),
        ("resnet18", 16),
        ("mobilenet_v2", 8),
        ("mobilenet_v2", 16),
        ("timm/resnet10t", 8),
        ("timm/mobilenetv3_small_050", 16),
    ],
)
def test_a_pspnet_keeps_the_stride_that_it_is_told(trunk: str, stride: int) -> None:
    model = make("pspnet", trunk=trunk, stride=stride).eval()
    assert model.stride == stride
    with torch.no_grad():
        logits = model(pictures())["logits"]
    assert logits.shape == (2, CLASSES, 64 // stride, 96 // stride)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_deep_networks_have_the_same_grid_without_running_them(name: str) -> None:
    with torch.device("meta"):
        model = make(name).eval()
        logits = model(torch.empty(1, 3, 64, 96))["logits"]
    assert logits.shape == (1, CLASSES, 64 // DEEP[name], 96 // DEEP[name])
    assert model.stride == DEEP[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    options = {"auxiliary": True} if name in WITH_AUXILIARY else {}
    model = make(name, **options).train()
    output = model(pictures())
    assert list(output) == ["logits", "auxiliary"][: 1 + (name in WITH_AUXILIARY)]
    sum(one.square().mean() for one in output.values()).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), path
        assert parameter.grad.count_nonzero() > 0, path


@pytest.mark.parametrize("name", [name for name in NAMES if name in WITH_AUXILIARY])
def test_the_auxiliary_output_is_there_in_training_only_and_only_if_asked_for(name: str) -> None:
    learns, plain = make(name, auxiliary=True), make(name, auxiliary=False)
    with torch.no_grad():
        assert learns.train()(pictures())["auxiliary"].shape[:2] == (2, CLASSES)
        assert list(learns.eval()(pictures())) == ["logits"]
        assert list(plain.train()(pictures())) == ["logits"]


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_saved_network_comes_back_from_its_file(name: str, kind: str, tmp_path: Path) -> None:
    first, images = make(name).eval(), pictures()
    file = tmp_path / f"model.{kind}"
    save: Callable[..., None] = save_file if kind == "safetensors" else torch.save
    save(first.state_dict(), file)
    second = make(name, file=str(file)).eval()
    with torch.no_grad():
        expected = first(images)["logits"]
        torch.testing.assert_close(second(images)["logits"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", QUICK)
def test_a_file_of_other_classes_is_refused(name: str, tmp_path: Path) -> None:
    torch.save(make(name).state_dict(), tmp_path / "five.pth")
    options = {**SMALL.get(name, {}), "file": str(tmp_path / "five.pth")}
    with pytest.raises(UserError) as caught:
        build(SEGMENTERS, name, options, what="student", num_classes=7)
    message = str(caught.value)
    assert f"five.pth does not fit {name}" in message
    assert "classifier" in message and "(5, " in message and "(7, " in message
    assert "the file has 5 classes, the network 7" in message


@pytest.mark.parametrize("name", QUICK)
def test_a_file_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(UserError, match=r"weights file nowhere\.pth does not exist"):
        make(name, file="nowhere.pth")


@pytest.mark.parametrize("name", QUICK)
def test_a_networks_unknown_option_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"student '{name}': unknown option 'fiel'"):
        make(name, fiel="model.safetensors")
