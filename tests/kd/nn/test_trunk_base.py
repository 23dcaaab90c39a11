"""A teacher's own trunk: its maps are the teacher's where nothing is hidden; it freezes whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kd.errors import UserError
from kd.nn.multi_stride_trunk import RememberedTrunk, levelled
from kd.nn.trunk_base import LUMA, BlindTrunk
from teachers import TEACHERS
from teachers.cnn import cnn
from teachers.resnet_multilabel import resnet_multilabel
from teachers.scene_transformer import scene_transformer
from teachers.unet import unet

SMALL: dict[str, dict[str, object]] = {
    "unet": {"width": 4, "depth": 2},
    "cnn": {"width": 4, "downs": 2, "patch": 2, "hidden": 8},
    "unet_ffc": {"width": 8, "depth": 2},
    "resnet_pixel": {"name": "shufflenet_v2_x0_5", "until": None},
    "resnet_multilabel": {"name": "shufflenet_v2_x0_5"},
    "trunk": {"name": "shufflenet_v2_x0_5"},
    "patches": {"pixels": "patches", "width": 16, "depth": 1},
    "tokens": {"pixels": "trunk", "trunk": "shufflenet_v2_x0_5", "width": 16, "depth": 1},
}
TOKENS = ("patches", "tokens")


def test_the_maps_are_the_teachers_where_nothing_is_hidden() -> None:
    teacher = cnn(3, width=4, downs=2, patch=2, hidden=8).eval()
    images = torch.randn(2, 3, 37, 51)
    with_region = torch.cat([images, torch.zeros(2, 1, 37, 51)], dim=1)
    trunk = teacher.scene_trunk()
    with torch.no_grad():
        torch.testing.assert_close(trunk(images), teacher.features(with_region), rtol=0, atol=0)
        levels = trunk.forward_levels(images)
        torch.testing.assert_close(levels[0], teacher.features[0](with_region), rtol=0, atol=0)


@pytest.mark.parametrize("up", ["transposed", "bilinear"])
def test_the_falling_half_of_a_unet_ends_in_its_bottleneck(up: str) -> None:
    teacher = unet(3, width=4, depth=2, up=up).eval()  # type: ignore[arg-type]
    seen = []
    teacher.bottleneck.register_forward_hook(lambda _, inputs, output: seen.append(output))
    images = torch.randn(1, 3, 32, 48)
    trunk = teacher.scene_trunk()
    with torch.no_grad():
        teacher(torch.cat([images, torch.zeros(1, 1, 32, 48)], dim=1))
        torch.testing.assert_close(trunk(images), seen[0], rtol=0, atol=0)
    assert (trunk.channels, trunk.stride) == (seen[0].shape[1], 4)


@pytest.mark.parametrize("name", SMALL)
def test_channels_and_strides_are_what_a_teachers_trunk_gives(name: str) -> None:
    teacher = TEACHERS["scene_transformer" if name in TOKENS else name].load()(3, **SMALL[name])
    trunk = teacher.scene_trunk().eval()
    with torch.no_grad():
        levels = trunk.forward_levels(torch.randn(2, 3, 64, 96))
    assert [one.shape[1] for one in levels] == list(trunk.level_channels)
    expected = [(64 // stride, 96 // stride) for stride in trunk.level_strides]
    assert [tuple(one.shape[2:]) for one in levels] == expected
    assert (trunk.channels, trunk.stride) == (trunk.level_channels[-1], trunk.level_strides[-1])


def test_every_context_teacher_that_sees_images_has_a_trunk() -> None:
    context = {name for name, one in TEACHERS.items() if one.problem == "objects"}
    families = {"timm/NAME", "torchvision/NAME"}
    assert context - SMALL.keys() - families == {"scene_transformer", "cooccurrence", "prior"}


def test_a_grey_teachers_trunk_sees_luma() -> None:
    teacher = resnet_multilabel(3, name="shufflenet_v2_x0_5").eval()
    images = torch.randn(1, 3, 64, 64)
    grey = (images * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    with torch.no_grad():
        expected = teacher.trunk(torch.cat([grey, torch.zeros_like(grey)], dim=1))
        torch.testing.assert_close(teacher.scene_trunk()(images), expected)


def test_a_teacher_of_annotations_alone_has_none() -> None:
    with pytest.raises(UserError, match="without pixels there is no trunk"):
        scene_transformer(3, width=16, depth=1).scene_trunk()


def test_steps_of_one_stride_are_one_level_and_what_is_seen_can_be_changed() -> None:
    first, second = nn.Conv2d(2, 5, 1), nn.Conv2d(5, 6, 1)
    trunk = BlindTrunk("grey", [(first, 5, 1), (second, 6, 1)], see=lambda images: images[:, 2:])
    images = torch.randn(1, 3, 4, 4)
    seen = torch.cat([images[:, 2:], torch.zeros(1, 1, 4, 4)], dim=1)
    torch.testing.assert_close(trunk(images), second(first(seen)))
    assert trunk.level_channels == (6,)
    assert [path for path, _ in trunk.steps()] == ["path.0", "path.1"]


def test_a_frozen_one_stays_as_it_is_in_training() -> None:
    trunk = levelled(cnn(3, width=4, downs=1, hidden=8).scene_trunk(), levels=2, frozen="all")
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    before = copy.deepcopy(trunk.state_dict())
    first = trunk.train()(torch.randn(4, 3, 16, 16))
    assert len(first) == 2
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_part_can_be_frozen() -> None:
    trunk = levelled(cnn(3, width=4, downs=1, hidden=8).scene_trunk(), frozen="path.0").trunk
    learns = {name: parameter.requires_grad for name, parameter in trunk.named_parameters()}
    assert {name.split(".")[1] for name, learned in learns.items() if learned} == {"1"}


def test_a_frozen_ones_maps_are_remembered() -> None:
    teacher = cnn(3, width=4, downs=1, hidden=8)
    plain = levelled(teacher.scene_trunk(), frozen="all").eval()
    kept = levelled(copy.deepcopy(teacher).scene_trunk(), frozen="all", remember=True)
    assert isinstance(kept, RememberedTrunk)
    images = torch.randn(2, 3, 16, 16)
    for _ in range(2):
        torch.testing.assert_close(kept(images)[0], plain(images)[0], rtol=1e-3, atol=1e-3)
