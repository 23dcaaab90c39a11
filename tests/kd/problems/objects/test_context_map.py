"""One class a pixel, and which classes a scene holds: losses and answers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd.errors import UserError
from kd.problems.objects.task import ContextMap, ContextScene

CLASSES = 3


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Two images of 8 pixels: two objects on the first, one on the second, without its label."""
    maps = torch.zeros(2, 8, 8, dtype=torch.uint8)
    maps[0, 2:6, 2:6] = 2
    maps[0, 6:, 6:] = 1
    return {
        "images": torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8),
        "sizes": torch.tensor([[8, 8], [8, 4]]),
        "boxes": torch.tensor([[2.0, 2, 6, 6], [6, 6, 8, 8], [0, 0, 4, 4]]),
        "labels": torch.tensor([1, 0, -1]),
        "image_of": torch.tensor([0, 0, 1]),
        "hidden": torch.tensor([0, 2]),
        "hide_fraction": torch.ones(2),
        "class_maps": maps,
    }


def test_a_pixel_posterior_leaves_background_out(batch: dict[str, Tensor]) -> None:
    logits = torch.zeros(2, 1 + CLASSES, 8, 8)
    logits[0, 0] = 5.0  # background everywhere
    logits[0, 1:, 2:6, 2:6] = torch.tensor([1.0, 2.0, 5.0]).log()[:, None, None]
    logits[0, 1, :2] = 50.0  # outside of the region: does not count
    answer = ContextMap(num_classes=CLASSES).decode({"logits": logits}, batch).exp()
    assert answer[0].tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], rel=1e-4)
    assert answer[1].tolist() == pytest.approx([1 / 3] * 3)


def test_pixel_cross_entropy_is_that_of_the_stored_classes(batch: dict[str, Tensor]) -> None:
    right = 20.0 * torch.nn.functional.one_hot(batch["class_maps"].long(), 1 + CLASSES)
    logits = right.permute(0, 3, 1, 2).float().requires_grad_()
    task = ContextMap(num_classes=CLASSES, hidden_weight=1.0)
    loss = task.losses({"logits": logits}, batch)["pixel_cross_entropy"]
    assert loss.unit == "labelled" and loss.value.item() == pytest.approx(0, abs=1e-6)
    even = torch.zeros_like(logits, requires_grad=True)
    loss = task.losses({"logits": even}, batch)["pixel_cross_entropy"]
    assert loss.value.item() == pytest.approx(math.log(4))
    loss.value.backward()
    assert even.grad is not None and not even.grad[1].any()  # its label is withheld
    assert (even.grad[0, 2, 2:6, 2:6] < 0).all()


def test_padding_has_no_class(batch: dict[str, Tensor]) -> None:
    told = {**batch, "labels": torch.tensor([1, 0, 2])}
    logits = torch.zeros(2, 1 + CLASSES, 8, 8, requires_grad=True)
    ContextMap(num_classes=CLASSES).losses({"logits": logits}, told)[
        "pixel_cross_entropy"
    ].value.backward()
    assert logits.grad is not None
    assert not logits.grad[1, :, :, 4:].any() and logits.grad[1, :, :, :4].any()


def test_class_weights_raise_rare_classes(batch: dict[str, Tensor]) -> None:
    # Fractions of the image's area: the median is 0.1, background is cut to a tenth.
    fractions = (0.98, 0.1, 0.025, 0.1)
    task = ContextMap(
        num_classes=CLASSES, class_weights=0.5, pixel_fractions=fractions, hidden_weight=0
    )
    logits = torch.zeros(2, 1 + CLASSES, 8, 8)
    logits[:, 1] = math.log(2)
    weights = {0: (0.1 / 0.98) ** 0.5, 1: 1.0}
    outside = {0: 64 - 16 - 4, 1: 4}
    entropy = {0: math.log(5), 1: math.log(5 / 2)}
    mass = sum(outside[c] * weights[c] for c in outside)
    expected = sum(outside[c] * weights[c] * entropy[c] for c in outside) / mass
    loss = task.losses({"logits": logits}, batch)["pixel_cross_entropy"].value
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_scene_holds_the_hidden_class_too(batch: dict[str, Tensor]) -> None:
    task = ContextScene(num_classes=CLASSES)
    logits = torch.tensor([[9.0, 9.0, -9.0], [3.0, 3.0, 3.0]])
    loss = task.losses({"logits": logits}, batch)["multilabel_bce"]
    assert loss.unit == "labelled"
    assert loss.value.item() == pytest.approx(math.log1p(math.exp(-9)), rel=5e-3)
    answer = task.decode({"logits": torch.tensor([[0.0, 0.0, -99.0], [1.0, 1.0, 1.0]])}, batch)
    assert answer.exp()[0].tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-5)


def test_a_rare_classs_presence_weighs_more(batch: dict[str, Tensor]) -> None:
    task = ContextScene(num_classes=CLASSES, class_weights=1.0, image_fractions=(0.5, 0.2, 0.9))
    loss = task.losses({"logits": torch.zeros(2, CLASSES)}, batch)["multilabel_bce"]
    assert loss.value.item() == pytest.approx((1 + 4 + 1) * math.log(2) / 3)


@pytest.mark.parametrize("task", [ContextMap, ContextScene])
def test_the_power_of_class_weights_is_checked(task: type[ContextMap | ContextScene]) -> None:
    with pytest.raises(UserError, match=r"class_weights must be in 0..1, got 2.0"):
        task(num_classes=CLASSES, class_weights=2.0)
