"""Train and evaluate one run and write its files, for all commands that train."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from matplotlib.figure import Figure
from torch import nn

from kd.config.recipes import Train
from kd.data.loader import SampleLoader
from kd.distillation.student import AdaptedStudent
from kd.distillation.terms import modules_of
from kd.engine.checkpoint import save_model
from kd.engine.loop import evaluate, fit
from kd.engine.progress import CleanStop, ProgressBar
from kd.engine.state import Hooks, Objective, Training, resume_training, save_training
from kd.engine.tracking import Tracker, flatten
from kd.metrics.registry import METRICS
from kd.problems.base import Dataset, Evaluator, Task, Teacher
from kd.problems.results import Predictor, Results
from kd.runs.build import make_loader
from kd.runs.folder import RunFolder, model_metadata, write_class_names, write_summary
from kd.runs.read import read_scalars, results_of
from kd.runs.setup import count_parameters, learns, start_training

_log = logging.getLogger("kd")


def summary_of(
    results: Results, data: Dataset, metric: Evaluator, model: nn.Module, steps: int
) -> dict[str, Any]:
    """Return the content of `summary.json`: metrics of the model and of baselines (class prior).

    `metric` has the predictions on the val split. `model` is the exported model, without adapters.
    """
    records = metric.records()
    return {
        **metric.compute(),
        **results.own_values(records),
        **results.summary(data, records),
        "parameters": count_parameters(model),
        "steps": steps,
    }


@dataclass
class RunSetup:
    """Everything that a run needs apart from its model, objective and loader.

    Args:
        folder: Run folder.
        accelerator: Devices and processes.
        data: The dataset; metrics are computed on its val split.
        train: Training settings of the recipe.
        seed: Seed of dropout and of all other randomness but that of the samples.
        label: Name of the run in progress lines.
        teacher: Teacher whose predictions figures show beside the model's; None: no teacher.
    """

    folder: RunFolder
    accelerator: Accelerator
    data: Dataset
    train: Train
    seed: int
    label: str
    teacher: Teacher | None = None

    @property
    def results(self) -> Results:
        return results_of(self.folder.config, self.folder.path)


def run_training(
    run: RunSetup, model: torch.nn.Module, objective: Objective, loader: SampleLoader
) -> dict[str, Any]:
    """Train an `AdaptedStudent` or resume training, then evaluate it and write the results.

    Returns the content of `summary.json`.

    Raises:
        UserError: A loss is not finite, the checkpoint to resume does not fit, or the disk is full.
    """
    if not learns(model):
        # Baselines of counts were fitted before; they are only evaluated and written.
        run = replace(run, train=run.train.model_copy(update={"epochs": 0}))
    train, accelerator = run.train, run.accelerator
    steps = train.epochs * -(-len(loader) // train.accumulate)
    critics = modules_of(objective.terms, trained="critic")
    training = start_training(accelerator, model, train, steps, critics)
    set_seed(run.seed + accelerator.process_index)
    if run.folder.checkpoint.is_file():
        resume_training(training, run.folder.checkpoint)
        _log.info("%s: resuming at step %d of %d", run.label, training.progress.step, steps)
    first, main = training.progress.step, accelerator.is_main_process
    tracker = Tracker(run.folder.path, enabled=main, resume_step=first)
    val = val_loader(run.data, run.train.batch_size, accelerator)
    seconds = _train(run, training, objective, loader, val, tracker, steps)
    metric = _evaluate(run, training, objective, val)
    results = run.results
    summary = summary_of(results, run.data, metric, training.exported, training.progress.step)
    if training.progress.step > first:
        summary["steps_per_second"] = (training.progress.step - first) / seconds
    if main:
        _write_result(run, training, objective.task, tracker, metric, summary)
    tracker.close()
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return summary


def _train(
    run: RunSetup,
    training: Training,
    objective: Objective,
    loader: SampleLoader,
    val: SampleLoader,
    tracker: Tracker,
    steps: int,
) -> float:
    """Run `fit` with evaluations between epochs; return the seconds spent without evaluation."""
    train, folder = run.train, run.folder
    main = run.accelerator.is_main_process
    evaluating = 0.0

    def epoch_end(epoch: int) -> None:
        nonlocal evaluating
        if train.evaluate_every and epoch % train.evaluate_every == 0 and epoch < train.epochs:
            began = time.perf_counter()
            metric = _evaluate(run, training, objective, val)
            if main:
                own = run.results.own_values(metric.records())
                tracker.scalars(_tags({**metric.compute(), **own}), training.progress.step)
            evaluating += time.perf_counter() - began

    stop = CleanStop()
    hooks = Hooks(
        log=tracker.scalars,
        checkpoint=lambda: save_training(training, folder.checkpoint, folder.config),
        epoch_end=epoch_end,
        stop=stop,
    )
    with ProgressBar(run.label, steps, training.progress.step, enabled=main) as advance, stop:
        hooks.progress = advance
        if _evaluation_missing(run, training):
            epoch_end(training.progress.epoch)
        started, evaluating = time.perf_counter(), 0.0
        fit(
            training, objective, loader, epochs=train.epochs, accumulate=train.accumulate,
            log_every=train.log_every, checkpoint_every=train.checkpoint_every, hooks=hooks,
        )  # fmt: skip
    return time.perf_counter() - started - evaluating


def _evaluation_missing(run: RunSetup, training: Training) -> bool:
    """Return whether the interrupted run saved the end of an epoch but did not evaluate it."""
    place = training.progress
    missing = [place.batch == 0 and place.epoch > 0]
    if missing[0] and run.accelerator.is_main_process:
        curves = read_scalars(run.folder.path)
        scored = [curve for tag, curve in curves.items() if tag.startswith("eval/")]
        missing = [all(step != place.step for curve in scored for step, _ in curve)]
    broadcast_object_list(missing)
    return missing[0]


def _write_result(
    run: RunSetup,
    training: Training,
    task: Task,
    tracker: Tracker,
    metric: Evaluator,
    summary: dict[str, Any],
) -> None:
    step = training.progress.step
    metadata = model_metadata(run.folder.config, run.data.class_names)
    save_model(run.folder.model, training.exported, metadata)
    write_class_names(run.folder.path, run.data.class_names)
    metric.save_predictions(run.folder.path / "predictions.npz")
    tracker.scalars(_tags(summary), step)
    results, data = run.results, run.data
    for tag, figure in results.training_figures(data, metric.records(), run.label):
        tracker.figure(tag, figure, step)
    if results.drawn_in_training:
        for number, figure in enumerate(_drawn(run, training, task)):
            tracker.figure(f"images/{number}", figure, step)
    tracker.hparams(flatten(run.folder.config), _tags(summary))
    write_summary(run.folder.path, summary)


def _tags(values: Mapping[str, Any]) -> dict[str, float]:
    return {f"eval/{name}": float(value) for name, value in values.items()}


def _drawn(run: RunSetup, training: Training, task: Task) -> Iterator[Figure]:
    teacher, predictors = run.teacher, {}
    if teacher is not None:
        model = AdaptedStudent(teacher.model)
        size = getattr(teacher.section, "size", None)
        predictors["teacher"] = Predictor(model, teacher.task, size)
    predictors["model" if teacher is None else "student"] = Predictor(training.result, task)
    return run.results.draw(
        run.data, predictors, {}, count=run.train.images,
        accelerator=run.accelerator,
    )  # fmt: skip


def val_loader(data: Dataset, batch_size: int, accelerator: Accelerator) -> SampleLoader:
    """Return a loader of the val split; images of different sizes are loaded one at a time.

    `batch_size` is the number of images per batch, over all processes.
    """
    samples = data.problem.evaluation(data)
    processes = accelerator.num_processes
    each = samples.together(max(1, batch_size // processes))
    return make_loader(
        samples, accelerator, batch_size=each * processes, workers=data.section.workers
    )


def _evaluate(
    run: RunSetup, training: Training, objective: Objective, loader: SampleLoader
) -> Evaluator:
    metric = objective.task.metric(run.data.class_info())
    evaluate(
        training.result, objective.task, loader, metric, run.accelerator,
        channels_last=run.train.channels_last,
    )  # fmt: skip
    return metric


def print_summary(title: str, summary: Mapping[str, Any], results: Results) -> None:
    """Print a table with the metrics of a run, and of references such as the class prior."""
    titles = {"": "model", "prior_": "prior", "observers_": "other observers",
              "ceiling_": "exact posterior", "chance_": "chance"}  # fmt: skip
    columns = [c for c in titles if not c or any(name.startswith(c) for name in summary)]
    names = dict.fromkeys((*METRICS, *results.rows))
    metrics = [results.metric(name) for name in names if name in summary]
    width = max(len(metric.label) for metric in metrics)
    heads = "".join(f"{titles[column]:>17}" for column in columns)
    sys.stdout.write(f"{title}\n  {'':<{width}}{heads}\n")
    for metric in metrics:
        cells = [metric.text(summary.get(prefix + metric.name)) or "-" for prefix in columns]
        line = "".join(f"{cell:>17}" for cell in cells)
        sys.stdout.write(f"  {metric.label:<{width}}{line}\n")
