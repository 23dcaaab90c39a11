"""Inputs, losses and answers of each task, worked by hand on a small batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd.problems.base import Mean
from kd.problems.objects.task import Classification, Context, ContextPixels

CLASSES = 3


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Two images of 8 pixels with an object each, the second without its label."""
    return {
        "images": torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8),
        "sizes": torch.tensor([[8, 8], [8, 4]]),
        "boxes": torch.tensor([[2.0, 2, 6, 6], [0, 0, 4, 4]]),
        "labels": torch.tensor([1, -1]),
        "image_of": torch.tensor([0, 1]),
        "hidden": torch.tensor([0, 1]),
        "hide_fraction": torch.ones(2),
    }


def value(losses: dict[str, Mean], name: str) -> float:
    assert losses[name].unit == "labelled"
    return losses[name].value.item()


def test_classification_asks_about_hidden_boxes_on_whole_images(batch: dict[str, Tensor]) -> None:
    images, rois = Classification(num_classes=CLASSES).inputs(batch)
    assert images.shape == (2, 3, 8, 8) and images.is_floating_point()
    assert rois.tolist() == [[0, 2, 2, 6, 6], [1, 0, 0, 4, 4]]


def test_classification_scores_the_labelled_alone(batch: dict[str, Tensor]) -> None:
    logits = torch.tensor([[0.0, math.log(2), 0.0], [9.0, -9.0, 0.0]])
    output = {"logits": logits, "appearance": torch.zeros(2, CLASSES)}
    task = Classification(num_classes=CLASSES, appearance=True)
    losses = task.losses(output, batch)
    assert value(losses, "cross_entropy") == pytest.approx(math.log(2))
    assert value(losses, "appearance") == pytest.approx(math.log(3))
    assert task.decode(output, batch).exp().sum(dim=1).tolist() == pytest.approx([1, 1])
    assert set(Classification(num_classes=CLASSES).losses(output, batch)) == {"cross_entropy"}
    assert set(task.masks(batch)) == {"ring"}


def test_context_inputs_are_blind_to_the_object(batch: dict[str, Tensor]) -> None:
    (inputs,) = Context(num_classes=CLASSES).inputs(batch)
    assert inputs.shape == (2, 4, 8, 8)
    assert inputs[0, 3].sum() == 16
    assert (inputs[:, :3] * inputs[:, 3:]).abs().sum() == 0
    changed = {**batch, "images": batch["images"].clone()}
    changed["images"][0, :, 2:6, 2:6] = 0
    assert torch.equal(Context(num_classes=CLASSES).inputs(changed)[0], inputs)


def test_context_losses_and_answers(batch: dict[str, Tensor]) -> None:
    output = {"logits": torch.tensor([[0.0, math.log(2), 0.0], [5.0, 5.0, 5.0]])}
    task = Context(num_classes=CLASSES)
    assert value(task.losses(output, batch), "cross_entropy") == pytest.approx(math.log(2))
    assert task.decode(output, batch)[1].tolist() == pytest.approx([-math.log(3)] * 3)


def test_a_balanced_context_loss_puts_the_prior_back(batch: dict[str, Tensor]) -> None:
    task = Context(num_classes=CLASSES, balance=1.0, prior=(0.25, 0.5, 0.25))
    output = {"logits": torch.zeros(2, CLASSES)}
    assert value(task.losses(output, batch), "cross_entropy") == pytest.approx(math.log(2))


def test_pixel_answers_are_sums_of_sigmoids_over_the_region(batch: dict[str, Tensor]) -> None:
    logits = torch.full((2, CLASSES, 8, 8), -30.0)
    logits[0, 1, 2:6, 2:6] = 30.0
    logits[0, 0] = 30.0
    logits[0, 0, 2:6, 2:6] = 0.0
    answer = ContextPixels(num_classes=CLASSES).decode({"logits": logits}, batch).exp()
    assert answer[0].tolist() == pytest.approx([1 / 3, 2 / 3, 0], abs=1e-5)
    assert answer[1].tolist() == pytest.approx([1 / 3] * 3, abs=1e-5)


def test_pixel_losses_leave_out_padding_and_inputs_without_labels(
    batch: dict[str, Tensor],
) -> None:
    task = ContextPixels(num_classes=CLASSES, hidden_weight=1.0)
    logits = torch.zeros(2, CLASSES, 8, 8, requires_grad=True)
    losses = task.losses({"logits": logits}, batch)
    assert value(losses, "masked_bce") == pytest.approx(math.log(2))
    losses["masked_bce"].value.backward()
    assert logits.grad is not None
    assert logits.grad[1].abs().sum() == 0
    first = {name: tensor[:1] for name, tensor in batch.items()}
    alone = logits.detach()[:1].clone().requires_grad_()
    task.losses({"logits": alone}, first)["masked_bce"].value.backward()
    torch.testing.assert_close(logits.grad[:1], alone.grad)


def test_pixel_losses_of_labelled_inputs_leave_out_padding(batch: dict[str, Tensor]) -> None:
    told = {**batch, "labels": torch.tensor([1, 0])}
    logits = torch.zeros(2, CLASSES, 8, 8, requires_grad=True)
    task = ContextPixels(num_classes=CLASSES)
    task.losses({"logits": logits}, told)["masked_bce"].value.backward()
    assert logits.grad is not None
    assert logits.grad[1, :, :, 4:].abs().sum() == 0
    assert (logits.grad[1, 0, :4, :4] < 0).all()
