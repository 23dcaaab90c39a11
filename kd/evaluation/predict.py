"""Compute or read predictions of runs on a val split, and evaluate them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from kd.config.datasets import DatasetSection
from kd.config.reader import read_yaml
from kd.distillation.student import AdaptedStudent
from kd.engine.loop import evaluate
from kd.errors import UserError
from kd.metrics.records import Records
from kd.problems import problem_of_task, specs
from kd.problems.base import Dataset, Evaluator, Task
from kd.problems.recipes import data_config, section_from
from kd.problems.results import Evaluation, Predictor, Results
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
from kd.runs.read import (
    Run,
    check_same_objects,
    distinct_names,
    named_runs,
    read_predictions,
    results_hint,
    results_of,
)
from kd.runs.train import summary_of, val_loader

_log = logging.getLogger("kd")
FOLDER = "evaluation"  # subfolder of a run folder
_PREDICTIONS = "predictions.npz"
IMAGES = 8  # number of val images to draw
# Keys of the run's data section that also apply to another dataset.
_IMAGE_KEYS = ("size", "shape", "min_fraction", "max_fraction", "images")
# Settings that do not change predictions and are left out of folder names.
_FREE = ("root=", "workers=", "prepared=")
_SEPARATORS = re.compile(r"[^\w.=-]+")


@dataclass(frozen=True)
class Predictions:
    """A run's predictions on the val split of a dataset."""

    name: str  # of the model
    data: Dataset
    results: Results
    metric: Evaluator  # holds the predictions
    config: Mapping[str, Any]  # the run's config, with the section of `data`
    summary: Mapping[str, Any]  # content of `summary.json`
    folder: Path  # output folder of this evaluation, inside the run folder
    images: Callable[[Records], Iterator[Figure]]  # draws val images with predictions
    how: str = ""  # settings that change predictions, for titles: `val=test, scales 0.75, 1, flip`

    @property
    def step(self) -> int:
        """Number of training steps."""
        return int(self.summary["steps"])

    @cached_property
    def records(self) -> Records:
        """Content of `predictions.npz`, with class names."""
        return self.results.named(self.metric.records(), self.data.class_names)

    @property
    def of_training(self) -> bool:
        """True for the predictions that training wrote to the run folder."""
        return self.folder.name == FOLDER

    def save(self) -> None:
        """Write the predictions as a run folder without weights, for comparison with other runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_config(self.folder, self.config)
        write_class_names(self.folder, self.data.class_names)
        self.metric.save_predictions(self.folder / _PREDICTIONS)
        write_summary(self.folder, self.summary)

    def evaluation(self, run: Path) -> Evaluation:
        """Create tables and figures, with the run folder in their title."""
        section = self.data.section.model_dump(mode="json")
        about, how = self.results.about(self.records), f", {self.how}" if self.how else ""
        title = f"{run} on {self.data.section.name} val: {about}{how}"
        runs = {self.name: self.records}
        return self.results.evaluation(title, runs, section, lambda: self.data)


def predict_run(
    run: Path,
    data_name: str | None,
    settings: Sequence[str] = (),
    *,
    scales: Sequence[float] = (),
    mirror: bool = False,
) -> Predictions | None:
    """Predict the val split with a run's model; returns None on ranks other than 0.

    Args:
        run: Run folder of a teacher or of a variant of a distillation.
        data_name: Dataset; by default the run's.
        settings: Overrides such as `data.val=test`.
        scales: Average predictions over these image scales; label maps only.
        mirror: Average predictions over mirrored images, too; label maps only.
    """
    config, data, model, task = open_run(run, settings, data_name)
    results = results_of(config, run)
    # Settings that change the predictions, such as `val=test`.
    how = [one for one in (s.removeprefix("data.") for s in settings) if not one.startswith(_FREE)]
    if scales or mirror:
        scales = scales or (1.0,)
        try:
            model = results.at_scales(model, scales, mirror=mirror)
        except UserError as error:
            raise UserError(f"{run}: {error}") from None
        how.append(f"scales {', '.join([f'{scale:g}' for scale in scales] + ['flip'] * mirror)}")
    accelerator = make_accelerator(config["train"]["precision"])
    metric = task.metric(data.class_info())
    loader = val_loader(data, int(config["train"]["batch_size"]), accelerator)
    network = AdaptedStudent(model).to(accelerator.device)
    evaluate(network, task, loader, metric, accelerator)
    if not accelerator.is_main_process:
        return None
    if _is_teacher(config):
        name = str(config["teacher"]["name"])
    else:
        name = f"{config['student']['name']}, {config['variant']}"

    def images(records: Records) -> Iterator[Figure]:
        predictor = Predictor(network, task, getattr(data.section, "size", None))
        return results.draw(
            data, {name: predictor}, {name: records}, count=IMAGES, accelerator=accelerator
        )

    own = data.section.name == config["data"]["name"]
    subfolder = _SEPARATORS.sub("_", ", ".join(how))
    return Predictions(
        name, data, results, metric,
        config={**config, "data": data.section.model_dump(mode="json")},
        summary=summary_of(results, data, metric, model, _steps(run)),
        folder=run / FOLDER / ("" if own else data.section.name) / subfolder,
        images=images, how=", ".join(how),
    )  # fmt: skip


def open_run(
    run: Path, settings: Sequence[str], data_name: str | None = None
) -> tuple[dict[str, Any], Dataset, nn.Module, Task]:
    """Load config, dataset, model and task of a finished teacher or student run."""
    config = _run_config(run)
    section = data_section(run, config, data_name, settings)
    if _is_teacher(config):
        data = open_data(section, config["task"]["name"])
        teacher = load_teacher(run, data.num_classes)
        check_classes(teacher, data.class_names, section.name)
        return config, data, teacher.model, teacher.task
    return config, *load_student(run, config, section)


def data_section(
    run: Path, config: Mapping[str, Any], name: str | None, settings: Sequence[str] = ()
) -> DatasetSection:
    """Return the run's dataset section, or section `name` with the run's image settings."""
    if name is None:
        return section_from(config, str(run / "config.yaml"), settings)
    own = config["data"]
    same = [f"{key}={json.dumps(own[key])}" for key in _IMAGE_KEYS if key in own]
    return data_config(name, [*same, *settings])


def stored_predictions(runs: Sequence[Run], data_name: str | None) -> list[Run]:
    """Select the runs with stored predictions on one dataset; log a warning for each other run.

    If `data_name` is None, all runs must have been trained on the same dataset.
    """
    own = [_data_name(run) for run in runs]
    if data_name is None:
        for run, name in zip(runs, own, strict=True):
            if name != own[0]:
                raise UserError(
                    f"{runs[0].folder} is of {own[0]}, {run.folder} of {name}: only runs on one "
                    f"dataset are compared; name it, such as --data {own[0]}"
                )
        return list(runs)
    wanted, found = data_config(data_name).name, []
    for run, name in zip(runs, own, strict=True):
        file = run.folder / FOLDER / wanted / _PREDICTIONS
        if name == wanted:
            found.append(run)
        elif file.is_file():
            records = read_predictions(file, run.results, class_names(run.folder))
            found.append(replace(run, records=records))
        else:
            _log.warning(
                "%s: left out, it is of %s; evaluate it with: python -m kd.evaluate %s --data %s",
                *(run.folder, name, run.folder, data_name),
            )
    if not found:
        raise UserError(f"no run has predictions on {data_name}")
    return found


def side_by_side(runs: Sequence[Run], data_name: str | None, settings: Sequence[str]) -> Evaluation:
    """Evaluate several runs on the same val images, by default those of the runs' dataset."""
    check_same_objects(runs)
    first = runs[0]
    own = data_name is None or data_config(data_name).name == _data_name(first)
    section = data_section(first.folder, first.config, None if own else data_name, settings)
    return first.results.evaluation(
        f"{section.name} val: {first.results.about(first.records)}",
        {name: run.records for name, run in named_runs(runs).items()},
        section.model_dump(mode="json"),
        partial(open_data, section, first.config["task"]["name"]),
    )


def results_files(annotations: Path, files: Sequence[Path]) -> Evaluation:
    """Evaluate COCO results files of any detector; runs are named after the files."""
    if len(set(files)) < len(files):
        raise UserError(f"the same results twice among {', '.join(map(str, files))}")
    task = next(iter(next(s for s in specs() if "results_files" in s.abilities).tasks))
    results = problem_of_task(task).results(task)
    names = distinct_names([path.with_suffix("") for path in files])
    runs = {n: results.read_file(annotations, f) for n, f in zip(names, files, strict=True)}
    title = f"{annotations.stem}: {results.about(next(iter(runs.values())))}"
    return results.evaluation(title, runs, {"annotations": str(annotations)})


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
    """Return True for the config of a teacher run, where `teacher` has a name and options."""
    return {"name", "options"} <= set(config.get("teacher", ()))


def _steps(run: Path) -> int:
    """Read the number of training steps; 0 if the run's summary lacks it."""
    try:
        return int(json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError):
        return 0
