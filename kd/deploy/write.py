"""Write the predictions of a trained model for a list of images."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from kd.deploy.model import TrainedModel
from kd.errors import UserError
from kd.formats.coco import CocoIndex, load_coco
from kd.formats.splits import image_files
from kd.problems.inference import Prediction
from kd.report.style import save_figure
from kd.utils.images import read_image
from kd.utils.io import output_names, write_atomic, write_text
from kd.version import __version__

PREDICTIONS = "predictions.json"
RESULTS = "results.json"


class ImageIds:
    """Ids and boxes that a COCO file gives to images and classes, found by their names.

    Args:
        file: COCO JSON; its images need not exist.
        class_names: The model's classes.

    Raises:
        UserError: The file cannot be read, two of its images have one name, or it lacks a class.
    """

    def __init__(self, file: Path, class_names: Sequence[str]) -> None:
        self.index: CocoIndex = load_coco(file, file.parent, check_images=False)
        names = [Path(self.index.file_name(row)).name for row in range(len(self.index))]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{file}: has several images called {twice[0]}")
        self.rows = {name: row for row, name in enumerate(names)}
        self.category_ids = dict(zip(self.index.class_names, self.index.category_ids, strict=True))
        if missing := [name for name in class_names if name not in self.category_ids]:
            raise UserError(f"{file}: has no class {missing[0]!r}, which the model predicts")

    def row(self, path: Path) -> int:
        """Position of an image in the file."""
        if path.name not in self.rows:
            raise UserError(f"{path}: not in {self.index.annotation_file}")
        return self.rows[path.name]

    def boxes(self, path: Path) -> Tensor:
        """Boxes of an image's objects, (K, 4) xyxy pixels."""
        return torch.from_numpy(self.index.boxes[self.index.rows_of(self.row(path))])


def write_predictions(
    model: TrainedModel,
    images: Sequence[Path],
    out: Path,
    *,
    annotations: Path | None = None,
    overlays: int = 16,
    least_score: float = 0.0,
    batch_size: int = 16,
) -> list[Path]:
    """Predict images and write the predictions below a folder.

    Boxes go to `predictions.json`, a COCO file with scores, and with `annotations` also to
    `results.json` in COCO's results format; maps to `maps/NAME.png`; drawings to
    `overlays/NAME.png`.

    Args:
        model: The model.
        images: Image files.
        out: Output folder.
        annotations: COCO file whose ids are used, and whose boxes are classified.
        overlays: Number of images to draw; -1: all.
        least_score: Smallest score of the boxes to write.
        batch_size: Images in one pass of the network.

    Returns:
        The files and folders that were written.

    Raises:
        UserError: An image cannot be read or is not in `annotations`, or the disk is full.
    """
    known = None if annotations is None else ImageIds(annotations, model.class_names)
    needs_boxes = model.inference.needs_boxes
    if needs_boxes and known is None:
        raise UserError(
            f"{model.where}: this model classifies objects in given boxes; name a COCO file with "
            "boxes of these images: --annotations COCO.json"
        )
    pairs = ((path, known.boxes(path) if needs_boxes and known else None) for path in images)
    entries: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    written: dict[Path, None] = {}
    count = len(images) if overlays < 0 else overlays
    names = output_names(images)
    watched = track(
        model.stream(pairs, batch_size=batch_size), "predicting", total=len(images),
        console=Console(stderr=True), disable=not sys.stderr.isatty(),
    )  # fmt: skip
    for number, prediction in enumerate(watched):
        path, (height, width) = images[number], prediction.size
        image_id = number + 1 if known is None else int(known.index.image_ids[known.row(path)])
        entries.append({"id": image_id, "file_name": str(path), "width": width, "height": height})
        rows = prediction.annotations()
        found += [{"image_id": image_id, **one} for one in rows if one["score"] >= least_score]
        for folder in _write_images(prediction, path, out, names[number], drawn=number < count):
            written[folder] = None
    if out / "maps" not in written:
        written |= dict.fromkeys(_write_boxes(model, out, entries, found, known))
    return list(written)


def _write_images(
    prediction: Prediction, path: Path, out: Path, name: str, *, drawn: bool
) -> Iterator[Path]:
    """Write the map and the drawing of a prediction; yield the folders of these."""
    if (grey := prediction.map_image()) is not None:
        _save_map(grey, out / "maps" / f"{name}.png")
        yield out / "maps"
    if drawn:
        image = read_image(path, None, upright=True)
        save_figure(prediction.draw(image), out / "overlays" / f"{name}.png")
        yield out / "overlays"


def _write_boxes(
    model: TrainedModel, out: Path, images: list[dict[str, Any]], found: list[dict[str, Any]],
    known: ImageIds | None,
) -> list[Path]:  # fmt: skip
    """Write annotations with the model's class numbers to COCO files; return the files."""
    ids = _category_ids(model, known)
    for number, one in enumerate(found, start=1):
        one |= {"id": number, "category_id": ids[one["category_id"]], "iscrowd": 0}
        one["area"] = one["bbox"][2] * one["bbox"][3] if "bbox" in one else 0.0
    content = {
        "info": {"model": str(model.where), "kd": __version__},
        "images": images,
        "categories": [{"id": ids[n], "name": name} for n, name in enumerate(model.class_names)],
        "annotations": found,
    }
    write_text(out / PREDICTIONS, json.dumps(content, indent=1) + "\n")
    if known is None:
        return [out / PREDICTIONS]
    keys = ("image_id", "category_id", "bbox", "score")
    rows = [{key: one[key] for key in keys if key in one} for one in found]
    write_text(out / RESULTS, json.dumps(rows) + "\n")
    return [out / PREDICTIONS, out / RESULTS]


def _category_ids(model: TrainedModel, known: ImageIds | None) -> list[int]:
    """COCO id of each class: that of the annotations, or its number counted from 1."""
    if known is None:
        return list(range(1, len(model.class_names) + 1))
    return [known.category_ids[name] for name in model.class_names]


def _save_map(grey: Any, file: Path) -> None:
    image = Image.fromarray(np.asarray(grey))
    write_atomic(file, lambda partial: image.save(partial, format="PNG"))


def find_images(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the files among `paths`, and the images of the folders among them.

    Raises:
        UserError: A path does not exist, or a folder has no image.
    """
    for path in paths:
        if path.is_dir():
            found = image_files(path)
            if not found:
                raise UserError(f"{path}: no image in this folder")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise UserError(f"{path}: no such image or folder")
