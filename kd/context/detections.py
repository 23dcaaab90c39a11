"""What a teacher expects where a detector found something: asked once, kept beside the results.

Several detections often mean one object. Those that overlap well share one question, in the box of
the best of them. A teacher that reads annotations is told the *detections* around it, never the
truth: the surest ones, of each place one, without those that may be the asked object itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_masks

from kd.context.query import Question, expectations
from kd.engine.checkpoint import Progress
from kd.engine.progress import ProgressBar
from kd.errors import UserError
from kd.formats.coco_results import Detections, Truth, by_image, corners
from kd.formats.coco_validate import read_json
from kd.formats.splits import fold_of
from kd.nn.weights import weights_hash
from kd.problems.context import hidden_objects
from kd.runs.load_teacher import TrainedTeacher, fold_models
from kd.utils.images import read_image
from kd.utils.io import write_atomic

_log = logging.getLogger("kd")
_VERSION = 1
# Regions in one pass; a CPU is faster (44 against 72 ms a region, MobileNetV2 at 256 px) where what
# it computes on stays in its cache.
_AT_ONCE, _AT_ONCE_ON_CPU = 64, 4

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How detections become questions.

    Args:
        most: Detections of an image that are asked about, the best ones; others have no answer.
        same_place: Overlap (IoU) from which detections share a question.
        sure: Score from which a detection is told to others as an object with its class.
        same_object: Overlap from which it may be the asked object itself, and is not told.
    """

    most: int = 100
    same_place: float = 0.7
    sure: float = 0.3
    same_object: float = 0.5


@dataclass(frozen=True)
class Context:
    """A teacher's answers.

    Attributes:
        log_probs: (K, C) float32, one for each question.
        question: (D,) int64, which one is about a detection; -1 = it was not asked about, as one
            whose box has no area.
    """

    log_probs: npt.NDArray[np.float32]
    question: Ints


@dataclass(frozen=True)
class _Plan:
    """The questions of one image: `asked` and `told` are rows of the detections."""

    image: int
    asked: Ints
    told: list[Ints]


def context_of(
    teacher: TrainedTeacher,
    truth: Truth,
    found: Detections,
    images: Path,
    kept_in: Path,
    *,
    device: torch.device,
    asking: Asking | None = None,
) -> Context:
    """Answers about detections: read where they were kept, else computed and kept.

    Args:
        teacher: On images that it was trained on its fold models are asked.
        truth: Names the images; its objects are not looked at.
        found: The detections.
        images: Where the images lie.
        kept_in: Folder for `context-<key>.npz`; the key is a hash of all that the answers are of.
        device: Where to compute.
        asking: How.

    Raises:
        UserError: An image lacks, or the folder cannot be written.
    """
    asking = asking or Asking()
    models = _models(teacher, truth)
    key = _key(teacher, models, truth, found, images, asking)
    path = kept_in / f"context-{found.path.stem}-{key}.npz"
    if path.is_file():
        with np.load(path) as stored:
            _log.info("%s: the teacher's answers are there already", path)
            return Context(stored["log_probs"], stored["question"])
    plans, question = _plans(truth, found, asking)
    answers = np.zeros((question.max(initial=-1) + 1, len(truth.class_names)), np.float32)
    folds = fold_of(truth.image_ids, len(models)) if len(models) > 1 else None
    with ProgressBar(f"context of {found.path.name}", len(answers), 0, enabled=True) as advance:
        done = 0
        for number, model in enumerate(models):
            mine = [plan for plan in plans if folds is None or folds[plan.image] == number]
            rows = [int(question[row]) for plan in mine for row in plan.asked]
            asked = _questions(mine, truth, found, images, hidden_objects(teacher).size)
            most = _AT_ONCE_ON_CPU if device.type == "cpu" else _AT_ONCE
            given = expectations(teacher, asked, device=device, model=model, most_inputs=most)
            start = 0
            for part in given:
                answers[rows[start : start + len(part)]] = part.numpy()
                start, done = start + len(part), done + len(part)
                advance(Progress(step=done), 0)
    write_atomic(path, lambda file: _save(file, answers, question))
    return Context(answers, question)


def _save(path: Path, answers: npt.NDArray[np.float32], question: Ints) -> None:
    with open(path, "wb") as file:
        np.savez(file, log_probs=answers, question=question)


