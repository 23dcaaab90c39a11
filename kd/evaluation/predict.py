"""What runs answer about a val split: the model asked again, or read from where it was stored."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from kd.config.datasets import DatasetSection
from kd.config.reader import read_yaml
from kd.distillation.student import AdaptedStudent
from kd.engine.loop import evaluate
from kd.errors import UserError
from kd.evaluation.ask_network import Asked
from kd.evaluation.draw import drawn
from kd.metrics.records import Records
from kd.nn.multi_scale import MultiScale
from kd.problems.base import Dataset, Metric, Task
from kd.problems.detection.data import DetectionDataset
from kd.problems.detection.draw import box_overlays
from kd.problems.detection.evaluation import BoxEvaluation, about_boxes
from kd.problems.detection.metric import FoundBoxes
from kd.problems.objects.baselines import on_data, references
from kd.problems.objects.data import of_objects
from kd.problems.objects.draw import hidden_scenes
from kd.problems.objects.evaluation import Evaluation, Scores, about
from kd.problems.objects.metric import TopN
from kd.problems.recipes import data_config, section_from
from kd.problems.records import DETECTIONS, SALIENCY, kind_of
from kd.problems.saliency.data import SaliencyDataset
from kd.problems.saliency.evaluation import GazeEvaluation
from kd.problems.saliency.metric import SaliencyMaps
from kd.problems.segmentation.data import SegmentationDataset
from kd.problems.segmentation.evaluation import MapEvaluation
from kd.problems.segmentation.metric import MeanIoU
from kd.runs.build import make_accelerator, open_data
from kd.runs.folder import (
    check_current,
    class_names,
    write_class_names,
    write_config,
    write_summary,
)
from kd.runs.load_student import load_student
from kd.runs.load_teacher import check_classes, load_teacher
from kd.runs.read import Run, check_same_objects, named_runs, read_predictions, results_hint
from kd.runs.train import new_metric, summary_of, val_loader

_log = logging.getLogger("kd")
FOLDER = "evaluation"  # in a run's folder
_PREDICTIONS = "predictions.npz"
PICTURES = 8  # hidden scenes that are drawn
# How pictures were shown to a run goes with it to another data set.
_SHOWN = ("size", "shape", "min_share", "max_share", "images")
# Where pictures are and who loads them is nothing that an evaluation is called by.
_FREE = ("root=", "workers=", "prepared=")
_SEPARATORS = re.compile(r"[^\w.=-]+")


@dataclass(frozen=True)
class Predictions:
    """A run's answers on the val split of a data set.

    Args:
        name: What the model is.
        data: The data set.
        metric: Holds the answers.
        config: The run's, with this data set.
        summary: As `summary.json` of a run.
        folder: Where an evaluation of this run on this data set goes.
        pictures: Draws hidden scenes, or label maps, with what the model says.
        how: The data set was changed, or its pictures shown otherwise than they are:
            `val=test, scales 0.75, 1, flip`.
    """

    name: str
    data: Dataset
    metric: Metric
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    folder: Path
    pictures: Callable[[], Iterator[Figure]]
    how: str = ""

    @property
    def step(self) -> int:
        """Of training."""
        return int(self.summary["steps"])

    @property
    def records(self) -> Records | None:
        """As `predictions.npz` holds them, of a kind that tables know; None for others."""
        if isinstance(self.metric, MeanIoU):
            return {**self.metric.records(), "names": np.array(self.data.class_names)}
        if isinstance(self.metric, TopN | FoundBoxes | SaliencyMaps):
            return self.metric.records()
        return None

    @property
    def of_training(self) -> bool:
        """Whether the run's own folder holds these answers already."""
        return self.folder.name == FOLDER

    def save(self) -> None:
        """Write what makes the folder a run that can be set beside others, weights apart."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_config(self.folder, self.config)
        write_class_names(self.folder, self.data.class_names)
        self.metric.save_predictions(self.folder / _PREDICTIONS)
        write_summary(self.folder, self.summary)


def predict_run(
    run: Path,
    data_name: str | None,
    settings: Sequence[str] = (),
    *,
    scales: Sequence[float] = (),
    mirror: bool = False,
) -> Predictions | None:
    """Load a run's model and ask it about the val split; None on ranks other than 0.

    Args:
        run: A teacher's folder or that of one variant.
        data_name: Another data set than its own.
        settings: `data.a=value`.
        scales: Of label maps: the mean over pictures at these scales answers; none: as they are.
        mirror: Of label maps: and over mirrored ones.

    Raises:
        UserError: It is no run, unfinished, or knows another number of classes than the data set;
            scales or mirrored pictures of a run about objects.
    """
    config, data, model, task = open_run(run, settings, data_name)
    model, how = _at_scales(run, data, model, scales, mirror)
    accelerator = make_accelerator(config["train"]["precision"])
    metric = new_metric(task, data)
    loader = val_loader(data, int(config["train"]["batch_size"]), accelerator)
    asked = AdaptedStudent(model).to(accelerator.device)
    evaluate(asked, task, loader, metric, accelerator)
    if not accelerator.is_main_process:
        return None

    name = _model_name(config)

    def pictures() -> Iterator[Figure]:
        if isinstance(data, SegmentationDataset | SaliencyDataset):
            seen = {name: Asked(asked, task, data.section.size)}
            return drawn(data, seen, count=PICTURES, accelerator=accelerator)
        if isinstance(data, DetectionDataset) and isinstance(metric, FoundBoxes):
            return box_overlays({name: metric.records()}, data.objects.val, count=PICTURES)
        return hidden_scenes(
            asked, task, of_objects(data), count=PICTURES, device=accelerator.device
        )

    asked_about = {**config, "data": data.section.model_dump(mode="json")}
    summary = summary_of(data, metric, model, _steps(run))
    how = ", ".join([*_said(settings), *([how] if how else [])])
    own = data.section.name == config["data"]["name"]
    folder = run / FOLDER / ("" if own else data.section.name) / _SEPARATORS.sub("_", how)
    return Predictions(name, data, metric, asked_about, summary, folder, pictures, how)


def _said(settings: Sequence[str]) -> list[str]:
    """Changes of a data set that change the answers, such as `val=test`."""
    changes = [setting.removeprefix("data.") for setting in settings]
    return [change for change in changes if not change.startswith(_FREE)]


def _at_scales(
    run: Path, data: Dataset, model: nn.Module, scales: Sequence[float], mirror: bool
) -> tuple[nn.Module, str]:
    """A model asked at several scales, and what that is called; itself where it is not wanted."""
    if not scales and not mirror:
        return model, ""
    if not isinstance(data, SegmentationDataset):
        about = "gaze" if isinstance(data, SaliencyDataset) else "objects"
        raise UserError(f"{run}: answers about {about}; --scales and --flip are for label maps")
    scales = scales or (1.0,)
    shown = [f"{scale:g}" for scale in scales] + ["flip"] * mirror
    return MultiScale(model, scales, mirror=mirror), f"scales {', '.join(shown)}"


def open_run(
    run: Path, settings: Sequence[str], data_name: str | None = None
) -> tuple[dict[str, Any], Dataset, nn.Module, Task]:
    """A finished run's config, data set, model and task, be it a teacher or a student.

    Raises:
        UserError: It is no run, unfinished, or a teacher of other classes.
    """
    config = _run_config(run)
    section = data_section(run, config, data_name, settings)
    if _is_teacher(config):
        data = open_data(section, config["task"]["name"])
        teacher = load_teacher(run, data.num_classes)
        check_classes(teacher, data.class_names, section.name)
        return config, data, teacher.model, teacher.task
    student = load_student(run, config, section)
    return config, student.data, student.model, student.task


def data_section(
    run: Path, config: Mapping[str, Any], name: str | None, settings: Sequence[str] = ()
) -> DatasetSection:
    """The data set to evaluate on, shown as the run's was: the run's own, or another by name."""
    if name is None:
        return section_from(config, str(run / "config.yaml"), settings)
    own = config["data"]
    shown = [f"{key}={json.dumps(own[key])}" for key in _SHOWN if key in own]
    return data_config(name, [*shown, *settings])


def data_of(run: Run, name: str | None, settings: Sequence[str] = ()) -> Dataset:
    """Open the data set that `stored_answers` of this run are about."""
    task = run.config.get("task", {}).get("name")
    return open_data(section_of(run, name, settings), task)


def section_of(run: Run, name: str | None, settings: Sequence[str] = ()) -> DatasetSection:
    """The data set that `stored_predictions` of this run are about, not opened."""
    own = name is None or data_config(name).name == _data_name(run)
    return data_section(run.folder, run.config, None if own else name, settings)


def stored_predictions(runs: Sequence[Run], data_name: str | None) -> list[Run]:
    """Runs with their answers about one data set: their own, or what `kd.evaluate --data` wrote.

    Args:
        runs: Finished runs.
        data_name: The data set; None where it is the own one of all runs. Runs that were never
            asked about it are left out with a warning.

    Raises:
        UserError: Runs of different data sets and no name, or no run was asked about it.
    """
    own = [_data_name(run) for run in runs]
    if data_name is None:
        for run, name in zip(runs, own, strict=True):
            if name != own[0]:
                raise UserError(
                    f"{runs[0].folder} is of {own[0]}, {run.folder} of {name}: runs side by side "
                    f"answer about one data set; name it, such as --data {own[0]}"
                )
        return list(runs)
    wanted, found = data_config(data_name).name, []
    for run, name in zip(runs, own, strict=True):
        file = run.folder / FOLDER / wanted / _PREDICTIONS
        if name == wanted:
            found.append(run)
        elif file.is_file():
            records = read_predictions(file, class_names(run.folder))
            found.append(replace(run, records=records))
        else:
            _log.warning(
                "%s: left out, it is of %s; ask it with: python -m kd.evaluate %s --data %s",
                *(run.folder, name, run.folder, data_name),
            )
    if not found:
        raise UserError(f"no run has answers about {data_name}")
    return found


def _data_name(run: Run) -> str:
    try:
        return str(run.config["data"]["name"])
    except (KeyError, TypeError):
        raise UserError(f"{run.folder / 'config.yaml'}: not the config of a run") from None


def _run_config(run: Path) -> dict[str, Any]:
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run}: not a run folder, it has no config.yaml{results_hint(run)}")
    config = read_yaml(file)
    check_current(config, file)
    if not {"data", "train", "task"} <= config.keys():
        raise UserError(f"{file}: not the config of a run")
    return config


def _is_teacher(config: Mapping[str, Any]) -> bool:
    """A distillation's config names its teacher's run, a teacher's the options of the model."""
    return {"name", "options"} <= set(config.get("teacher", ()))


