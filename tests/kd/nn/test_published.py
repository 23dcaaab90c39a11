"""torchvision's segmentation networks: the same numbers, on their own grids."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import models

from kd.errors import UserError
from kd.nn.segmentation import NAMES, torchvision_net
from kd.nn.trunk import build_trunk

LIGHT = ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]
MOBILE = "deeplabv3_mobilenet_v3_large"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download that nobody asked for")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)


def test_all_of_torchvisions_families_are_known() -> None:
    assert {name.partition("_")[0] for name in NAMES} == {"deeplabv3", "fcn", "lraspp"}


@pytest.mark.parametrize("name", [*LIGHT, pytest.param("fcn_resnet50", marks=pytest.mark.slow)])
def test_up_sampled_logits_are_torchvisions(name: str, tmp_path: Path) -> None:
    network = models.get_model(name, weights=None, weights_backbone=None, num_classes=4).eval()
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    model = torchvision_net(4, name=name, file=str(tmp_path / "whole.pth")).eval()
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        logits = F.interpolate(model(images)["logits"], (65, 97), mode="bilinear")
        torch.testing.assert_close(logits, network(images)["out"], rtol=0, atol=0)


def test_the_auxiliary_head_is_torchvisions(tmp_path: Path) -> None:
    network = models.get_model(MOBILE, weights=None, weights_backbone=None, aux_loss=True)
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    model = torchvision_net(21, auxiliary=True, file=str(tmp_path / "whole.pth"))
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 96))["auxiliary"].shape == (2, 21, 8, 12)
    with pytest.raises(UserError, match=r"whole\.pth does not fit .*: unexpected aux_classifier"):
        torchvision_net(21, file=str(tmp_path / "whole.pth"))


@pytest.mark.parametrize("name", LIGHT)
def test_a_backbone_starts_from_a_classifiers_file(name: str, tmp_path: Path) -> None:
    classifier = models.mobilenet_v3_large(weights=None)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    model = torchvision_net(3, name=name, weights=str(tmp_path / "classifier.pth"))
    expected = classifier.features.state_dict()
    found = model.backbone.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_imagenet_weights_are_those_of_the_backbones_name(monkeypatch: pytest.MonkeyPatch) -> None:
    state: dict[str, Tensor] = models.mobilenet_v3_large(weights=None).state_dict()
    asked: list[str] = []

    def weights_of(name: str) -> dict[str, object]:
        def get_state_dict(**_: object) -> dict[str, Tensor]:
            asked.append(name)
            return state

        return {"DEFAULT": SimpleNamespace(get_state_dict=get_state_dict)}

    monkeypatch.setattr(models, "get_model_weights", weights_of)
    model = torchvision_net(3, weights="imagenet")
    assert asked == ["mobilenet_v3_large"]
    key = "0.0.weight"
    assert torch.equal(model.backbone.state_dict()[key], state[f"features.{key}"])


def test_a_whole_file_makes_the_backbones_weights_needless(tmp_path: Path) -> None:
    stored = torchvision_net(3).state_dict()
    torch.save(stored, tmp_path / "whole.pth")
    model = torchvision_net(3, weights="imagenet", file=str(tmp_path / "whole.pth"))  # no download
    found = model.state_dict()
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], value) for name, value in stored.items())


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown torchvision segmentation network 'deeplab'"):
        torchvision_net(3, name="deeplab")
    with pytest.raises(UserError, match="lraspp_mobilenet_v3_large has no auxiliary classifier"):
        torchvision_net(3, name="lraspp_mobilenet_v3_large", auxiliary=True)
    torch.save(build_trunk("resnet18").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="does not fit the backbone mobilenet_v3_large: missing"):
        torchvision_net(3, weights=str(tmp_path / "resnet.pth"))
    with pytest.raises(UserError, match=r"weights file none\.pth does not exist"):
        torchvision_net(3, weights="none.pth")
