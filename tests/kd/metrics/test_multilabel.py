"""Average precision by hand, against a slow reference and torchmetrics, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torchmetrics.classification import MultilabelAveragePrecision

from kd.errors import UserError
from kd.metrics.multilabel import MultiLabelAP, average_precision, present_classes


def slow(scores: list[float], present: list[bool]) -> float:
    """Precision and recall at each distinct score, from counting images one by one."""
    area, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        kept = [there for score, there in zip(scores, present, strict=True) if score >= threshold]
        recall = sum(kept) / sum(present)
        area += (recall - before) * sum(kept) / len(kept)
        before = recall
    return area


def metric_of(scores: torch.Tensor, present: torch.Tensor, first: int = 0) -> MultiLabelAP:
    metric = MultiLabelAP(scores.shape[1], where="run")
    metric.update(scores, present, torch.arange(first, first + len(scores)))
    return metric


def test_average_precision_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    assert average_precision(scores, np.array([True, False, True, False])) == pytest.approx(
        (1 / 1 + 2 / 3) / 2
    )
    assert average_precision(scores, np.array([False, False, False, True])) == pytest.approx(1 / 4)
    assert average_precision(scores, np.array([True, True, False, False])) == 1.0


def test_equal_scores_come_in_together() -> None:
    present = np.array([True, False, False, False])
    assert average_precision(np.zeros(4), present) == pytest.approx(1 / 4)
    assert average_precision(np.zeros(4), present[::-1]) == pytest.approx(1 / 4)
    assert average_precision(np.array([1.0, 1, 0, 0]), present) == pytest.approx(1 / 2)


def test_average_precision_agrees_with_counting_one_by_one() -> None:
    random = np.random.default_rng(3)
    for _ in range(30):
        scores = random.integers(0, 6, size=20) / 5  # with ties
        present = random.random(20) < 0.3
        present[random.integers(20)] = True
        expected = slow(scores.tolist(), present.tolist())
        assert average_precision(scores, present) == pytest.approx(expected)


def test_all_numbers_agree_with_torchmetrics() -> None:
    scores = torch.rand(60, 5)
    present = torch.rand(60, 5) < torch.tensor([0.5, 0.3, 0.2, 0.1, 0.05])
    present[0] = True
    numbers = metric_of(scores, present).compute()
    ways: dict[str, Literal["macro", "weighted", "micro"]] = {
        "mAP": "macro", "weighted_AP": "weighted", "micro_AP": "micro",
    }  # fmt: skip
    for name, average in ways.items():
        theirs = MultilabelAveragePrecision(5, average=average)(scores, present.long())
        assert numbers[name] == pytest.approx(float(theirs), abs=1e-6), name


def test_classes_that_no_image_shows_do_not_count() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5]])
    present = torch.tensor([[True, False, False], [True, False, False]])
    metric = metric_of(scores, present)
    numbers = metric.compute()
    assert (numbers["mAP"], numbers["classes"], numbers["chance_mAP"]) == (1.0, 1, 1.0)
    assert numbers["chance_micro_AP"] == pytest.approx(2 / 6)


def test_the_order_of_batches_does_not_matter_and_repeats_count_once() -> None:
    scores, present = torch.rand(8, 3), torch.rand(8, 3) < 0.5
    whole = metric_of(scores, present)
    parts = metric_of(scores[4:], present[4:], first=4)
    parts.update(scores[:5], present[:5], torch.arange(5))
    assert parts.compute() == whole.compute()


def test_images_without_labels_are_not_scored() -> None:
    batch = {
        "images": torch.zeros(3, 3, 8, 8, dtype=torch.uint8),
        "image_ids": torch.tensor([7, 8, 9]),
        "labels": torch.tensor([1, 1, 0, -1, 1]),
        "image_of": torch.tensor([0, 0, 0, 1, 2]),
    }
    present, told = present_classes(batch, 2)
    assert present.tolist() == [[True, True], [False, False], [False, True]]
    assert told.tolist() == [True, False, True]
    metric = MultiLabelAP(2)
    metric.take(torch.zeros(3, 2), batch)
    assert metric.records()["image_ids"].tolist() == [7, 9]


def test_predictions_are_kept(tmp_path: Path) -> None:
    scores, present = torch.rand(4, 2), torch.tensor([[True, False]] * 4)
    metric_of(scores, present).save_predictions(tmp_path / "predictions.npz")
    with np.load(tmp_path / "predictions.npz") as stored:
        assert stored["log_probs"].tolist() == scores.tolist()
        assert stored["present"].sum() == 4


def test_what_cannot_be_scored_is_said() -> None:
    with pytest.raises(UserError, match="run: no image was scored"):
        MultiLabelAP(2, where="run").compute()
    with pytest.raises(UserError, match="run: no image has any class"):
        metric_of(torch.rand(2, 2), torch.zeros(2, 2, dtype=torch.bool)).compute()
    broken = torch.tensor([[0.0, 0.0], [float("nan"), 0.0]])
    with pytest.raises(UserError, match="image 1: its scores are not finite"):
        metric_of(broken, torch.ones(2, 2, dtype=torch.bool)).compute()
    with pytest.raises(ValueError, match=r"present: \(2, 3\), expected \(2, 2\)"):
        metric_of(torch.rand(2, 2), torch.ones(2, 3, dtype=torch.bool))
