"""Create, open and inspect out-of-context datasets."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.progress import track

from kd.context.pasting import PasteOptions
from kd.context.pasting.pairs import (
    Floats,
    Ints,
    Pair,
    Score,
    has_outline,
    interleave_classes,
    is_whole,
    matched_pairs,
    score_placements,
)
from kd.context.pasting.seams import RING, outline_features, separability
from kd.context.pasting.write import SETS, Paster, write_sets
from kd.errors import UserError
from kd.formats.coco import CocoIndex, load_coco
from kd.formats.coco_validate import read_json
from kd.nn.cooccurrence import NaiveBayes, Objects
from kd.problems.context import ObjectScenes
from kd.report.style import ORANGE, save_figure
from kd.utils.images import read_image
from kd.utils.io import new_folder

_log = logging.getLogger("kd")
METADATA = "out_of_context.json"
MIN_PAIRS = 10  # least number of pairs
_CANDIDATES = 1.5  # candidate objects per pair
_DRAWN = 6  # pairs in the figure


def make_sets(data: ObjectScenes, out: Path, options: PasteOptions) -> dict[str, Any]:
    """Choose pairs and write the three datasets, a figure and `out_of_context.json`.

    `out` is created only when complete. Returns the content of `out_of_context.json`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; choose another --out or delete it")
    index = data.split(options.split)
    random = np.random.default_rng(options.seed)
    rows = _rows_to_cut(index, data, options, random)
    _log.info("counting co-occurrences in %d train images", len(data.train))
    log_prior = np.log(data.prior())
    model = NaiveBayes(data.num_classes, evidence=("company", "place", "size"))
    data.problem.fit(model, data)
    score = cooccurrence_score(model.eval(), index, log_prior)
    filled = np.flatnonzero(np.diff(index.first))
    scenes = np.sort(random.permutation(filled)[: options.scenes])
    choices = score_placements(index, rows, scenes, score, _bar("scenes"))
    pairs = matched_pairs(choices, options.count, options.margin, random)
    if len(pairs) < MIN_PAIRS:
        raise UserError(
            f"{index.annotation_file}: {len(pairs)} of {len(rows)} objects have both a probable "
            f"and an improbable scene, {MIN_PAIRS} are needed; lower --margin "
            f"({options.margin}) or raise --scenes"
        )
    if len(pairs) < options.count:
        _log.warning("found only %d of %d pairs", len(pairs), options.count)
    about = _describe(data, index, pairs, options)
    with new_folder(out) as draft:
        paster = Paster(index, log_prior, harmony=options.harmony, seed=options.seed)
        write_sets(draft, paster, pairs, _bar("pairs"))
        (draft / METADATA).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        save_figure(pairs_figure(draft), draft / "pairs.png")
    return about


def _rows_to_cut(
    index: CocoIndex, data: ObjectScenes, options: PasteOptions, random: np.random.Generator
) -> Ints:
    """Choose annotation rows of whole objects with an outline, alternating between classes."""
    rows = np.arange(len(index.object_ids))
    with_outline = np.array([has_outline(index, row) for row in rows.tolist()], np.bool_)
    if not with_outline.any():
        raise UserError(
            f"{index.annotation_file}: no object has a segmentation, so none can be cut out"
        )
    counts = np.diff(index.first)
    areas = np.repeat(index.heights.astype(np.float64) * index.widths, counts)
    fractions = (index.boxes[:, 2:] - index.boxes[:, :2]).astype(np.float64).prod(axis=1) / areas
    low = max(options.min_fraction, data.section.min_fraction)
    high = min(options.max_fraction, data.section.max_fraction)
    fits = np.flatnonzero(with_outline & (fractions >= low) & (fractions <= high))
    found: list[int] = []
    for row in interleave_classes(index, fits, random).tolist():
        if len(found) >= _CANDIDATES * options.count:
            break
        if is_whole(index, row):
            found.append(row)
    if len(found) < MIN_PAIRS:
        raise UserError(
            f"{index.annotation_file}: {len(found)} of {len(fits)} objects between {low:.1%} and "
            f"{high:.1%} of the image are whole (off its border, in one piece, not occluded), "
            f"{MIN_PAIRS} are needed; change --min-fraction or --max-fraction"
        )
    return np.array(found, np.int64)


