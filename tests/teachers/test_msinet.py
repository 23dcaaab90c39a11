"""MSI-Net against its description: parameters, poolings, dilations, and the features it joins."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.nn.multi_stride_trunk import JoinedStages, StepPool
from kd.nn.saliency import ContextPyramid, LogitMap, PlainDecoder
from kd.nn.trunk import build_trunk
from teachers.msinet import MSINet, msinet


def joined(trunk: str, *, stride: int = 8, **options: Any) -> JoinedStages:
    return JoinedStages(build_trunk(trunk, stride=stride, dilate=True, **options))


@pytest.fixture(scope="module")
def published() -> MSINet:
    return msinet().eval()


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_it_has_the_published_number_of_parameters(published: MSINet) -> None:
    assert round(count(published) / 1e6, 2) == 24.93
    # VGG-16's convolutions, the pyramid, the decoder with its last layer.
    assert count(published.trunk) == 14_714_688
    assert count(published.pyramid) == 3 * (1280 * 256 + 256) + 3 * (9 * 1280 * 256 + 256)
    stages = sum(9 * a * b + b for a, b in ((256, 128), (128, 64), (64, 32), (32, 1)))
    assert count(published.decoder) + count(published.saliency) == stages


def test_its_parts_have_the_published_shape(published: MSINet) -> None:
    spreads = [module.dilation for module in published.pyramid.modules() if is_conv(module)]
    assert spreads == [(side, side) for side in (1, 4, 8, 12, 1, 1)]
    convolutions = [m for m in published.trunk.modules() if is_conv(m)]
    assert [m.dilation for m in convolutions] == [(1, 1)] * 10 + [(2, 2)] * 3
    pools = [m for m in published.trunk.modules() if isinstance(m, nn.MaxPool2d | StepPool)]
    assert [type(m) for m in pools] == [nn.MaxPool2d] * 3 + [StepPool] * 2
    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        joined = published.trunk(images)
        around = published.pyramid(joined)
        assert joined.shape == (1, 1280, 6, 8) and around.shape == (1, 256, 6, 8)
        assert published.decoder(around).shape == (1, 32, 48, 64)
        assert published(images)["saliency"].shape == (1, 1, 48, 64)


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def test_it_joins_what_a_vgg_written_out_gives(published: MSINet) -> None:
    """The stages from torchvision's weights by name, layer by layer."""
    state = published.trunk.trunk.state_dict()
    maps, kept, images = torch.empty(0), [], torch.randn(1, 3, 32, 40)
    maps = images
    numbers = iter([0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28])
    for stage, layers in enumerate((2, 2, 3, 3, 3)):
        for _ in range(layers):
            number = next(numbers)
            spread = 2 if stage == 4 else 1
            weight, bias = (state[f"features.{number}.{key}"] for key in ("weight", "bias"))
            maps = F.conv2d(maps, weight, bias, padding=spread, dilation=spread).relu()
        if stage < 3:
            maps = F.max_pool2d(maps, 2)
        else:  # after ReLU nothing is below the padding's 0
            maps = F.max_pool2d(F.pad(maps, (0, 1, 0, 1)), 2, stride=1)
        if stage >= 2:
            kept.append(maps)
    with torch.no_grad():
        torch.testing.assert_close(published.trunk(images), torch.cat(kept, dim=1))


@pytest.mark.slow
def test_torchvisions_weights_of_a_vgg_load_by_name(published: MSINet, tmp_path: Path) -> None:
    state = published.trunk.trunk.state_dict()
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, tmp_path / "vgg16.pth")
    again = joined("vgg16", weights=str(tmp_path / "vgg16.pth")).eval()
    images = torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(again(images), published.trunk(images), rtol=0, atol=0)


def test_a_pooling_of_steps_of_one_keeps_the_size_and_sees_the_edge() -> None:
    maps = torch.tensor([[1.0, -2.0], [-3.0, -4.0]]).view(1, 1, 2, 2)
    expected = torch.tensor([[1.0, -2.0], [-3.0, -4.0]]).view(1, 1, 2, 2)
    torch.testing.assert_close(StepPool()(maps), expected)
    rising = torch.arange(6.0).view(1, 1, 2, 3)
    assert StepPool()(rising).flatten().tolist() == [4, 5, 5, 4, 5, 5]


def test_a_pyramid_sees_as_far_as_its_dilations_and_the_mean_of_all() -> None:
    pyramid = ContextPyramid(1, 1, dilations=(3,))
    for module in pyramid.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    maps = torch.zeros(1, 1, 9, 9)
    maps[0, 0, 4, 4] = 81.0
    seen = pyramid(maps)[0, 0]
    expected = torch.ones(9, 9)  # the mean, at every place
    expected[4, 4] += 81.0
    expected[1::3, 1::3] += 81.0
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize(("trunk", "channels"), [("resnet18", 896), ("mobilenet_v2", 448)])
@pytest.mark.parametrize("stride", [8, 16])
def test_other_trunks_give_three_stages_on_one_grid(trunk: str, channels: int, stride: int) -> None:
    until = "features.17" if trunk == "mobilenet_v2" else None
    stages = joined(trunk, stride=stride, until=until).eval()
    assert (stages.channels, stages.stride) == (channels, stride)
    with torch.no_grad():
        assert stages(torch.randn(1, 3, 64, 96)).shape == (1, channels, 64 // stride, 96 // stride)


def test_at_a_stride_of_16_the_finest_stage_is_averaged() -> None:
    stages = joined("resnet18", stride=16).eval()
    images = torch.randn(1, 3, 64, 64)
    kept: list[Tensor] = []
    layer2: nn.Module = stages.trunk.get_submodule("layer2")
    layer2.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    with torch.no_grad():
        first = stages(images)[:, :128]
    torch.testing.assert_close(first, F.avg_pool2d(kept[0], 2))


def test_a_new_network_neither_fades_nor_explodes() -> None:
    """Published initial weights: the decoder passes the pyramid's variation on."""
    torch.manual_seed(1)
    network = msinet(trunk="resnet18").eval()
    with torch.no_grad():
        logits = network(torch.randn(2, 3, 64, 64))["saliency"]
    assert 1e-4 < logits.std().item() < 10
    for part in (network.pyramid, network.decoder, network.saliency):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                inside = module.weight[0].numel(), module.weight[:, 0].numel()
                bound = math.sqrt(6 / sum(inside))
                assert 0.8 * bound < module.weight.abs().max() <= bound
                assert module.bias is not None and not module.bias.any()


def test_a_decoder_grows_a_map_eight_times_and_a_logit_map_fits_it_to_the_image() -> None:
    decoder, last = PlainDecoder(16), LogitMap(2)
    with torch.no_grad():
        maps = decoder(torch.randn(1, 16, 3, 4))
        assert maps.shape == (1, 2, 24, 32)
        size = torch.Size((45, 60))
        assert last(maps, whole=torch.Size((48, 64)), size=size).shape == (1, 1, 45, 60)
