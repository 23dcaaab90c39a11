"""One training run from its folder to its summary: shared by the commands that train."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed

from kd.build import OpenData, make_dataset, make_loader, parameters, start_training
from kd.checkpoint import (
    Progress,
    load_checkpoint,
    load_state,
    rng_state,
    save_checkpoint,
    save_model,
    set_rng_state,
)
from kd.config import Train
from kd.data.loader import SceneLoader
from kd.engine import Hooks, Objective, Training, evaluate, fit
from kd.errors import UserError
from kd.metrics.top_n import TopN
from kd.progress import CleanStop, ProgressBar
from kd.report.figures import share_hidden_figure, top_n_figure
from kd.run_folder import RunFolder
from kd.tasks.base import Task
from kd.tracking import Tracker, flatten

_log = logging.getLogger("kd")


@dataclass
class Session:
    """Everything one run needs beside its objective.

    Args:
        folder: Where it is written.
        accelerator: Devices and processes.
        data: The data set; its val split is what metrics are of.
        train: Settings of the loop.
        seed: Of dropout and whatever else is random beside the data.
        label: What progress lines call the run.
        pictures: Called at the end to draw what the model sees.
    """

    folder: RunFolder
    accelerator: Accelerator
    data: OpenData
    train: Train
    seed: int
    label: str
    pictures: Callable[[Session, Training, Task, Tracker], None] | None = None


def run_training(
    session: Session, model: torch.nn.Module, objective: Objective, loader: SceneLoader
) -> dict[str, Any]:
    """Train, or go on training, then evaluate and write the result.

    Returns:
        The summary that was written.

    Raises:
        UserError: A loss that is not finite, a checkpoint that does not fit, a full disk.
    """
    train, accelerator = session.train, session.accelerator
    steps = train.epochs * -(-len(loader) // train.accumulate)
    training = start_training(accelerator, model, train, steps)
    set_seed(session.seed + accelerator.process_index)
    if session.folder.checkpoint.is_file():
        resume(session, training)
        _log.info("%s: goes on at step %d of %d", session.label, training.progress.step, steps)
    main = accelerator.is_main_process
    tracker = Tracker(session.folder.path, enabled=main, resume_step=training.progress.step)
    val = _val_loader(session)
    started, first = time.perf_counter(), training.progress.step
    stop = CleanStop()

    def epoch_end(epoch: int) -> None:
        if train.evaluate_every and epoch % train.evaluate_every == 0 and epoch < train.epochs:
            metric = _evaluate(session, training, objective, val)
            tracker.scalars(_tags(metric.compute()), training.progress.step)

    bar = ProgressBar(
        session.label, steps, training.progress.step, enabled=accelerator.is_main_process
    )
    with bar as advance, stop:
        fit(
            training,
            objective,
            loader,
            epochs=train.epochs,
            accumulate=train.accumulate,
            log_every=train.log_every,
            checkpoint_every=train.checkpoint_every,
            hooks=Hooks(
                log=tracker.scalars,
                checkpoint=lambda: checkpoint(session, training),
                epoch_end=epoch_end,
                stop=lambda: stop.check(lambda: checkpoint(session, training)),
                progress=advance,
            ),
        )
    seconds = time.perf_counter() - started
    metric = _evaluate(session, training, objective, val)
    summary: dict[str, Any] = {
        **metric.compute(),
        **ceiling_metrics(session.data, metric),
        "parameters": parameters(training.exported),
        "steps": training.progress.step,
    }
    if training.progress.step > first:
        summary["steps_per_second"] = (training.progress.step - first) / seconds
    if main:
        _write_result(session, training, objective.task, tracker, metric, summary)
    tracker.close()
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return summary


def _write_result(
    session: Session,
    training: Training,
    task: Task,
    tracker: Tracker,
    metric: TopN,
    summary: dict[str, Any],
) -> None:
    """Weights without adapters, predictions, curves and pictures; the summary last."""
    step = training.progress.step
    metadata = {"config": str(session.folder.path / "config.yaml"), "format": "kd-model-1"}
    save_model(session.folder.model, training.exported, metadata)
    metric.save_predictions(session.folder.path / "predictions.npz")
    tracker.scalars(_tags(summary), step)
    tracker.figure("eval/top_n", curve_figure(session.data, metric), step)
    tracker.figure(
        "eval/share_hidden", share_hidden_figure({session.label: metric.records()}), step
    )
    if session.pictures is not None:
        session.pictures(session, training, task, tracker)
    finals = {f"eval/{name}": float(value) for name, value in summary.items()}
    tracker.hparams(flatten(session.folder.config), finals)
    session.folder.finish(summary)


def _tags(values: Mapping[str, Any]) -> dict[str, float]:
    return {f"eval/{name}": float(value) for name, value in values.items()}


def checkpoint(session: Session, training: Training) -> None:
    """Write everything that an exact resumption needs; every rank brings its random streams."""
    streams = [rng_state()]
    if session.accelerator.num_processes > 1:
        streams = [None] * session.accelerator.num_processes  # type: ignore[list-item]
        dist.all_gather_object(streams, rng_state())
    if session.accelerator.is_main_process:
        parts: dict[str, Any] = {
            "model": training.bare.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "schedule": training.schedule.state_dict(),
            "streams": streams,
        }
        if training.ema is not None:
            parts["ema"] = training.ema.state_dict()
        save_checkpoint(session.folder.checkpoint, training.progress, session.folder.config, parts)


def resume(session: Session, training: Training) -> None:
    """Put a training back to where its checkpoint was written."""
    path = session.folder.checkpoint
    place, _, parts = load_checkpoint(path)
    load_state(training.bare, parts["model"], path)
    if training.ema is not None:
        load_state(training.ema, parts["ema"], path)
    training.optimizer.load_state_dict(parts["optimizer"])
    training.schedule.load_state_dict(parts["schedule"])
    streams = parts["streams"]
    if len(streams) != session.accelerator.num_processes:
        raise UserError(
            f"{path}: written by {len(streams)} processes, cannot go on with "
            f"{session.accelerator.num_processes}"
        )
    set_rng_state(streams[session.accelerator.process_index])
    training.progress = Progress(place.epoch, place.batch, place.step)


def new_metric(data: OpenData) -> TopN:
    """The metric of a data set's val split."""
    return TopN(data.num_classes, prior=data.prior(), looks=data.val.looks, where=data.section.name)