def cooccurrence_score(model: NaiveBayes, index: CocoIndex, log_prior: Floats) -> Score:
    """Build a function that scores placements by log p(class | scene) - log p(class)."""

    def score(image: int, classes: Ints, boxes: Floats) -> Floats:
        rows = index.rows_of(image)
        there = index.labels[rows].astype(np.int64)
        count, total = len(there), len(there) + len(boxes)
        sides = np.tile([index.widths[image], index.heights[image]], 2).astype(np.float64)
        placed = np.concatenate([index.boxes[rows], boxes]) / sides
        # Pasted objects are given without a class, so that all can be queried at once.
        labels = torch.full((total,), -1)
        labels[:count] = torch.from_numpy(there)
        objects = Objects(
            classes=labels,
            visible=labels >= 0,
            boxes=torch.from_numpy(placed).float().clamp(0, 1),
            aspects=torch.full((total,), float(sides[0] / sides[1])),
            image_of=torch.zeros(total, dtype=torch.int64),
        )
        log_probs = model(objects, torch.arange(count, total)).double().numpy()
        lifts = log_probs[np.arange(len(boxes)), classes] - log_prior[classes]
        return np.asarray(lifts, dtype=np.float64)

    return score


def _bar(what: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    console = Console(stderr=True)
    return lambda items: track(items, what, console=console, disable=not sys.stderr.isatty())


def _describe(
    data: ObjectScenes, index: CocoIndex, pairs: list[Pair], options: PasteOptions
) -> dict[str, Any]:
    return {
        "data": data.section.name,
        "annotations": str(index.annotation_file),
        "fingerprint": index.fingerprint,
        "options": vars(options),
        "pairs": len(pairs),
        "classes": len({int(index.labels[pair.row]) for pair in pairs}),
        "scenes": len({pair.inside.image for pair in pairs}),
        "mean_log_lift": {
            "in": float(np.mean([pair.inside.lift for pair in pairs])),
            "out": float(np.mean([pair.outside.lift for pair in pairs])),
        },
    }


def open_set(folder: Path, name: str, categories_from: CocoIndex | None = None) -> CocoIndex:
    """Open the dataset `in`, `out` or `original` in a folder that `make_sets` wrote.

    Raises:
        UserError: Not such a folder, or its categories differ from those of `categories_from`.
    """
    if not (folder / METADATA).is_file():
        raise UserError(
            f"{folder}: not an out-of-context set; create one with: "
            f"python -m kd.out_of_context make --data NAME --out {folder}"
        )
    file = folder / "annotations" / f"instances_{name}.json"
    return load_coco(file, folder / name, categories_from=categories_from)


def source_photos(folder: Path) -> dict[int, int]:
    """Map object ids to image ids of source photographs, the clusters of the bootstrap."""
    return {key: int(paste["source_image"]) for key, paste in _pastes(folder, "in").items()}


def _pastes(folder: Path, name: str) -> dict[int, dict[str, Any]]:
    content, _ = read_json(folder / "annotations" / f"instances_{name}.json")
    return {entry["id"]: entry["paste"] for entry in content["annotations"] if entry["scored"]}


def check_seams(folder: Path) -> Iterator[str]:
    """Yield report lines with the seam AUC of each pair of datasets."""
    found = {name: outline_features(open_set(folder, name)) for name in SETS}
    sources = source_photos(folder)
    groups = np.array([sources[int(key)] for key in found["in"][0]], np.int64)
    for one, other in (("in", "out"), ("original", "in"), ("original", "out")):
        first, second = found[one][1], found[other][1]
        ring = separability(first[:, :RING], second[:, :RING], groups)
        outline = separability(first, second, groups)
        yield (
            f"{one} vs. {other}: AUC {ring.auc:.3f} (standard error {ring.error:.3f}) from the "
            f"ring around the outline, {outline.auc:.3f} ({outline.error:.3f}) given the outline"
        )
    yield "An AUC of 0.5 means that seams do not reveal the pastes."


def pairs_figure(folder: Path) -> Figure:
    """Draw the first objects in their source photograph, probable scene and improbable scene."""
    sets = {name: open_set(folder, name) for name in ("original", "in", "out")}
    lifts = {
        (name, key): paste["log_lift"]
        for name in ("in", "out")
        for key, paste in _pastes(folder, name).items()
    }
    count = min(_DRAWN, len(sets["in"]))
    figure = Figure(figsize=(7.2, 2.0 * count), layout="constrained")
    for image, line in enumerate(figure.subplots(count, 3, squeeze=False)):
        for axes, (name, index) in zip(line, sets.items(), strict=True):
            rows = index.rows_of(image)
            number = int(index.image_ids[image])
            row = int(rows[index.object_ids[rows] == number][0])
            axes.imshow(read_image(index.path(image), None).permute(1, 2, 0).numpy())
            x1, y1, x2, y2 = index.boxes[row].tolist()
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=ORANGE, lw=1))
            axes.set_axis_off()
            title = f"{index.class_names[index.labels[row]]}, original"
            if name != "original":
                title = f"{name}: {lifts[name, number]:+.1f} nats"
            axes.set_title(title, fontsize=8)
    return figure
