"""Pictures of a val split with the truth and what networks say about each pixel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import Tensor, nn

from kd.adapted import AdaptedStudent
from kd.arms import Distillation
from kd.box_overlays import mask_pictures, write_box_overlays
from kd.config import LabelMaps
from kd.data.collate import collate
from kd.data.images import read_image
from kd.engine import to_device
from kd.evaluation_files import fresh_tracker, write_figure
from kd.metrics.segmentation import VOID
from kd.nn.modes import evaluating
from kd.opened_boxes import OpenBoxes
from kd.opened_maps import OpenMaps
from kd.report.overlay import overlay_figure
from kd.student_runs import load_network
from kd.tasks.base import Task
from kd.tasks.detection import Detection


@dataclass(frozen=True)
class Segmenter:
    """A network and how it is asked.

    Args:
        model: An `AdaptedStudent`, on the device.
        task: How it is asked and read.
        size: Long side in pixels of the pictures that it sees; None: that of each file.
    """

    model: nn.Module
    task: Task
    size: int | None


def overlays(
    data: OpenMaps, asked: Mapping[str, Segmenter], *, count: int, accelerator: Accelerator
) -> Iterator[Figure]:
    """Draw val pictures spread over the split, each beside its truth and every network's answer.

    Args:
        data: The data set.
        asked: Name -> network, in the order of the panels.
        count: How many pictures.
        accelerator: The device, and the precision of evaluations.
    """
    images = data.val.images
    count = min(count, len(images))
    for place in (number * len(images) // count for number in range(count)):
        picture = read_image(images[place], None)
        truth = data.val.label_map(place, (picture.shape[1], picture.shape[2]))
        maps = {"truth": truth}
        for name, one in asked.items():
            said = _answer(data, one, place, accelerator)
            maps[f"{name}{_right(said, truth)}"] = said
        yield overlay_figure(picture, maps, data.class_names)


def write_overlays(distillation: Distillation) -> None:
    """Draw what each arm's student of the first seed says, beside the teacher, where it can.

    `train.pictures` says how many val pictures. Each is `overlays/<n>.png` in the distillation's
    folder, and an image in its event file.
    """
    recipe, data, out = distillation.recipe, distillation.data, distillation.out
    count = recipe.train.pictures
    if isinstance(data, OpenBoxes):
        _write_boxes(distillation, data)
        return
    if not isinstance(data, OpenMaps) or not count:
        return
    accelerator, task = distillation.accelerator, distillation.task
    first, asked = out / f"seed{recipe.seeds[0]}", {}
    for arm in recipe.arms:
        student = load_network(first / arm, recipe.student, data)
        asked[arm] = Segmenter(_placed(student, accelerator), task, data.section.size)
    teacher = None if distillation.sources is None else distillation.sources.teacher
    if teacher is not None and isinstance(teacher.recipe.data, LabelMaps):
        size = teacher.recipe.data.size
        asked["teacher"] = Segmenter(_placed(teacher.model, accelerator), teacher.task, size)
    tracker = fresh_tracker(out)
    figures = overlays(data, asked, count=count, accelerator=accelerator)
    for number, figure in enumerate(figures):
        write_figure(
            figure, out / "overlays" / f"{number}.png", tracker, f"overlays/{number}", step=0
        )
    tracker.close()


def _write_boxes(distillation: Distillation, data: OpenBoxes) -> None:
    """The same of detectors, from what their runs found."""
    recipe, out = distillation.recipe, distillation.out
    folders = {arm: out / f"seed{recipe.seeds[0]}" / arm for arm in recipe.arms}
    if distillation.sources is not None:
        for name, teacher in distillation.sources.teachers.items():
            if isinstance(teacher.task, Detection):  # one of context finds nothing
                folders[name or "teacher"] = teacher.folder
    count, task = recipe.train.pictures, distillation.task
    assert isinstance(task, Detection)
    imitates = bool(task.levels and {term.kind.mask for term in distillation.terms} - {None})
    masks = mask_pictures(data.evaluated(), task, count=count) if imitates else ()
    write_box_overlays(out, folders, data.objects.val, count=count, more=masks)


def _placed(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    return AdaptedStudent(model).to(accelerator.device)


@torch.no_grad()
def _answer(data: OpenMaps, one: Segmenter, place: int, accelerator: Accelerator) -> Tensor:
    """The likeliest class of each pixel of a val picture, (H, W) of its file."""
    # This picture alone: a whole split reads the size of each of its files first.
    sample = collate([data.whole("val", size=one.size, only=np.array([place]))[0, 0]])
    batch = to_device(sample, accelerator.device, channels_last=False)
    with evaluating(one.model), accelerator.autocast():
        output, _ = one.model(*one.task.inputs(batch))
    return one.task.decode(output, batch)[0].cpu()


def _right(said: Tensor, truth: Tensor) -> str:
    """For a title: the share of the pixels with a class that are right."""
    known = truth != VOID
    if not known.any():
        return ""
    return f", {100 * float((said[known] == truth[known]).float().mean()):.0f} % right"