def ceiling_metrics(data: OpenData, metric: TopN) -> dict[str, float]:
    """What the exact posterior of the embedded scenes scores on the same objects."""
    ceiling = _ceiling(data, metric)
    return (
        {}
        if ceiling is None
        else {
            f"ceiling_{k}": v
            for k, v in ceiling.compute().items()
            if k
            in (
                "top1",
                "top5",
                "nll",
                "lookalike_top1",
                "lookalike_pair_top1",
                "mean_class_top1",
                "area",
            )
        }
    )


def _ceiling(data: OpenData, metric: TopN) -> TopN | None:
    stored = data.ceiling("val")
    if stored is None:
        return None
    scored = metric.records()
    order = stored["object_ids"].argsort()
    places = order[stored["object_ids"][order].searchsorted(scored["object_ids"])]
    exact = new_metric(data)
    exact.update(
        torch.from_numpy(stored["log_probs_pixels"][places]),
        *(torch.from_numpy(scored[k]) for k in ("labels", "shares", "object_ids", "image_ids")),
    )
    return exact


def curve_figure(data: OpenData, metric: TopN) -> Any:
    """Top-n against random, prior and, on the scenes, the exact posterior."""
    exact = _ceiling(data, metric)
    return top_n_figure(
        {"model": metric.curve()}, metric.prior_curve(), None if exact is None else exact.curve()
    )


def _val_loader(session: Session) -> SceneLoader:
    return make_loader(
        make_dataset(session.data, "val", train=False),
        session.accelerator,
        batch_size=session.train.batch_size,
        workers=session.data.section.workers,
    )


def _evaluate(
    session: Session, training: Training, objective: Objective, loader: SceneLoader
) -> TopN:
    metric = new_metric(session.data)
    evaluate(
        training.result,
        objective.task,
        loader,
        metric,
        session.accelerator,
        channels_last=session.train.channels_last,
    )
    return metric


def say_summary(title: str, summary: Mapping[str, Any]) -> None:
    """A run's figures on stdout, the class prior's and the ceiling's beside them."""
    shown = ("top1", "top3", "top5", "top10", "top20", "mean_class_top1", "area", "nll", "ece",
             "lookalike_top1", "lookalike_pair_top1")  # fmt: skip
    columns = ["", "prior_", "ceiling_"] if "ceiling_top1" in summary else ["", "prior_"]
    titles = ["model", "prior", "exact posterior"][: len(columns)]
    names = [name for name in shown if name in summary]
    width = max(len(name) for name in names)
    sys.stdout.write(f"{title}\n  {'':<{width}}" + "".join(f"{t:>17}" for t in titles) + "\n")
    for name in names:
        cells = [_number(name, summary.get(prefix + name)) for prefix in columns]
        sys.stdout.write(f"  {name:<{width}}" + "".join(f"{cell:>17}" for cell in cells) + "\n")


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if name in ("nll", "ece", "area") else f"{100 * value:.1f} %"
