"""Multiply-adds worked by hand, and what is timed."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import models

from kd.errors import UserError
from kd.nn import cost
from kd.nn.cost import latency, multiply_adds
from kd.nn.segmentation import NAMES, torchvision_net


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        # output channels x input channels a group x kernel x output places
        (nn.Conv2d(3, 8, 3, padding=1), 8 * 3 * 9 * (10 * 12)),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), 8 * 3 * 9 * (5 * 6)),
        (nn.Conv2d(3, 8, 3, padding=2, dilation=2), 8 * 3 * 9 * (10 * 12)),
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), 6 * 1 * 9 * (10 * 12)),
        # input channels x output channels a group x kernel x input places
        (nn.ConvTranspose2d(3, 8, 2, stride=2), 3 * 8 * 4 * (10 * 12)),
        (nn.ConvTranspose2d(3, 6, 4, stride=2, groups=3), 3 * 2 * 16 * (10 * 12)),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 10 * 12, 7)), 7 * 3 * 10 * 12),
        (nn.BatchNorm2d(3), 0),
    ],
    ids=lambda value: repr(value).partition("\n")[0] if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_multiply_adds_are_those_worked_by_hand(
    layer: nn.Module, expected: int, device: str
) -> None:
    images = torch.zeros(1, 3, 10, 12, device=device)
    assert multiply_adds(layer.to_empty(device=device), images) == expected
    assert multiply_adds(layer, images.expand(2, -1, -1, -1)) == 2 * expected


def test_matrix_products_count() -> None:
    class Product(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images @ images.transpose(2, 3)  # (N, 3, 10, 12) by (N, 3, 12, 10)

    assert multiply_adds(Product(), torch.zeros(2, 3, 10, 12)) == 2 * 3 * 10 * 10 * 12


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_counts_in_evaluation_too(device: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).to_empty(device=device)
    tokens = torch.zeros(1, 5, 8, device=device)
    # Queries, keys, values and the way out; products with keys and with values; two linear layers.
    assert multiply_adds(layer, tokens) == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_the_same_with_every_kernel(backend: SDPBackend, masked: bool) -> None:
    class Attention(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            mask = torch.ones(5, 7, dtype=torch.bool) if masked else None
            keys = images.new_zeros(2, 3, 7, 8)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(images, keys, keys, attn_mask=mask)

    assert multiply_adds(Attention(), torch.zeros(2, 3, 5, 8)) == 2 * 3 * 5 * 7 * (8 + 8)


@pytest.mark.parametrize("grad", [False, True])
def test_attention_over_a_mask_counts_in_evaluation_too(grad: bool) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(grad)

    class Masked(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            padding = torch.tensor([[False, False, False, True, True]])
            output: Tensor = layer(tokens, tokens, tokens, padding, need_weights=False)[0]
            return output

    assert multiply_adds(Masked(), torch.zeros(1, 5, 8)) == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("resnet18", 224),
        ("mobilenet_v2", 224),
        ("vit_b_32", 224),
        ("lraspp_mobilenet_v3_large", 520),
    ],
)
def test_counts_are_torchvisions_own(name: str, side: int) -> None:
    """Each of its weights says how many billions one image takes."""
    with torch.device("meta"):
        model = torchvision_net(21, name=name) if name in NAMES else models.get_model(name)
        count = multiply_adds(model, torch.empty(1, 3, side, side))
    published = models.get_model_weights(name)["DEFAULT"].meta["_ops"]
    assert count / 1e9 == pytest.approx(published, abs=6e-4)


def test_layers_of_training_alone_do_not_count_and_modes_are_left_as_they_were() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 1, 1)

        def forward(self, images: Tensor) -> Tensor:
            result: Tensor = self.first(images)
            assert not result.requires_grad
            return result + self.second(images) if self.training else result

    model = Two()
    model.second.eval()
    images = torch.zeros(1, 3, 10, 12)
    assert multiply_adds(model, images) == 3 * 10 * 12
    latency(model, images, 1)
    assert model.training and model.first.training and not model.second.training


def test_latency_is_the_median_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # Slow at first, and once later; the clock stands still but in forwards.
    durations = [9.0] * cost.WARM_UP + [2.0, 1.0, 50.0, 3.0, 2.5]
    now = [0.0]

    class Slow(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            now[0] += durations.pop(0)
            return images

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert latency(Slow(), torch.zeros(1, 3, 2, 2), 5) == 2.5
    assert durations == []


def test_no_repeats_are_refused() -> None:
    with pytest.raises(UserError, match="latency: repeats must be at least 1, got 0"):
        latency(nn.Identity(), torch.zeros(1, 3, 2, 2), 0)
