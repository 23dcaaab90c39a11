"""A network in 8-bit integers: near the original, fewer bytes, and what cannot be done is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.inference import ENGINE, in_int8
from teachers.unet import unet

pytestmark = pytest.mark.skipif(
    ENGINE not in torch.backends.quantized.supported_engines, reason="no int8 engine here"
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(8, 4, 1),
    ).eval()  # fmt: skip


def test_int8_comes_near_and_the_model_stays_as_it_is() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(4, 3, 12, 10)
    quick = in_int8(model, [images])
    with torch.no_grad():
        expected = model(images)
        error = (quick(images) - expected).abs().mean() / expected.std()
    assert 0 < error < 0.05  # in other numbers, but not far
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert isinstance(quick.get_submodule("3"), nn.ConvTranspose2d)


def test_what_is_spared_stays_in_float32() -> None:
    quick = in_int8(network(), [torch.randn(2, 3, 8, 8)], spared=["4"])
    assert type(quick.get_submodule("4")) is nn.Conv2d
    assert type(quick.get_submodule("0")) is not nn.Conv2d


@pytest.mark.parametrize("up", ["bilinear", "transposed"])
def test_a_unet_answers_in_int8_at_any_size(up: str) -> None:
    model = unet(3, width=4, depth=2, up=up).eval()  # type: ignore[arg-type]
    quick = in_int8(model, [torch.randn(2, 4, 32, 32)], spared=["head"])
    with torch.no_grad():
        assert quick(torch.randn(1, 4, 19, 33)).shape == (1, 3, 19, 33)


class Choosy(nn.Module):
    """Looks at its numbers, which tracing cannot follow."""

    def forward(self, images: Tensor) -> Tensor:
        return images if images.sum() > 0 else -images


def test_what_int8_cannot_do_is_named() -> None:
    with pytest.raises(UserError, match="Choosy cannot be traced"):
        in_int8(Choosy(), [torch.zeros(1)])
    with pytest.raises(UserError, match="no samples"):
        in_int8(network(), [])
