"""The out-of-context test: sets made from an opened data set, opened again, and looked at."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.progress import track

from kd.context.pasting.pairs import (
    Floats,
    Ints,
    Pair,
    Score,
    all_choices,
    can_be_cut,
    has_outline,
    matched_pairs,
    turns,
)
from kd.context.pasting.seams import RING, Verdict, features_of, told_apart
from kd.context.pasting.write import SETS, Paster, write_sets
from kd.errors import UserError
from kd.formats.coco import CocoIndex, load_coco
from kd.formats.coco_validate import read_json
from kd.nn.cooccurrence import NaiveBayes, Objects
from kd.problems.objects.baselines import fit_cooccurrence
from kd.problems.objects.data import ObjectsDataset
from kd.report.style import save_figure
from kd.utils.images import read_image
from kd.utils.io import PARTIAL

_log = logging.getLogger("kd")
ABOUT = "out_of_context.json"
FEWEST = 10  # pairs; less than that says nothing
_TRIED = 1.5  # objects looked at for each pair wanted
_SHOWN = 6  # pairs on the picture


@dataclass(frozen=True)
class Wanted:
    """What a set is to be.

    Attributes:
        split: Whose objects and scenes are taken.
        count: Pairs.
        margin: Nats that an object is likelier than its class share in the one scene, and less
            likely in the other.
        min_share: Smallest box, as a share of the picture.
        max_share: Largest box.
        scenes: Most scenes tried.
        harmony: How far an object's light moves towards its new scene's, 0..1.
        seed: Of everything random.
    """

    split: Literal["train", "val"] = "val"
    count: int = 300
    margin: float = 1.0
    min_share: float = 0.005
    max_share: float = 0.25
    scenes: int = 500
    harmony: float = 0.3
    seed: int = 0


def make_sets(data: ObjectsDataset, out: Path, wanted: Wanted) -> dict[str, Any]:
    """Choose pairs and write the three sets with their picture; `out` is whole or not there.

    Returns:
        What `out_of_context.json` says.

    Raises:
        UserError: `out` is in use, no object has an outline, or too few pairs are to be had.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; name another --out or delete it")
    index = data.train if wanted.split == "train" else data.val
    random = np.random.default_rng(wanted.seed)
    rows = _rows_to_cut(index, data, wanted, random)
    _log.info("counting what comes with what on %d train images", len(data.train))
    log_prior = np.log(data.prior())
    score = cooccurrence_score(fit_cooccurrence(data.train), index, log_prior)
    filled = np.flatnonzero(np.diff(index.first))
    scenes = np.sort(random.permutation(filled)[: wanted.scenes])
    choices = all_choices(index, rows, scenes, score, _bar("scenes"))
    pairs = matched_pairs(choices, wanted.count, wanted.margin, random)
    if len(pairs) < FEWEST:
        raise UserError(
            f"{index.annotation_file}: {len(pairs)} of {len(rows)} objects have both a probable "
            f"and an improbable scene, {FEWEST} are needed; lower --margin ({wanted.margin}) or "
            "raise --scenes"
        )
    if len(pairs) < wanted.count:
        _log.warning("%d pairs, not the %d asked for", len(pairs), wanted.count)
    about = _describe(data, index, pairs, wanted)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=PARTIAL, dir=out.parent))
    except OSError as error:
        raise UserError(f"{out}: cannot make this folder ({error.strerror})") from error
    try:
        paster = Paster(index, log_prior, harmony=wanted.harmony, seed=wanted.seed)
        write_sets(draft, paster, pairs, _bar("pairs"))
        (draft / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        draft.chmod(0o755)  # mkdtemp's 0700 would keep others from reading the sets
        save_figure(pairs_figure(draft), draft / "pairs.png")
        draft.replace(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return about


def _rows_to_cut(
    index: CocoIndex, data: ObjectsDataset, wanted: Wanted, random: np.random.Generator
) -> Ints:
    """Whole objects with an outline, classes taking turns."""
    rows = np.arange(len(index.object_ids))
    with_outline = np.array([has_outline(index, row) for row in rows.tolist()], np.bool_)
    if not with_outline.any():
        raise UserError(
            f"{index.annotation_file}: no object has a segmentation; without outlines nothing can "
            "be cut out"
        )
    counts = np.diff(index.first)
    pictures = np.repeat(index.heights.astype(np.float64) * index.widths, counts)
    shares = (index.boxes[:, 2:] - index.boxes[:, :2]).astype(np.float64).prod(axis=1) / pictures
    low = max(wanted.min_share, data.section.min_share)
    high = min(wanted.max_share, data.section.max_share)
    fits = np.flatnonzero(with_outline & (shares >= low) & (shares <= high))
    found: list[int] = []
    for row in turns(index, fits, random).tolist():
        if len(found) >= _TRIED * wanted.count:
            break
        if can_be_cut(index, row):
            found.append(row)
    if len(found) < FEWEST:
        raise UserError(
            f"{index.annotation_file}: {len(found)} of {len(fits)} objects between {low:.1%} and "
            f"{high:.1%} of the picture are whole (off its border, in one piece, not covered), "
            f"{FEWEST} are needed; change --min-share, --max-share"
        )
    return np.array(found, np.int64)


def cooccurrence_score(model: NaiveBayes, index: CocoIndex, log_prior: Floats) -> Score:
    """How much likelier than its share a class is at a box of an image, given its company."""

    def score(image: int, classes: Ints, boxes: Floats) -> Floats:
        rows = slice(int(index.first[image]), int(index.first[image + 1]))
        there = index.labels[rows].astype(np.int64)
        count, total = len(there), len(there) + len(boxes)
        sides = np.tile([index.widths[image], index.heights[image]], 2).astype(np.float64)
        placed = np.concatenate([index.boxes[rows], boxes]) / sides
        # Guests of no known class say nothing about each other: all are asked about at once.
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
    data: ObjectsDataset, index: CocoIndex, pairs: list[Pair], wanted: Wanted
) -> dict[str, Any]:
    lifts = {
        "in": [pair.inside.lift for pair in pairs],
        "out": [pair.outside.lift for pair in pairs],
    }
    return {
        "data": data.section.name,
        "annotations": str(index.annotation_file),
        "fingerprint": index.fingerprint,
        "wanted": vars(wanted),
        "pairs": len(pairs),
        "classes": len({int(index.labels[pair.row]) for pair in pairs}),
        "scenes": len({pair.inside.image for pair in pairs}),
        "mean_log_lift": {name: float(np.mean(values)) for name, values in lifts.items()},
    }


def open_set(folder: Path, name: str, categories_from: CocoIndex | None = None) -> CocoIndex:
    """One of the three sets below a folder that `make_sets` wrote.

    Raises:
        UserError: It is no such folder, or its classes are others.
    """
    if not (folder / ABOUT).is_file():
        raise UserError(
            f"{folder}: holds no out-of-context set; make one with: "
            f"python -m kd.data.out_of_context make --data NAME --out {folder}"
        )
    file = folder / "annotations" / f"instances_{name}.json"
    return load_coco(file, folder / name, categories_from=categories_from)


def source_images(folder: Path) -> dict[int, int]:
    """Object id -> the photograph that it comes from: what intervals are drawn over."""
    content, _ = read_json(folder / "annotations" / "instances_in.json")
    return {a["id"]: a["paste"]["source_image"] for a in content["annotations"] if a["asked"]}


def check_seams(folder: Path) -> list[tuple[str, str, Verdict, Verdict]]:
    """How well seams alone tell sets apart, two by two: from the ring, and given the outline."""
    found = {name: features_of(open_set(folder, name)) for name in SETS}
    sources = source_images(folder)
    groups = np.array([sources[int(key)] for key in found["in"][0]], np.int64)
    verdicts = []
    for one, other in (("in", "out"), ("original", "in"), ("original", "out")):
        first, second = found[one][1], found[other][1]
        ring = told_apart(first[:, :RING], second[:, :RING], groups)
        verdicts.append((one, other, ring, told_apart(first, second, groups)))
    return verdicts


def pairs_figure(folder: Path) -> Figure:
    """The first objects, each at home, where it belongs and where it does not."""
    sets = {name: open_set(folder, name) for name in ("original", "in", "out")}
    count = min(_SHOWN, len(sets["in"]))
    figure = Figure(figsize=(7.2, 2.0 * count), layout="constrained")
    FigureCanvasAgg(figure)
    content, _ = read_json(folder / "annotations" / "instances_in.json")
    lifts = {("in", a["id"]): a["paste"]["log_lift"] for a in content["annotations"] if a["asked"]}
    content, _ = read_json(folder / "annotations" / "instances_out.json")
    lifts |= {
        ("out", a["id"]): a["paste"]["log_lift"] for a in content["annotations"] if a["asked"]
    }
    every = figure.subplots(count, 3, squeeze=False)
    for image, line in enumerate(every):
        for axes, (name, index) in zip(line, sets.items(), strict=True):
            _draw(axes, index, image)
            number = int(index.image_ids[image])
            lift = lifts.get((name, number))
            axes.set_title(
                _title(index, image) if lift is None else f"{name}: {lift:+.1f} nats", fontsize=8
            )
    return figure


def _asked_row(index: CocoIndex, image: int) -> int:
    rows = np.arange(int(index.first[image]), int(index.first[image + 1]))
    return int(rows[np.flatnonzero(index.object_ids[rows] == index.image_ids[image])[0]])


def _title(index: CocoIndex, image: int) -> str:
    return f"{index.class_names[index.labels[_asked_row(index, image)]]}, at home"


def _draw(axes: Axes, index: CocoIndex, image: int) -> None:
    axes.imshow(read_image(index.path(image), None).permute(1, 2, 0).numpy())
    x1, y1, x2, y2 = index.boxes[_asked_row(index, image)].tolist()
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color="#E69F00", linewidth=1))
    axes.set_axis_off()
