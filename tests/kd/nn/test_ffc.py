"""Fast Fourier convolution against the paper's equations, written out slowly."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.ffc import (
    FFC,
    FFCBlock,
    FourierUnit,
    LocalFourierUnit,
    SpectralTransform,
    join_maps,
    split_channels,
)

SIZES = [(6, 8), (5, 7), (4, 9), (1, 1), (2, 3)]
Complex = NDArray[np.complex128]


def settled(module: nn.Module) -> nn.Module:
    """In evaluation, with batch norms that do something."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, 0.2)
            nn.init.normal_(part.bias, 0.3, 0.2)
            part.running_mean = torch.randn(part.num_features) * 0.2
            part.running_var = torch.rand(part.num_features) + 0.5
    return module.double().eval()


def slow_transform(maps: NDArray[np.float64]) -> Complex:
    """The whole spectrum of (C, H, W), summed term by term; divided by sqrt(HW)."""
    _, height, width = maps.shape
    down = np.exp(-2j * math.pi * np.outer(np.arange(height), np.arange(height)) / height)
    right = np.exp(-2j * math.pi * np.outer(np.arange(width), np.arange(width)) / width)
    whole: Complex = np.einsum("uy,cyx,xv->cuv", down, maps, right) / math.sqrt(height * width)
    return whole


def slow_back(half: Complex, width: int) -> NDArray[np.float64]:
    """A real map from its spectrum's first W/2 + 1 columns: the others are their conjugates."""
    channels, height, columns = half.shape
    whole = np.zeros((channels, height, width), np.complex128)
    whole[:, :, :columns] = half
    for v in range(columns, width):
        for u in range(height):
            whole[:, u, v] = half[:, -u % height, width - v].conj()
    down = np.exp(2j * math.pi * np.outer(np.arange(height), np.arange(height)) / height)
    right = np.exp(2j * math.pi * np.outer(np.arange(width), np.arange(width)) / width)
    maps = np.einsum("yu,cuv,vx->cyx", down, whole, right) / math.sqrt(height * width)
    # A real signal's spectrum is real where it is its own conjugate; a mixed one is not, and of
    # that a real transform takes the real part.
    return np.asarray(maps.real)


def slow_unit(unit: FourierUnit, maps: NDArray[np.float64]) -> NDArray[np.float64]:
    """One image (C, H, W) through a Fourier unit."""
    columns = maps.shape[2] // 2 + 1
    half = slow_transform(maps)[:, :, :columns]
    stacked = np.concatenate([half.real, half.imag])[None]
    mixed = unit.convolve(torch.from_numpy(stacked))[0].detach().numpy()
    real, imaginary = np.split(mixed, 2)
    return slow_back(own_conjugates(real + 1j * imaginary, maps.shape[2]), maps.shape[2])


