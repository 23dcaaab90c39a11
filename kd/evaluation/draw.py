"""Val images with the predictions of every variant of a distillation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from kd.distillation.student import AdaptedStudent
from kd.errors import UserError
from kd.evaluation.write import fresh_tracker, write_figure
from kd.experiments.distillation import Distillation
from kd.metrics.records import Records
from kd.problems.results import Predictor, Results
from kd.runs.load_student import load_network
from kd.runs.read import read_predictions

_log = logging.getLogger("kd")


def write_overlays(distillation: Distillation) -> None:
    """Draw predictions of each variant's first seed, beside those of teachers of the same task.

    `train.images` is the number of val images; each is `overlays/<n>.png` in the distillation's
    folder and an image in its event file.
    """
    recipe, data, out = distillation.recipe, distillation.data, distillation.out
    task, count, seed = distillation.task, recipe.train.images, recipe.seeds[0]
    results = data.problem.results(recipe.task.name)
    if not count or results.drawn_from is None:
        return
    folders = {variant: out / f"seed{seed}" / variant for variant in recipe.variants}
    teachers = {} if distillation.sources is None else distillation.sources.teachers
    comparable = {
        name or "teacher": teacher
        for name, teacher in teachers.items()
        if type(teacher.problem.results(teacher.recipe.task.name)) is type(results)
    }
    predictors: dict[str, Predictor] = {}
    runs: Mapping[str, Records] = {}
    if results.drawn_from == "models":
        size = getattr(data.section, "size", None)
        for variant, folder in folders.items():
            student = load_network(folder, recipe, variant, data, seed)
            predictors[variant] = Predictor(_placed(student, distillation.accelerator), task, size)
        for name, teacher in comparable.items():
            model = _placed(teacher.model, distillation.accelerator)
            size = getattr(teacher.recipe.data, "size", None)
            predictors[name] = Predictor(model, teacher.task, size)
    else:
        folders |= {name: teacher.folder for name, teacher in comparable.items()}
        runs = stored_records(folders, results)
    tracker = fresh_tracker(out)
    figures = results.draw(
        data, predictors, runs, count=count, accelerator=distillation.accelerator
    )
    for number, figure in enumerate(figures):
        file = out / "overlays" / f"{number}.png"
        write_figure(figure, file, tracker, f"overlays/{number}", step=0)
    for name, figure in results.draw_training(data, task, distillation.terms, count=count):
        write_figure(figure, out / f"{name}.png", tracker, name, step=0)
    tracker.close()


def stored_records(folders: Mapping[str, Path], results: Results) -> dict[str, Records]:
    """Read predictions of finished runs; those on other images than the first are skipped."""
    runs: dict[str, Records] = {}
    for name, folder in folders.items():
        try:
            records = read_predictions(folder / "predictions.npz", results)
            for known in list(runs.values())[:1]:
                results.check_same(records, known, f"{folder} and {next(iter(folders.values()))}")
        except UserError as error:
            if not runs:
                raise
            _log.warning("not drawn: %s", error)
            continue
        runs[name] = records
    return runs


def _placed(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    return AdaptedStudent(model).to(accelerator.device)
