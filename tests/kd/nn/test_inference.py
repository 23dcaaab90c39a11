"""Batch norms folded into convolutions: the same answers from fewer modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd.nn.ffc import FFCBlock
from kd.nn.inference import for_answers
from kd.nn.trunk import build_trunk


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def settled(model: nn.Module) -> nn.Module:
    """Batch norms as training leaves them, in evaluation."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.normal_(module.weight, 1.0, 0.2)
                nn.init.normal_(module.bias, 0.0, 0.2)
            module.running_mean = torch.randn(module.num_features) * 0.2
            module.running_var = torch.rand(module.num_features) + 0.5
    return model.double().eval()


@pytest.mark.parametrize(
    ("name", "left"),
    [("resnet18", 0), ("mobilenet_v3_small", 0), ("shufflenet_v2_x0_5", 0), ("squeezenet1_1", 0)],
)
def test_a_folded_trunk_gives_the_same_features(name: str, left: int) -> None:
    trunk = settled(build_trunk(name))
    before = norms(trunk)
    folded = for_answers(trunk)
    assert norms(folded) == left and norms(trunk) == before
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), trunk(images))


def test_transposed_grouped_and_biased_convolutions_fold() -> None:
    model = settled(
        nn.Sequential(
            nn.ConvTranspose2d(3, 8, 2, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=4),
            nn.BatchNorm2d(8, affine=False),
        )
    )
    images = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    folded = for_answers(model)
    assert norms(folded) == 0
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images))


def test_a_norm_that_comes_first_stays() -> None:
    model = settled(
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    )
    images = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    folded = for_answers(model)
    assert norms(folded) == 2
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images))


def test_norms_behind_a_fourier_convolution_stay_and_those_inside_go() -> None:
    model = settled(FFCBlock(8, 8, ratio_in=0.5, ratio_out=0.5))
    folded = for_answers(model)
    assert norms(model) == 4 and norms(folded) == 1
    maps = torch.randn(1, 8, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(folded(maps), model(maps))


def test_statistics_of_the_batch_cannot_be_folded() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    assert norms(for_answers(nn.Sequential(nn.Conv2d(3, 4, 1), norm))) == 1


def test_a_convolution_that_is_used_twice_is_left_alone() -> None:
    shared = nn.Conv2d(4, 4, 1)
    model = settled(nn.Sequential(shared, nn.BatchNorm2d(4), shared))
    images = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    folded = for_answers(model)
    assert norms(folded) == 1
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images))


class Around(nn.Sequential):
    """Goes through its children in an order of its own."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return sum((child(images) for child in self), torch.zeros(()))


def test_an_order_that_is_not_known_is_left_alone() -> None:
    assert norms(for_answers(Around(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))) == 1


def test_what_is_tapped_is_left_alone() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model[0].register_forward_hook(lambda *args: None)  # type: ignore[index]
    assert norms(for_answers(model)) == 1


def test_the_copy_is_frozen_and_the_model_is_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    folded = for_answers(model)
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
