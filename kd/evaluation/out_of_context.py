"""Evaluate students, teachers and detectors on objects in and out of context."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.context.pasting.make import open_set, source_photos
from kd.context.pasting.pairs import intersections
from kd.context.pasting.write import SETS
from kd.distillation.student import AdaptedStudent
from kd.engine.loop import evaluate
from kd.errors import UserError
from kd.evaluation.predict import open_run
from kd.formats.coco import CocoIndex
from kd.formats.coco_validate import is_number, read_json
from kd.metrics.bootstrap import paired_bootstrap
from kd.metrics.records import Records
from kd.problems.objects.data import of_objects
from kd.problems.objects.evaluation import ObjectResults
from kd.problems.objects.metric import TopN
from kd.report.tables import Table, distill_table
from kd.runs.build import make_accelerator, make_loader
from kd.runs.read import is_distill

_log = logging.getLogger("kd")
_RESULTS = ObjectResults()
METRICS = ("top1", "mean_class_top1", "top5", "nll")
MATCH_IOU = 0.5  # least IoU of a detection with the pasted object
# Columns; the first is the baseline of the comparison.
_ORDER = ("out", "in", "original")

Runs = dict[str, list[Path]]


def report_runs(
    folder: Path, runs: Sequence[Path], settings: Sequence[str], *, variants: Sequence[str] | None
) -> list[Table]:
    """Tabulate accuracy in and out of context, by run or variant and between variants.

    Args:
        folder: What `python -m kd.out_of_context make` wrote.
        runs: Teachers, variants of a distillation, or whole distillations.
        settings: `data.a=value`, applied to the dataset in each run's config.
        variants: Of distillations, only these.

    Returns:
        A table for each run or variant that compares the datasets; for a distillation also one for
        each dataset that compares the variants.
    """
    open_set(folder, "in")  # fail before the first run's minutes
    tables = []
    for run in runs:
        if not is_distill(run):
            tables.append(_by_set(str(run), [_evaluate(run, folder, settings)], [0]))
            continue
        seeds, found = _variants_of(run, variants)
        records = {
            variant: [_evaluate(place, folder, settings) for place in places]
            for variant, places in found.items()
        }
        tables += [_by_set(f"{run}: {variant}", records[variant], seeds) for variant in records]
        if "plain" in records and len(records) > 1:
            for name in _ORDER:
                by_variant = {
                    variant: [one[name] for one in many] for variant, many in records.items()
                }
                title = f"{run}: variants on {folder.name}/{name}"
                tables.append(
                    distill_table(_RESULTS, by_variant, seeds, metrics=METRICS, title=title)
                )
    return tables


def _variants_of(run: Path, selected: Sequence[str] | None) -> tuple[list[int], Runs]:
    """Seeds of a distillation, and each variant's folder for every seed; `plain` comes first."""
    places = sorted(run.glob("seed*/*/model.safetensors"))
    seeds = sorted({int(place.parent.parent.name.removeprefix("seed")) for place in places})
    names = sorted(
        {place.parent.name for place in places}, key=lambda name: (name != "plain", name)
    )
    if selected and (unknown := [name for name in selected if name not in names]):
        raise UserError(f"{run}: no variant {unknown[0]!r}; expected one of {', '.join(names)}")
    variants: Runs = {}
    for name in selected or names:
        variants[name] = [run / f"seed{seed}" / name for seed in seeds]
        lacking = [p for p in variants[name] if not (p / "model.safetensors").is_file()]
        if lacking:
            raise UserError(f"{lacking[0]}: not finished; leave this variant out with --variants")
    return seeds, variants


def _by_set(title: str, runs: Sequence[Mapping[str, Records]], seeds: Sequence[int]) -> Table:
    by_set = {name: [records[name] for records in runs] for name in _ORDER}
    return distill_table(_RESULTS, by_set, seeds, metrics=METRICS, title=title, baseline=_ORDER[0])


