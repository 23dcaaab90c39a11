"""Write an evaluation (tables, metrics, figures, events) and overlays of a distillation."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import nn

from kd.distillation.student import AdaptedStudent
from kd.engine.tracking import Tracker
from kd.errors import UserError
from kd.experiments.distillation import Distillation
from kd.metrics.records import Records
from kd.problems.results import Evaluation, Predictor, Results
from kd.report.style import figure_image, save_image
from kd.runs.load_student import load_network
from kd.runs.read import read_predictions
from kd.utils.io import write_text

_log = logging.getLogger("kd")

_DPI = 160
_EVENTS = "events.out.tfevents.*"


def write_evaluation(
    folder: Path, evaluation: Evaluation, *, step: int = 0, images: Iterable[Figure] = ()
) -> None:
    """Write `table.md`, `metrics.json`, a PNG for each figure, and their TensorBoard events.

    An earlier evaluation in `folder` is replaced. `step` is the training step for TensorBoard, and
    `images` are figures of single images.
    """
    markdown = "\n".join(table.to_markdown() for table in evaluation.all_tables())
    numbers = json.dumps(evaluation.numbers(), indent=2) + "\n"
    write_text(folder / "table.md", markdown)
    write_text(folder / "metrics.json", numbers)
    tracker = _fresh_tracker(folder)
    tracker.text("evaluation/table", markdown)
    for name, figure in evaluation.figures():
        _write_figure(figure, folder / f"{name}.png", tracker, f"evaluation/{name}", step)
    for number, figure in enumerate(images):
        file = folder / f"{evaluation.results.image_name}_{number}.png"
        _write_figure(figure, file, tracker, f"images/{number}", step)
    runs = [one for one in evaluation.scored if one.name in evaluation.runs]
    for one in runs:
        tail = f"/{one.name}" if len(runs) > 1 else ""
        tracker.scalars({f"eval/{name}{tail}": n for name, n in one.values.items()}, step)
    tracker.close()


def _fresh_tracker(folder: Path) -> Tracker:
    """Open a tracker after deleting the folder's event files."""
    for events in folder.glob(_EVENTS):
        events.unlink()
    return Tracker(folder)


def _write_figure(figure: Figure, file: Path, tracker: Tracker, tag: str, step: int) -> None:
    """Render a figure once (up to a second) and write it to a file and to TensorBoard."""
    image = figure_image(figure, dpi=_DPI)
    save_image(image, file)
    tracker.image(tag, image, step)


def write_overlays(distillation: Distillation) -> None:
    """Draw predictions of each variant's first seed and of teachers of the same task.

    Writes `train.images` val images to `overlays/<n>.png` and to TensorBoard.
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
            student = load_network(folder / "model.safetensors", recipe, variant, data.num_classes)
            predictors[variant] = Predictor(_placed(student, distillation.accelerator), task, size)
        for name, teacher in comparable.items():
            model = _placed(teacher.model, distillation.accelerator)
            size = getattr(teacher.recipe.data, "size", None)
            predictors[name] = Predictor(model, teacher.task, size)
    else:
        folders |= {name: teacher.folder for name, teacher in comparable.items()}
        runs = stored_records(folders, results)
    tracker = _fresh_tracker(out)
    figures = results.draw(
        data, predictors, runs, count=count, accelerator=distillation.accelerator
    )
    for number, figure in enumerate(figures):
        file = out / "overlays" / f"{number}.png"
        _write_figure(figure, file, tracker, f"overlays/{number}", step=0)
    for name, figure in results.draw_training(data, task, distillation.terms, count=count):
        _write_figure(figure, out / f"{name}.png", tracker, name, step=0)
    tracker.close()


def stored_records(folders: Mapping[str, Path], results: Results) -> dict[str, Records]:
    """Read predictions of finished runs; skip runs with other images than the first."""
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