def _models(teacher: TrainedTeacher, truth: Truth) -> list[torch.nn.Module]:
    """The teacher, or its fold models where these are the images it was trained on."""
    train = teacher.problem.train_annotations(teacher.section)
    same = train is not None and read_json(train)[1] == read_json(truth.path)[1]
    if not same:
        return [teacher.model]
    if teacher.recipe.folds < 2:
        _log.warning(
            "%s: the teacher was trained on these images, without folds: what it says of them "
            "is surer than what it will say of others; train it with --set folds=5",
            truth.path,
        )
        return [teacher.model]
    _log.info("%s: the teacher was trained on these images; its folds answer", truth.path)
    return fold_models(teacher, len(truth.class_names))


def _key(
    teacher: TrainedTeacher,
    models: Sequence[torch.nn.Module],
    truth: Truth,
    found: Detections,
    images: Path,
    asking: Asking,
) -> str:
    """A hash of all that the answers follow from."""
    files = [images / name for name in truth.file_names]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{missing[0]}: image not found, {len(missing)} of {len(files)} are not")
    data, task = hidden_objects(teacher), teacher.recipe.task
    about = [
        _VERSION,
        [weights_hash(model, str(model)) for model in models],
        [data.size, data.shape, task.name],
        found.sha256,
        [(file.name, file.stat().st_size) for file in files],
        [asking.most, asking.same_place, asking.sure, asking.same_object],
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]


def _plans(truth: Truth, found: Detections, asking: Asking) -> tuple[list[_Plan], Ints]:
    """The questions of each image, and each detection's."""
    question = np.full(len(found.scores), -1, np.int64)
    sides = corners(found.boxes.xywh).astype(np.float32)  # as a question has them
    some = np.all(sides[:, 2:] > sides[:, :2], axis=1)  # of an empty box nothing can be hidden
    plans = []
    count = 0
    for image, rows in enumerate(by_image(found.boxes, len(truth.image_ids))):
        rows = rows[some[rows]]
        best = rows[np.argsort(-found.scores[rows], kind="stable")][: asking.most]
        if not len(best):
            continue
        overlaps = _overlaps(found.boxes.xywh[best])
        place = group_boxes(overlaps, asking.same_place)
        asked = np.unique(place)
        question[best] = count + np.searchsorted(asked, place)
        count += len(asked)
        surest = np.flatnonzero(found.scores[best] >= asking.sure)
        alone = surest[np.unique(group_boxes(overlaps[np.ix_(surest, surest)], asking.same_object))]
        told = [best[alone[overlaps[one, alone] < asking.same_object]] for one in asked]
        plans.append(_Plan(image, best[asked], told))
    return plans, question


def _overlaps(xywh: Floats) -> Floats:
    """(n, n) IoU."""
    overlaps: Floats = coco_masks.iou(xywh, xywh, np.zeros(len(xywh), np.uint8))
    return overlaps


def group_boxes(overlaps: Floats, least: float) -> Ints:
    """Greedy groups: a box joins the first one before it that leads a group and overlaps enough.

    Args:
        overlaps: (n, n) IoU of boxes in falling order of score.
        least: Overlap from which a box joins.

    Returns:
        (n,) the leader of each box, itself where it leads.
    """
    leader = np.full(len(overlaps), -1, np.int64)
    for box in range(len(overlaps)):
        if leader[box] < 0:
            joins = (leader < 0) & (overlaps[box] >= least)
            leader[joins] = box
            leader[box] = box
    return leader


def _questions(
    plans: Sequence[_Plan], truth: Truth, found: Detections, images: Path, size: int
) -> Iterator[Question]:
    """One question for each asked box, its own neighbours told; of one reading of the image."""
    for plan in plans:
        height, width = truth.sizes[plan.image].tolist()
        path = images / truth.file_names[plan.image]
        image = read_image(path, size, expected=(height, width))
        scale = np.array([image.shape[2] / width, image.shape[1] / height] * 2)
        for asked, told in zip(plan.asked, plan.told, strict=True):
            rows = np.append(told, asked)
            boxes = corners(found.boxes.xywh[rows]) * scale
            labels = np.append(found.boxes.label[told], -1)
            yield Question(
                image=image,
                boxes=torch.from_numpy(boxes).float(),
                labels=torch.from_numpy(labels),
                hidden=torch.tensor([len(told)]),
            )
