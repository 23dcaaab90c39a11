"""Evaluate students, teachers and detectors on objects in and out of context."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kd.config.reader import read_yaml
from kd.context.pasting.make import open_set, source_photos
from kd.context.pasting.pairs import intersections
from kd.context.pasting.write import SETS
from kd.distillation.student import AdaptedStudent
from kd.engine.loop import evaluate
from kd.evaluation.predict import open_run
from kd.formats.coco import CocoIndex
from kd.formats.coco_results import by_image, corners, read_detections, read_truth
from kd.metrics.bootstrap import paired_bootstrap
from kd.metrics.records import Records
from kd.metrics.registry import Metric
from kd.problems.context import object_scenes
from kd.problems.results import Results
from kd.report.tables import Table, distill_table
from kd.runs.build import make_accelerator
from kd.runs.read import is_distill, read_distill, results_of
from kd.runs.train import val_loader

_log = logging.getLogger("kd")
METRICS = ("top1", "mean_class_top1", "top5", "nll")
MATCH_IOU = 0.5  # least IoU of a detection with the pasted object
# Columns of the tables; the first is the baseline.
_ORDER = ("out", "in", "original")


def report_runs(
    folder: Path, runs: Sequence[Path], settings: Sequence[str], *, variants: Sequence[str] | None
) -> list[Table]:
    """Tabulate accuracy in and out of context.

    Args:
        folder: Output folder of `python -m kd.out_of_context make`.
        runs: Run folders of teachers, variants of a distillation, or whole distillations.
        settings: Overrides `data.KEY=VALUE` of each run's dataset.
        variants: Variants of distillations to include beside `plain`; None for all.

    Returns:
        One table per run or variant that compares the datasets. A distillation also has one table
        per dataset that compares its variants.
    """
    open_set(folder, "in")  # fail before runs are evaluated, which takes minutes
    tables = []
    for run in runs:
        if not is_distill(run):
            results = results_of(read_yaml(run / "config.yaml"), run)
            tables.append(_by_set(str(run), results, [_evaluate(run, folder, settings)], [0]))
            continue
        found = read_distill(run, variants)
        results = found.variants["plain"][0].results
        records = {
            variant: [_evaluate(one.folder, folder, settings) for one in many]
            for variant, many in found.variants.items()
        }
        tables += [
            _by_set(f"{run}: {name}", results, records[name], found.seeds) for name in records
        ]
        for name in _ORDER if len(records) > 1 else ():
            by_variant = {variant: [one[name] for one in many] for variant, many in records.items()}
            title = f"{run}: variants on {folder.name}/{name}"
            tables.append(
                distill_table(results, by_variant, found.seeds, metrics=METRICS, title=title)
            )
    return tables


def _by_set(
    title: str, results: Results, runs: Sequence[Mapping[str, Records]], seeds: Sequence[int]
) -> Table:
    by_set = {name: [records[name] for records in runs] for name in _ORDER}
    return distill_table(results, by_set, seeds, metrics=METRICS, title=title, baseline=_ORDER[0])


def _evaluate(run: Path, folder: Path, settings: Sequence[str]) -> dict[str, Records]:
    """Evaluate a run on the three datasets; image ids become those of source photographs."""
    config, opened, model, task = open_run(run, settings)
    data = object_scenes(opened)
    accelerator = make_accelerator(config["train"]["precision"])
    model = AdaptedStudent(model).to(accelerator.device)
    sources = source_photos(folder)
    classes = data.class_info()._replace(visible=None)
    predictions: dict[str, Records] = {}
    for name in SETS:
        index = open_set(folder, name, categories_from=data.train)
        metric = task.metric(
            classes._replace(confusable=index.confusable_groups, where=f"{folder}/{name}")
        )
        batch_size = int(config["train"]["batch_size"])
        loader = val_loader(data.evaluated_on(index), batch_size, accelerator)
        evaluate(model, task, loader, metric, accelerator)
        records = metric.records()
        photographs = np.array([sources[int(key)] for key in records["object_ids"]], np.int64)
        predictions[name] = {**records, "image_ids": photographs}
    _log.info("%s: evaluated", run)
    return predictions


def report_detections(folder: Path, inside: Path, outside: Path) -> Table:
    """Tabulate how often a detector finds the pasted object, and how often with its true class.

    `folder` is the output folder of `make`. `inside` and `outside` are COCO results files of the
    detector on `in/` and `out/`.
    """
    sources = source_photos(folder)
    matched = {}
    for name, file in (("in", inside), ("out", outside)):
        index = open_set(folder, name)
        matched[name] = match_detections(index, file)
    groups = np.array([sources[int(key)] for key in matched["in"][0]], np.int64)
    rows = []
    for place, what in ((1, "detected (IoU >= 0.5)"), (2, "detected and correctly classified")):
        a, b = matched["out"][place], matched["in"][place]
        metric = Metric(what, unit="%")
        cells = [metric.text(part.mean()) for part in (a, b)]
        rows.append((metric.label, *cells, metric.change(paired_bootstrap(a, b, groups))))
    note = "*: the 95 % interval, photographs resampled, excludes zero"
    header = ("pasted objects", "out", "in", "in - out")
    return Table(f"{inside.name}, {outside.name}", header, (tuple(rows),), (note,))


def match_detections(
    index: CocoIndex, results: Path
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Match each pasted object with the best-scored detection of IoU `MATCH_IOU` or more.

    Returns three arrays (K,): ids of the scored objects, ascending; 1 if the object is detected,
    else 0; and 1 if it is also correctly classified, else 0.
    """
    assert index.scored is not None
    truth = read_truth(index.annotation_file)
    found = read_detections(results, truth)
    rows = np.flatnonzero(index.scored)
    rows = rows[np.argsort(index.object_ids[rows])]
    images = truth.image_ids.tolist()
    of_image = dict(zip(images, by_image(found.boxes, len(images)), strict=True))
    detected, classified = np.zeros(len(rows)), np.zeros(len(rows))
    for place, row in enumerate(rows.tolist()):
        mine = of_image[int(index.image_ids[index.image_of(row)])]
        boxes, box = corners(found.boxes.xywh[mine]), index.boxes[row].astype(np.float64)
        shared = intersections(box, boxes)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
        overlapping = mine[shared >= MATCH_IOU * (areas - shared)]
        if len(overlapping):
            best = overlapping[found.scores[overlapping].argmax()]
            detected[place] = 1
            category = truth.category_ids[found.boxes.label[best]]
            classified[place] = category == index.category_ids[index.labels[row]]
    return index.object_ids[rows].astype(np.int64), detected, classified