def _model_name(config: Mapping[str, Any]) -> str:
    if _is_teacher(config):
        return str(config["teacher"]["name"])
    return f"{config['student']['name']}, {config['variant']}"


def _steps(run: Path) -> int:
    """Steps of training, 0 where the run's summary does not say."""
    try:
        return int(json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError):
        return 0


AnyEvaluation = Evaluation | MapEvaluation | BoxEvaluation | GazeEvaluation | Scores


def evaluation_of(asked: Predictions, run: Path) -> AnyEvaluation:
    """What one run answered.

    Args:
        asked: Its answers.
        run: Its folder, for the title.
    """
    records, data = asked.records, asked.data
    how = f", {asked.how}" if asked.how else ""
    if records is None:
        return Scores(f"{run} on {data.section.name} val{how}", data, asked.metric)
    if kind_of(records) is DETECTIONS:
        title = f"{run} on {about_boxes(f'{data.section.name} val', records)}{how}"
        return BoxEvaluation(title, data.section.model_dump(mode="json"), {asked.name: records})
    if isinstance(data, SaliencyDataset):
        title = f"{run} on {_about_maps(data, len(records['image_ids']))}{how}"
        return GazeEvaluation(title, data.section.model_dump(mode="json"), {asked.name: records})
    if isinstance(data, SegmentationDataset):
        title = f"{run} on {_about_maps(data, len(records['image_ids']))}{how}"
        return MapEvaluation(title, data, {asked.name: records})
    objects = of_objects(data)
    title = f"{run} on {about(objects, records)}{how}"
    return Evaluation(title, objects, {asked.name: records}, references(objects, records))