def _evaluate(run: Path, folder: Path, settings: Sequence[str]) -> dict[str, Records]:
    """Evaluate a run on the three datasets; image ids become those of the source photographs."""
    config, opened, model, task = open_run(run, settings)
    data = of_objects(opened)
    accelerator = make_accelerator(config["train"]["precision"])
    prior = data.prior()
    # Score every pasted object, whatever object sizes the run was evaluated on.
    section = data.section.model_copy(
        update={"min_fraction": 0.0, "max_fraction": 1.0, "prepared": None}
    )
    model = AdaptedStudent(model).to(accelerator.device)
    sources = source_photos(folder)
    predictions: dict[str, Records] = {}
    for name in SETS:
        index = open_set(folder, name, categories_from=data.train)
        confusable, where = index.confusable_groups, f"{folder}/{name}"
        metric = TopN(data.num_classes, prior=prior, confusable=confusable, where=where)
        samples = replace(data, section=section, val=index).samples("val")
        loader = make_loader(
            samples, accelerator, batch_size=int(config["train"]["batch_size"]),
            workers=section.workers,
        )  # fmt: skip
        evaluate(model, task, loader, metric, accelerator)
        records = metric.records()
        photographs = np.array([sources[int(key)] for key in records["object_ids"]], np.int64)
        predictions[name] = {**records, "image_ids": photographs}
    _log.info("%s: evaluated", run)
    return predictions


def report_detections(folder: Path, inside: Path, outside: Path) -> Table:
    """Tabulate how often a detector finds the pasted object, and how often with its true class.

    Args:
        folder: What `make` wrote.
        inside: Results on `in/` in COCO format: image_id, category_id, bbox, score.
        outside: Likewise on `out/`.
    """
    sources = source_photos(folder)
    matched = {}
    for name, file in (("in", inside), ("out", outside)):
        index = open_set(folder, name)
        matched[name] = match_detections(index, _read_results(file, index))
    groups = np.array([sources[int(key)] for key in matched["in"][0]], np.int64)
    rows = []
    for place, what in ((1, "detected (IoU >= 0.5)"), (2, "detected and correctly classified")):
        a, b = matched["out"][place], matched["in"][place]
        gap = paired_bootstrap(a, b, groups)
        cells = [f"{100 * part.mean():.1f}" for part in (a, b)]
        mark = "*" if gap.clear_of_zero else " "
        bounds = f"{100 * gap.mean:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]{mark}"
        rows.append((what + " (%)", *cells, bounds))
    note = "*: the 95 % interval, photographs resampled, excludes zero"
    header = ("pasted objects", "out", "in", "in - out")
    return Table(f"{inside.name}, {outside.name}", header, (tuple(rows),), (note,))


def _read_results(file: Path, index: CocoIndex) -> dict[int, list[dict[str, Any]]]:
    content, _ = read_json(file)
    if not isinstance(content, list):
        raise UserError(f"{file}: expected a list of detections")
    found: dict[int, list[dict[str, Any]]] = {int(key): [] for key in index.image_ids}
    for place, entry in enumerate(content):
        box = entry.get("bbox") if isinstance(entry, dict) else None
        valid = isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
        if not valid or not is_number(entry.get("score")) or "category_id" not in entry:
            raise UserError(f"{file}: entry {place}: no image_id, category_id, bbox and score")
        if entry.get("image_id") not in found:
            raise UserError(
                f"{file}: entry {place}: image {entry.get('image_id')!r} is not in "
                f"{index.annotation_file}; are these the results on the other dataset?"
            )
        found[entry["image_id"]].append(entry)
    return found


def match_detections(
    index: CocoIndex, results: Mapping[int, Sequence[Mapping[str, Any]]]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Whether each pasted object was detected, and whether with its true class.

    The best-scored detection that overlaps the object by at least `MATCH_IOU` counts.

    Args:
        index: The dataset.
        results: Detections by image id.

    Returns:
        Ids of the scored objects, (K,) ascending; detected and correctly classified, (K,) 0 or 1.
    """
    assert index.scored is not None
    rows = np.flatnonzero(index.scored)
    rows = rows[np.argsort(index.object_ids[rows])]
    found, classified = np.zeros(len(rows)), np.zeros(len(rows))
    for place, row in enumerate(rows.tolist()):
        entries = results[int(index.image_ids[index.image_of(row)])]
        if not entries:
            continue
        corners = np.array([entry["bbox"] for entry in entries], np.float64)
        corners[:, 2:] += corners[:, :2]
        box = index.boxes[row].astype(np.float64)
        shared = intersections(box, corners)
        areas = (corners[:, 2:] - corners[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
        overlapping = np.flatnonzero(shared >= MATCH_IOU * (areas - shared))
        if len(overlapping):
            best = max(overlapping.tolist(), key=lambda one: float(entries[one]["score"]))
            found[place] = 1
            category = index.category_ids[index.labels[row]]
            classified[place] = entries[best]["category_id"] == category
    return index.object_ids[rows].astype(np.int64), found, classified
