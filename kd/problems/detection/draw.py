"""Pictures of a val split with the boxes that runs found on them, from their predictions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from kd.errors import UserError
from kd.evaluation.write import fresh_tracker, write_figure
from kd.formats.coco import CocoIndex
from kd.metrics.records import Records
from kd.problems.detection.samples import DetectionSamples
from kd.problems.detection.task import Detection, anchors_of, assigned
from kd.problems.records import check_same
from kd.report.boxes import found_figures, imitation_figure
from kd.runs.read import read_predictions
from kd.utils.images import read_image

_log = logging.getLogger("kd")


def box_overlays(runs: Mapping[str, Records], index: CocoIndex, *, count: int) -> Iterator[Figure]:
    """Draw val pictures, each with its true boxes and those of every run.

    Args:
        runs: Name -> predictions of the same pictures, in the order of the panels.
        index: Where the pictures lie.
        count: How many.
    """
    order = np.argsort(index.image_ids, kind="stable")

    def picture(image_id: int) -> Tensor:
        place = int(order[np.searchsorted(index.image_ids, image_id, sorter=order)])
        return read_image(index.path(place), None)

    return found_figures(runs, picture, count=count)


def mask_pictures(
    data: DetectionSamples, task: Detection, *, count: int
) -> Iterator[tuple[str, Figure]]:
    """Draw where a task's imitation masks are on pictures with objects, by the figure's name.

    Args:
        data: Whole pictures.
        task: Has the levels of the network that imitates.
        count: How many pictures at most; they are spread over those with objects.
    """
    counted = np.diff(data.index.first)[data.images]
    places = np.flatnonzero(counted)
    for number, place in enumerate(places[:: max(1, -(-len(places) // max(1, count)))][:count]):
        sample = data[0, int(place)]
        picture, boxes = sample["images"], sample["boxes"]
        mine = assigned(boxes, task.levels)
        own = [boxes[mine == level] for level in range(len(task.levels))]
        side = data.size
        grids = [-(-side // level.stride) for level in task.levels]
        alone = len(grids) == 1
        anchors = [
            anchors_of(level, (grid, grid), alone=alone)
            for level, grid in zip(task.levels, grids, strict=True)
        ]
        size = (int(sample["sizes"][0]), int(sample["sizes"][1]))
        yield f"masks/{number}", imitation_figure(picture, own, anchors, size=size)


def write_box_overlays(
    out: Path,
    folders: Mapping[str, Path],
    index: CocoIndex,
    *,
    count: int,
    more: Iterable[tuple[str, Figure]] = (),
) -> None:
    """Write what finished runs found side by side: `overlays/<n>.png` and an event file.

    A run that was asked about other pictures, as a teacher of another data set, is left out.

    Args:
        out: The folder, a distillation's say.
        folders: Name -> run folder with a `predictions.npz`; the first one says which pictures.
        index: Where the pictures lie.
        count: How many; of 0 nothing is written.
        more: Further figures by name: `masks/0` becomes `masks/0.png`.

    Raises:
        UserError: The first run's predictions cannot be read.
    """
    if not count:
        return
    runs: dict[str, Records] = {}
    for name, folder in folders.items():
        try:
            records = read_predictions(folder / "predictions.npz")
            for known in list(runs.values())[:1]:
                check_same(records, known, f"{folder} and {next(iter(folders.values()))}")
        except UserError as error:
            if not runs:
                raise
            _log.warning("not in the pictures: %s", error)
            continue
        runs[name] = records
    tracker = fresh_tracker(out)
    for number, figure in enumerate(box_overlays(runs, index, count=count)):
        file = out / "overlays" / f"{number}.png"
        write_figure(figure, file, tracker, f"overlays/{number}", step=0)
    for name, figure in more:
        write_figure(figure, out / f"{name}.png", tracker, name, step=0)
    tracker.close()