def own_conjugates(half: Complex, width: int) -> Complex:
    """The columns that must mirror themselves (the first, and the last of an even width) do so."""
    fixed = half.copy()
    height = half.shape[1]
    for v in [0, *([width // 2] if width % 2 == 0 else [])]:
        for u in range(height):
            fixed[:, u, v] = (half[:, u, v] + half[:, -u % height, v].conj()) / 2
    return fixed


@pytest.mark.parametrize("size", SIZES)
def test_a_fourier_unit_is_a_convolution_of_the_spectrum(size: tuple[int, int]) -> None:
    unit = settled(FourierUnit(3, 4))
    assert isinstance(unit, FourierUnit)
    maps = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = [slow_unit(unit, one.numpy()) for one in maps]
    with torch.no_grad():
        np.testing.assert_allclose(unit(maps).numpy(), np.stack(expected), atol=1e-9)


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (4, 9), (9, 4)])
def test_a_local_unit_reads_quarters_of_a_map_of_any_sides(size: tuple[int, int]) -> None:
    local = settled(LocalFourierUnit(8))
    assert isinstance(local, LocalFourierUnit)
    maps = torch.randn(1, 8, *size, dtype=torch.float64)
    height, width = size[0] + size[0] % 2, size[1] + size[1] % 2
    padded = np.zeros((2, height, width))
    padded[:, : size[0], : size[1]] = maps[0, :2].numpy()
    h, w = height // 2, width // 2
    corners = [(0, 0), (0, w), (h, 0), (h, w)]
    stacked = np.concatenate([padded[:, y : y + h, x : x + w] for y, x in corners])
    small = slow_unit(local.unit, stacked)
    expected = np.zeros((8, height, width))
    for y, x in corners:
        expected[:, y : y + h, x : x + w] = small
    with torch.no_grad():
        got = local(maps)[0].numpy()
    np.testing.assert_allclose(got, expected[:, : size[0], : size[1]], atol=1e-9)


@pytest.mark.parametrize("local_unit", [True, False])
def test_the_layer_adds_four_paths(local_unit: bool) -> None:
    layer = settled(FFC(8, 16, ratio_in=0.5, ratio_out=0.75, local_unit=local_unit))
    assert isinstance(layer, FFC)
    maps = torch.randn(1, 8, 5, 6, dtype=torch.float64)
    near, far = maps[:, :4], maps[:, 4:]
    spectral = layer.global_to_global
    assert isinstance(spectral, SpectralTransform)
    assert layer.local_to_local and layer.global_to_local and layer.local_to_global
    with torch.no_grad():
        reduced = spectral.reduce(far)
        total = reduced + torch.from_numpy(slow_unit(spectral.unit, reduced[0].numpy()))
        if local_unit:
            assert spectral.local_unit is not None
            total = total + spectral.local_unit(reduced)
        expected = torch.cat(
            [
                layer.local_to_local(near) + layer.global_to_local(far),
                layer.local_to_global(near) + spectral.project(total),
            ],
            dim=1,
        )
        torch.testing.assert_close(layer(maps), expected)
    assert expected.shape == (1, 16, 5, 6)
    assert (spectral.local_unit is not None) is local_unit


def test_without_global_channels_the_layer_is_a_convolution() -> None:
    layer = FFC(3, 5, ratio_in=0.0, ratio_out=0.0)
    maps = torch.randn(2, 3, 7, 9)
    only = layer.local_to_local
    assert isinstance(only, nn.Conv2d)
    torch.testing.assert_close(layer(maps), only(maps))
    assert sum(p.numel() for p in layer.parameters()) == 3 * 5 * 9


def test_all_channels_may_be_global() -> None:
    layer = FFC(8, 8, ratio_in=1.0, ratio_out=1.0)
    assert layer(torch.randn(2, 8, 6, 7)).shape == (2, 8, 6, 7)
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == {"global_to_global"}


def test_a_global_channel_sees_the_far_corner_and_a_local_one_does_not() -> None:
    layer = settled(FFCBlock(8, 8, ratio_in=0.5, ratio_out=0.5))
    maps = torch.randn(1, 8, 16, 16, dtype=torch.float64)
    moved = maps.clone()
    moved[:, :, -1, -1] += 5
    with torch.no_grad():
        change = (layer(maps) - layer(moved)).abs()[0, :, 0, 0]
    assert change[:4].max() == 0
    assert change[4:].max() > 1e-4


@pytest.mark.parametrize("local_unit", [True, False])
def test_the_layer_works_in_bfloat16_and_channels_last(local_unit: bool) -> None:
    torch.manual_seed(0)
    layer = FFCBlock(16, 16, ratio_in=0.5, ratio_out=0.5, local_unit=local_unit).eval()
    maps = torch.randn(2, 16, 9, 12)
    expected = layer(maps)
    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(maps.contiguous(memory_format=torch.channels_last)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = layer.train()(maps)
    rough.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        close = layer.eval()(maps).float()
    assert (close - expected).abs().mean() < 0.03 * expected.abs().mean() + 0.01


def test_gradients_are_right() -> None:
    layer = settled(FFC(8, 8, ratio_in=0.5, ratio_out=0.5))
    maps = torch.randn(1, 8, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (maps,), eps=1e-6, atol=1e-5)


def test_no_images_give_none() -> None:
    assert FFC(8, 8, ratio_in=0.5, ratio_out=0.5)(torch.zeros(0, 8, 6, 6)).shape == (0, 8, 6, 6)


def test_joined_maps_have_their_local_channels_first() -> None:
    first, second = torch.arange(4.0).view(1, 4, 1, 1), torch.arange(10.0, 18).view(1, 8, 1, 1)
    joined = join_maps(first, second, 0.5).flatten().tolist()
    assert joined == [0, 1, 10, 11, 12, 13, 2, 3, 14, 15, 16, 17]
    assert split_channels(12, 0.75) == (3, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio_in": 1.5}, r"ratio_in must be in 0..1, got 1.5"),
        ({"ratio_out": -0.5}, r"ratio_out must be in 0..1, got -0.5"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, float], message: str) -> None:
    chosen: dict[str, float] = {"ratio_in": 0.5, "ratio_out": 0.5, **options}
    with pytest.raises(UserError, match=message):
        FFC(8, 8, **chosen)  # type: ignore[arg-type]


def test_maps_of_a_tensor_type_keep_it() -> None:
    unit = FourierUnit(2, 2)
    assert isinstance(unit(torch.randn(1, 2, 4, 4)), Tensor)
    assert unit(torch.randn(1, 2, 4, 4)).dtype == torch.float32
