"""Pictures of a run: the hidden scene, what the teacher expects there, the student's answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from kd.data.collate import collate
from kd.engine import to_device
from kd.nn.modes import evaluating
from kd.opened import OpenData, make_dataset, of_objects
from kd.report.pictures import hidden_scene_figure
from kd.session import Session
from kd.tasks.base import Task
from kd.tracking import Tracker
from kd.training import Training

Expectation = Callable[[dict[str, Tensor]], Tensor]


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
    device, count = training.accelerator.device, session.train.pictures
    data = of_objects(session.data)
    figures = hidden_scenes(
        training.result, task, data, count=count, device=device, expectation=expectation
    )
    for number, figure in enumerate(figures):
        tracker.figure(f"pictures/{number}", figure, training.progress.step)


@torch.no_grad()
def hidden_scenes(
    model: nn.Module,
    task: Task,
    data: OpenData,
    *,
    count: int,
    device: torch.device,
    expectation: Expectation | None = None,
) -> Iterator[Figure]:
    """Draw val objects spread over the split, one figure each.

    Args:
        model: An `AdaptedStudent`.
        task: How it is asked and read.
        data: The data set.
        count: How many objects.
        device: Where the model lies.
        expectation: As for `write_pictures`.
    """
    dataset = make_dataset(data, "val", train=False)
    names = list(data.val.class_names)
    count = min(count, len(dataset))
    for number in range(count):
        sample = collate([dataset[0, number * len(dataset) // count]])
        for name in ("hidden", "hide_share", "segments"):
            if name in sample:
                sample[name] = sample[name][:1]
        batch = to_device(sample, device, channels_last=False)
        with evaluating(model):
            output, _ = model(*task.inputs(batch))
        own = "teacher" if expectation is None else "student"
        beliefs = {} if expectation is None else {"teacher": expectation(batch)[0]}
        beliefs[own] = task.decode(output, batch).exp()[0]
        row = int(sample["hidden"][0])
        yield hidden_scene_figure(
            sample["images"][0],
            sample["boxes"][row],
            names[int(sample["labels"][row])],
            beliefs,
            names,
            size=(int(sample["sizes"][0, 0]), int(sample["sizes"][0, 1])),
        )
