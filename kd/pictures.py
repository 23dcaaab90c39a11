"""Pictures of a run: the hidden scene, what the teacher expects there, the student's answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kd.build import make_dataset
from kd.data.dataset import collate
from kd.engine import evaluating, to_device
from kd.report.pictures import hidden_scene_figure
from kd.session import Session
from kd.tasks.base import Task
from kd.tracking import Tracker
from kd.training import Training

Expectation = Callable[[dict[str, Tensor]], Tensor]


@torch.no_grad()
def write_pictures(
    session: Session,
    training: Training,
    task: Task,
    tracker: Tracker,
    *,
    expectation: Expectation | None = None,
) -> None:
    """Write a few val objects to TensorBoard, the same ones in every run of a data set.

    Args:
        session: The run; `train.pictures` says how many.
        training: Its model.
        task: How that is asked and read.
        tracker: Where to.
        expectation: The teacher's probabilities for a batch's hidden objects, beside the model's.
    """
    dataset = make_dataset(session.data, "val", train=False)
    names = list(session.data.val.class_names)
    count = min(session.train.pictures, len(dataset))
    for number in range(count):
        position = number * len(dataset) // count
        sample = collate([dataset[0, position]])
        sample = {**sample, "hidden": sample["hidden"][:1], "hide_share": sample["hide_share"][:1]}
        if "segments" in sample:
            sample["segments"] = sample["segments"][:1]
        device = training.accelerator.device
        batch = to_device(sample, device, channels_last=session.train.channels_last)
        with evaluating(training.result):
            output, _ = training.result(*task.inputs(batch))
        own = "teacher" if expectation is None else "student"
        beliefs = {} if expectation is None else {"teacher": expectation(batch)[0]}
        beliefs[own] = task.decode(output, batch).exp()[0]
        row = int(sample["hidden"][0])
        figure = hidden_scene_figure(
            sample["images"][0],
            sample["boxes"][row],
            names[int(sample["labels"][row])],
            beliefs,
            names,
            size=(int(sample["sizes"][0, 0]), int(sample["sizes"][0, 1])),
        )
        tracker.figure(f"pictures/{number}", figure, training.progress.step)