def side_by_side(
    runs: Sequence[Run], data_name: str | None, settings: Sequence[str]
) -> Evaluation | MapEvaluation | BoxEvaluation | GazeEvaluation:
    """What several runs answered about the same objects or pictures.

    Args:
        runs: With their answers about one data set.
        data_name: That data set, None where it is the runs' own.
        settings: `data.a=value`.

    Raises:
        UserError: They were asked about different ones, or these are not those of the data set.
    """
    check_same_objects(runs)
    named, first = named_runs(runs), runs[0].records
    if kind_of(first) is DETECTIONS:  # their records hold the truth
        section = section_of(runs[0], data_name, settings)
        title = about_boxes(f"{section.name} val", first)
        found = {name: run.records for name, run in named.items()}
        return BoxEvaluation(title, section.model_dump(mode="json"), found)
    if kind_of(first) is SALIENCY:
        section = section_of(runs[0], data_name, settings)
        title = f"{section.name} val: {len(first['image_ids'])} pictures"
        found = {name: run.records for name, run in named.items()}
        return GazeEvaluation(title, section.model_dump(mode="json"), found)
    opened = data_of(runs[0], data_name, settings)
    if isinstance(opened, SegmentationDataset):
        maps = {name: run.records for name, run in named.items()}
        title = _about_maps(opened, len(first["image_ids"]))
        return MapEvaluation(title, opened, maps)
    data = of_objects(opened)
    records = {name: on_data(data, run.records, str(run.folder)) for name, run in named.items()}
    first = next(iter(records.values()))
    return Evaluation(about(data, first), data, records, references(data, first))


def _about_maps(data: SegmentationDataset | SaliencyDataset, pictures: int) -> str:
    return f"{data.section.name} val: {pictures} pictures"
