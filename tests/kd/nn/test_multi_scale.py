"""A network at several scales answers as its distributions do on average."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.segmentation import MultiScale


class Eighths(nn.Module):
    """Logits of three classes on an eighth of the grid, from the pixels' own neighbourhood."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 9, stride=8, padding=4)
        self.seen: list[tuple[int, int]] = []

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.seen.append((images.shape[2], images.shape[3]))
        return {"logits": self.conv(images), "auxiliary": images}


def test_one_scale_alone_says_what_the_network_says() -> None:
    model, images = Eighths(), torch.randn(2, 3, 40, 56)
    said = MultiScale(model)(images)
    assert list(said) == ["logits"]
    torch.testing.assert_close(said["logits"], model(images)["logits"].log_softmax(dim=1))


def test_the_mean_over_scales_and_mirror_is_taken_on_the_grid_of_scale_one() -> None:
    model, images = Eighths(), torch.randn(1, 3, 32, 48)
    said = MultiScale(model, (0.75, 1.0, 1.3), mirror=True)(images)["logits"]
    assert sorted(model.seen) == [(32, 32)] * 2 + [(32, 48)] * 2 + [(48, 64)] * 2
    total = torch.zeros(1, 3, 4, 6)
    for sides in ((32, 32), (32, 48), (48, 64)):  # rounded to multiples of 16
        seen = F.interpolate(images, sides, mode="bilinear")
        for mirrored in (False, True):
            logits = model(seen.flip(3) if mirrored else seen)["logits"]
            logits = logits.flip(3) if mirrored else logits
            total += F.interpolate(logits, (4, 6), mode="bilinear").softmax(dim=1)
    torch.testing.assert_close(said, (total / 6).log())
    torch.testing.assert_close(said.exp().sum(dim=1), torch.ones(1, 4, 6))


def test_a_mirrored_image_gets_the_mirrored_answer() -> None:
    model, images = MultiScale(Eighths(), (1.0, 2.0), mirror=True), torch.randn(1, 3, 32, 32)
    said, mirrored = (model(one)["logits"] for one in (images, images.flip(3)))
    torch.testing.assert_close(mirrored.flip(3), said)


def test_the_grid_is_that_of_scale_one_where_that_is_not_asked() -> None:
    images = torch.randn(1, 3, 32, 48)
    assert MultiScale(Eighths(), (0.5, 2.0))(images)["logits"].shape == (1, 3, 4, 6)


def test_a_lone_tensor_will_do_and_sure_answers_stay_finite() -> None:
    sure = nn.Conv2d(3, 2, 1)
    nn.init.zeros_(sure.weight)
    sure.bias.data = torch.tensor([1000.0, -1000.0])  # type: ignore[union-attr]
    said = MultiScale(sure, (1.0, 0.5))(torch.randn(1, 3, 16, 16))["logits"]
    assert torch.isfinite(said).all()
    assert (said.argmax(dim=1) == 0).all()


@pytest.mark.parametrize(
    ("scales", "message"),
    [((), "one or more"), ((1.0, 1.0), "different"), ((0.0,), "above 0, got 0"),
     ((1.0, float("nan")), "above 0, got nan")],
)  # fmt: skip
def test_wrong_scales_are_refused(scales: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MultiScale(nn.Identity(), scales)
