"""Pictures of a val split with the truth and what networks say about each pixel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import Tensor, nn

from kd.distillation.student import AdaptedStudent
from kd.evaluation.ask_network import Asked, answer, spread, val_sample
from kd.evaluation.write import fresh_tracker, write_figure
from kd.experiments.variants import Distillation
from kd.problems.detection.data import DetectionDataset
from kd.problems.detection.draw import mask_pictures, write_box_overlays
from kd.problems.detection.task import Detection
from kd.problems.saliency.data import SaliencyDataset
from kd.problems.saliency.draw import gaze_overlays
from kd.problems.segmentation.data import SegmentationDataset
from kd.report.overlay import overlay_figure
from kd.runs.load_student import load_network
from kd.utils.images import VOID, read_image


def overlays(
    data: SegmentationDataset, asked: Mapping[str, Asked], *, count: int, accelerator: Accelerator
) -> Iterator[Figure]:
    """Draw val pictures spread over the split, each beside its truth and every network's answer.

    Args:
        data: The data set.
        asked: Name -> network, in the order of the panels.
        count: How many pictures.
        accelerator: The device, and the precision of evaluations.
    """
    images = data.val.images
    for place in spread(count, len(images)):
        picture = read_image(images[place], None)
        truth = data.val.label_map(place, (picture.shape[1], picture.shape[2]))
        maps = {"truth": truth}
        for name, one in asked.items():
            said = answer(one, val_sample(data, one, place), accelerator)
            maps[f"{name}{_right(said, truth)}"] = said
        yield overlay_figure(picture, maps, data.class_names)


def drawn(
    data: SegmentationDataset | SaliencyDataset,
    asked: Mapping[str, Asked],
    *,
    count: int,
    accelerator: Accelerator,
) -> Iterator[Figure]:
    """Draw val pictures with what networks say of their pixels, of whatever kind that is."""
    if isinstance(data, SaliencyDataset):
        return gaze_overlays(data, asked, count=count, accelerator=accelerator)
    return overlays(data, asked, count=count, accelerator=accelerator)


def write_overlays(distillation: Distillation) -> None:
    """Draw what each variant's student of the first seed says, beside the teacher, where it can.

    `train.images` says how many val pictures. Each is `overlays/<n>.png` in the distillation's
    folder, and an image in its event file.
    """
    recipe, data, out = distillation.recipe, distillation.data, distillation.out
    count = recipe.train.images
    if isinstance(data, DetectionDataset):
        _write_boxes(distillation, data)
        return
    if not isinstance(data, SegmentationDataset | SaliencyDataset) or not count:
        return
    accelerator, task = distillation.accelerator, distillation.task
    first, asked = out / f"seed{recipe.seeds[0]}", {}
    for variant in recipe.variants:
        student = load_network(first / variant, recipe, variant, data, recipe.seeds[0])
        asked[variant] = Asked(_placed(student, accelerator), task, data.section.size)
    teacher = None if distillation.sources is None else distillation.sources.teacher
    if teacher is not None and isinstance(teacher.recipe.data, type(data.section)):
        size = teacher.recipe.data.size
        asked["teacher"] = Asked(_placed(teacher.model, accelerator), teacher.task, size)
    tracker = fresh_tracker(out)
    figures = drawn(data, asked, count=count, accelerator=accelerator)
    for number, figure in enumerate(figures):
        write_figure(
            figure, out / "overlays" / f"{number}.png", tracker, f"overlays/{number}", step=0
        )
    tracker.close()


def _write_boxes(distillation: Distillation, data: DetectionDataset) -> None:
    """The same of detectors, from what their runs found."""
    recipe, out = distillation.recipe, distillation.out
    folders = {variant: out / f"seed{recipe.seeds[0]}" / variant for variant in recipe.variants}
    if distillation.sources is not None:
        for name, teacher in distillation.sources.teachers.items():
            if isinstance(teacher.task, Detection):  # one of context finds nothing
                folders[name or "teacher"] = teacher.folder
    count, task = recipe.train.images, distillation.task
    assert isinstance(task, Detection)
    imitates = bool(task.levels and {term.kind.mask for term in distillation.terms} - {None})
    masks = mask_pictures(data.samples("val"), task, count=count) if imitates else ()
    write_box_overlays(out, folders, data.objects.val, count=count, more=masks)


def _placed(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    return AdaptedStudent(model).to(accelerator.device)


def _right(said: Tensor, truth: Tensor) -> str:
    """For a title: the share of the pixels with a class that are right."""
    known = truth != VOID
    if not known.any():
        return ""
    return f", {100 * float((said[known] == truth[known]).float().mean()):.0f} % right"
