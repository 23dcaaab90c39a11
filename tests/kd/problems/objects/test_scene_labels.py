"""Multi-label scenes: what the student is asked, its loss by hand, what is scored."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd.metrics.multilabel import MultiLabelAP
from kd.problems.base import Classes
from kd.problems.objects.task import SceneLabels


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three images of 8 pixels, two objects on the first, the last without labels."""
    return {
        "images": torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8),
        "image_ids": torch.tensor([5, 6, 7]),
        "sizes": torch.tensor([[8, 8], [6, 8], [8, 4]]),
        "boxes": torch.tensor([[2.0, 2, 6, 6], [0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4]]),
        "labels": torch.tensor([1, 2, 0, -1]),
        "image_of": torch.tensor([0, 0, 1, 2]),
        "hidden": torch.tensor([0, 2, 3]),
    }


def test_the_whole_image_without_its_padding_is_the_region(batch: dict[str, Tensor]) -> None:
    images, rois = SceneLabels(num_classes=3).inputs(batch)
    assert images.shape == (3, 3, 8, 8) and images.is_floating_point()
    assert rois.tolist() == [[0, 0, 0, 8, 8], [1, 0, 0, 8, 6], [2, 0, 0, 4, 8]]


def test_the_loss_by_hand(batch: dict[str, Tensor]) -> None:
    # Odds 1, so that each of the 2 x 3 answers costs log 2, but one of odds 3 that is right.
    logits = torch.tensor([[0.0, math.log(3), 0], [0, 0, 0], [9, -9, 5]], requires_grad=True)
    loss = SceneLabels(num_classes=3).losses({"appearance": logits}, batch)["binary"]
    assert loss.value.item() == pytest.approx((5 * math.log(2) + math.log(4 / 3)) / 6)
    assert loss.unit == "labelled_images"
    loss.value.backward()
    assert logits.grad is not None
    assert (logits.grad[2] == 0).all() and (logits.grad[:2] != 0).all()
    weighed = SceneLabels(num_classes=3, pos_weight=2.0)
    value = weighed.losses({"appearance": logits}, batch)["binary"].value
    assert value.item() == pytest.approx((7 * math.log(2) + 2 * math.log(4 / 3)) / 6)


def test_images_with_labels_are_its_unit(batch: dict[str, Tensor]) -> None:
    assert SceneLabels(num_classes=3).counts(batch)["labelled_images"] == 2


def test_answers_are_probabilities_class_by_class(batch: dict[str, Tensor]) -> None:
    task = SceneLabels(num_classes=3)
    decoded = task.decode({"appearance": torch.tensor([[0.0, math.log(3), -1000]])}, batch)
    assert decoded.exp()[0].tolist() == pytest.approx([0.5, 0.75, 0])
    assert decoded.isfinite().all()
    metric = task.metric(Classes(("a", "b", "c")))
    assert isinstance(metric, MultiLabelAP)
    metric.take(torch.rand(3, 3), batch)
    assert metric.compute()["count"] == 2
    assert task.masks(batch) == {}
