"""What is asked about detections: by whom, what else is told, and that it is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd.context import detections as detection_context
from kd.context.detections import QueryOptions, context_of, group_boxes
from kd.context.query import expectations
from kd.errors import UserError
from kd.formats.coco_results import Detections, Truth, read_detections, read_truth
from kd.runs.load_teacher import load_teacher
from kd.scenes import detector as scene_detector

Dataset = tuple[Truth, Detections, Path]


@pytest.fixture
def opened(small_scenes: Path, tmp_path: Path) -> Callable[[str], Dataset]:
    """Truth, plain detections and images of a split."""

    def read(split: str) -> Dataset:
        out = tmp_path / f"{split}.json"
        flags = ["--scenes", str(small_scenes), "--split", split, "--out", str(out)]
        assert scene_detector.main(flags) == 0
        truth = read_truth(small_scenes / "annotations" / f"instances_{split}.json")
        return truth, read_detections(out, truth), small_scenes / split

    return read


def ask(teacher: Path, opened: Dataset, folder: Path, **asking: Any) -> tuple[Any, Any]:
    """The teacher's answers, and the query of each detection."""
    truth, found, images = opened
    return context_of(
        load_teacher(teacher, 22), truth, found, images, folder,
        device=torch.device("cpu"), options=QueryOptions(**asking),
    )  # fmt: skip


def test_groups_by_hand() -> None:
    """B joins A; C overlaps B alone, which leads nothing, so that it leads itself."""
    overlaps = np.array([[1.0, 0.8, 0.2], [0.8, 1.0, 0.9], [0.2, 0.9, 1.0]])
    assert group_boxes(overlaps, 0.7).tolist() == [0, 0, 2]
    assert group_boxes(overlaps, 0.95).tolist() == [0, 1, 2]


def test_classes_of_one_box_share_an_answer_that_is_kept(
    small_teacher: Path,
    opened: Callable[[str], Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    val = opened("val")
    log_probs, question = ask(small_teacher, val, tmp_path / "kept")
    boxes = [(e["image_id"], *e["bbox"]) for e in val[1].entries]
    for box in set(boxes):
        rows = [row for row, other in enumerate(boxes) if other == box]
        assert len(set(question[rows].tolist())) == 1
    assert (question >= 0).all()
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, rtol=1e-5)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(detection_context, "expectations", never)
    again, _ = ask(small_teacher, val, tmp_path / "kept")
    assert np.array_equal(again, log_probs)
    with pytest.raises(AssertionError, match="asked again"):  # other questions, other answers
        ask(small_teacher, val, tmp_path / "kept", most=3)


def test_only_the_best_are_asked_about(
    small_teacher: Path, opened: Callable[[str], Dataset], tmp_path: Path
) -> None:
    truth, found, _ = val = opened("val")
    _, question = ask(small_teacher, val, tmp_path, most=3)
    for image in range(len(truth.image_ids)):
        rows = np.flatnonzero(found.boxes.image == image)
        asked = rows[question[rows] >= 0]
        others = np.setdiff1d(rows, asked)
        assert len(asked) == min(3, len(rows))
        assert found.scores[asked].min() >= found.scores[others].max(initial=0)


def test_what_is_told_is_sure_and_not_the_object_itself(
    small_teacher: Path,
    opened: Callable[[str], Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    questions: list[Any] = []
    real = expectations

    def listening(teacher: Any, asked: Any, **options: Any) -> Any:
        questions.extend(asked := list(asked))
        return real(teacher, asked, **options)

    monkeypatch.setattr(detection_context, "expectations", listening)
    _, found, _ = val = opened("val")
    ask(small_teacher, val, tmp_path, sure=0.4)
    assert len(questions) > 8
    told = 0
    for question in questions:
        (hidden,) = question.hidden.tolist()
        assert question.labels[hidden] == -1
        others = [row for row in range(len(question.labels)) if row != hidden]
        told += len(others)
        assert (question.labels[others] >= 0).all()
        x1, y1, x2, y2 = question.boxes[hidden].tolist()
        for row in others:
            a1, b1, a2, b2 = question.boxes[row].tolist()
            shared = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
            union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - shared
            assert shared / union < 0.5
    assert 0 < told < len(questions) * (found.scores >= 0.4).sum()


def test_folds_answer_about_the_images_the_teacher_was_trained_on(
    small_teacher: Path,
    opened: Callable[[str], Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models: list[Any] = []
    real = expectations

    def listening(teacher: Any, asked: Any, **options: Any) -> Any:
        models.append(options["model"] is teacher.model)
        return real(teacher, asked, **options)

    monkeypatch.setattr(detection_context, "expectations", listening)
    ask(small_teacher, opened("train"), tmp_path, most=2)
    assert models == [False, False]  # two folds, the teacher itself not
    models.clear()
    ask(small_teacher, opened("val"), tmp_path, most=2)
    assert models == [True]


def test_a_missing_image_is_named(
    small_teacher: Path, opened: Callable[[str], Dataset], tmp_path: Path
) -> None:
    truth, found, _ = opened("val")
    with pytest.raises(UserError, match=r"000001\.png: image not found; 8 of 8"):
        ask(small_teacher, (truth, found, tmp_path / "nowhere"), tmp_path)
