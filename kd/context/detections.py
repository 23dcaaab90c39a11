"""Predict the classes of a detector's boxes from their context, with a cache.

Detections that overlap well share one query, at the box with the best score. A teacher that reads
objects is given confident detections, never the ground truth.
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
from kd.metrics.records import save_records
from kd.nn.weights import weights_hash
from kd.problems.context import hidden_objects
from kd.runs.load_teacher import TrainedTeacher, fold_models
from kd.utils.images import read_image

_log = logging.getLogger("kd")
_VERSION = 1
# Regions in one pass; few on a CPU, so that they fit its cache (44 instead of 72 ms per region).
_BATCH, _CPU_BATCH = 64, 4

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class QueryOptions:
    """How detections become queries.

    Attributes:
        most: Largest number of detections queried per image, the best-scored first.
        same_place: Least IoU at which detections share a query.
        sure: Least score at which a detection is given to the teacher as an object.
        same_object: Least IoU with the queried box at which a detection is not given to the
            teacher, because it may be the queried object.
    """

    most: int = 100
    same_place: float = 0.7
    sure: float = 0.3
    same_object: float = 0.5


@dataclass(frozen=True)
class _Plan:
    """Queries of one image: rows of the queried detections and, for each, rows of its inputs."""

    image: int
    queried: Ints
    inputs: list[Ints]


def context_of(
    teacher: TrainedTeacher,
    truth: Truth,
    found: Detections,
    images: Path,
    cache: Path,
    *,
    device: torch.device,
    options: QueryOptions | None = None,
) -> tuple[npt.NDArray[np.float32], Ints]:
    """Predict the classes of D detections from their context, or read cached predictions.

    If the teacher was trained on these images with folds, its held-out fold models predict.

    Args:
        teacher: A context teacher.
        truth: Lists the images; its objects are not used.
        found: The detections.
        images: Image folder.
        cache: Folder of the cache file, whose name contains a hash of all inputs.
        device: Device for the teacher.
        options: How detections become queries.

    Returns:
        Log-probabilities (K, C) of K queries, and each detection's query (D,), -1 for none.
    """
    options = options or QueryOptions()
    models = _models(teacher, truth)
    key = _key(teacher, models, truth, found, images, options)
    path = cache / f"context-{found.path.stem}-{key}.npz"
    if path.is_file():
        with np.load(path) as stored:
            _log.info("%s: using cached predictions", path)
            return stored["log_probs"], stored["question"]
    plans, question = _plans(truth, found, options)
    log_probs = np.zeros((question.max(initial=-1) + 1, len(truth.class_names)), np.float32)
    folds = fold_of(truth.image_ids, len(models)) if len(models) > 1 else None
    most = _CPU_BATCH if device.type == "cpu" else _BATCH
    with ProgressBar(f"context of {found.path.name}", len(log_probs), 0, enabled=True) as advance:
        done = 0
        for number, model in enumerate(models):
            mine = [plan for plan in plans if folds is None or folds[plan.image] == number]
            rows = [int(question[row]) for plan in mine for row in plan.queried]
            queries = _questions(mine, truth, found, images, hidden_objects(teacher).size)
            start = 0
            for part in expectations(
                teacher, queries, device=device, model=model, most_inputs=most
            ):
                log_probs[rows[start : start + len(part)]] = part.numpy()
                start, done = start + len(part), done + len(part)
                advance(Progress(step=done), 0)

    save_records({"log_probs": log_probs, "question": question}, path)
    return log_probs, question


def _models(teacher: TrainedTeacher, truth: Truth) -> list[torch.nn.Module]:
    """Return the teacher's model, or its fold models if it was trained on these images."""
    train = teacher.problem.train_annotations(teacher.section)
    same = train is not None and read_json(train)[1] == read_json(truth.path)[1]
    if not same:
        return [teacher.model]
    if teacher.recipe.folds < 2:
        _log.warning(
            "%s: the teacher was trained on these images, without folds: its predictions are more "
            "confident here than on other images; train it with --set folds=5",
            truth.path,
        )
        return [teacher.model]
    _log.info("%s: the teacher was trained on these images; using its fold models", truth.path)
    return fold_models(teacher, len(truth.class_names))


def _key(
    teacher: TrainedTeacher,
    models: Sequence[torch.nn.Module],
    truth: Truth,
    found: Detections,
    images: Path,
    options: QueryOptions,
) -> str:
    """Hash everything that the predictions depend on."""
    files = [images / name for name in truth.file_names]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(
            f"{missing[0]}: image not found; {len(missing)} of {len(files)} are missing"
        )
    data, task = hidden_objects(teacher), teacher.recipe.task
    about = [
        _VERSION,
        [weights_hash(model, str(model)) for model in models],
        [data.size, data.shape, task.name],
        found.sha256,
        [(file.name, file.stat().st_size) for file in files],
        [options.most, options.same_place, options.sure, options.same_object],
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]


def _plans(truth: Truth, found: Detections, options: QueryOptions) -> tuple[list[_Plan], Ints]:
    """Plan the queries of each image; also return each detection's query (D,), -1 for none."""
    question = np.full(len(found.scores), -1, np.int64)
    sides = corners(found.boxes.xywh).astype(np.float32)  # precision of `Question.boxes`
    usable = np.all(sides[:, 2:] > sides[:, :2], axis=1)  # an empty box hides nothing
    plans = []
    count = 0
    for image, rows in enumerate(by_image(found.boxes, len(truth.image_ids))):
        rows = rows[usable[rows]]
        best = rows[np.argsort(-found.scores[rows], kind="stable")][: options.most]
        if not len(best):
            continue
        xywh = found.boxes.xywh[best]
        overlaps: Floats = coco_masks.iou(xywh, xywh, np.zeros(len(xywh), np.uint8))
        place = group_boxes(overlaps, options.same_place)
        queried = np.unique(place)
        question[best] = count + np.searchsorted(queried, place)
        count += len(queried)
        sure = np.flatnonzero(found.scores[best] >= options.sure)
        alone = sure[np.unique(group_boxes(overlaps[np.ix_(sure, sure)], options.same_object))]
        inputs = [best[alone[overlaps[one, alone] < options.same_object]] for one in queried]
        plans.append(_Plan(image, best[queried], inputs))
    return plans, question


def group_boxes(overlaps: Floats, least: float) -> Ints:
    """Group boxes greedily, as non-maximum suppression does.

    `overlaps` (n, n) is the IoU of boxes sorted by descending score. A box joins the group of a
    better-scored box if their IoU is at least `least`. Returns each group's best box, (n,).
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
    for plan in plans:
        height, width = truth.sizes[plan.image].tolist()
        path = images / truth.file_names[plan.image]
        image = read_image(path, size, expected=(height, width))
        scale = np.array([image.shape[2] / width, image.shape[1] / height] * 2)
        for queried, inputs in zip(plan.queried, plan.inputs, strict=True):
            rows = np.append(inputs, queried)
            boxes = corners(found.boxes.xywh[rows]) * scale
            labels = np.append(found.boxes.label[inputs], -1)
            yield Question(
                image=image,
                boxes=torch.from_numpy(boxes).float(),
                labels=torch.from_numpy(labels),
                hidden=torch.tensor([len(inputs)]),
            )
