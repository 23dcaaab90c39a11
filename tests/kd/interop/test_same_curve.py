"""The same job in torchdistill's engine and in ours: the same loss at every step."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchdistill.core.distillation import get_distillation_box

from kd.config.recipes import TermSection
from kd.distillation.student import AdaptedStudent
from kd.distillation.targets import LiveTeacher
from kd.distillation.terms import build_term
from kd.engine.loop import fit
from kd.engine.optim import make_schedule
from kd.engine.state import Hooks, Objective, Training
from kd.losses.supervised import cross_entropy_labelled
from kd.problems.base import Batch, Classes, Evaluator, Mask, Mean, Output, Rows, Task
from kd.problems.objects.batch import hidden_labels, object_counts, object_rows
from kd.runs.build import make_accelerator
from kd.transforms.hide import normalise

CLASSES, SIDE, SIZE, STEPS, EPOCHS = 5, 12, 6, 4, 3
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
HARD_WEIGHT = 0.3  # of cross-entropy in the loss


@dataclass(frozen=True)
class Pictures(Task):
    """Which class is the image?"""

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images, normalised."""
        return (normalise(batch["images"]),)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`cross_entropy`."""
        value = cross_entropy_labelled(output["logits"], hidden_labels(batch))
        return {"cross_entropy": Mean(value, "labelled")}

    def rows(self, batch: Batch) -> Rows:
        """An object each."""
        return object_rows(batch)

    def counts(
        self, batch: Batch, units: Collection[str] = (), masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        """Of objects."""
        return object_counts(batch, units)

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Log-probabilities."""
        return output["logits"].log_softmax(dim=1)

    def metric(self, classes: Classes) -> Evaluator:
        """Nothing is evaluated here."""
        raise NotImplementedError


class Whole:
    """Batches of images in order, one object each."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = torch.arange(SIZE)
        for images, labels in zip(self.images.split(SIZE), self.labels.split(SIZE), strict=True):
            yield {"images": images, "labels": labels, "image_of": rows, "hidden": rows}

    def __len__(self) -> int:
        return STEPS

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """The same order every time."""


def network(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES),
    )  # fmt: skip


@pytest.fixture
def job() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Student, teacher, images and labels."""
    torch.manual_seed(0)
    student, teacher = network(6), network(24).eval()
    with torch.no_grad():  # a teacher with opinions, else its temperature would hardly matter
        next(teacher[-1].parameters()).mul_(10)
    number = SIZE * STEPS
    images = torch.randint(256, (number, 3, SIDE, SIDE), dtype=torch.uint8)
    return student, teacher, images, torch.randint(CLASSES, (number,))


Job = tuple[nn.Module, nn.Module, Tensor, Tensor]


def by_torchdistill(job: Job, temperature: float) -> list[float]:
    student, teacher, images, labels = copy.deepcopy(job)
    sides = ("student", "teacher")
    places = {f"{side}_module_{what}": at for side in sides for what, at in
              (("path", "."), ("io", "output"))}  # fmt: skip
    loss = {**places, "temperature": temperature, "alpha": HARD_WEIGHT}
    config = {
        "num_epochs": EPOCHS,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.SequentialSampler},
            "kwargs": {"batch_size": SIZE},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": dict(SGD)},
        "scheduler": {
            "key": "CosineAnnealingLR",
            "kwargs": {"T_max": EPOCHS * STEPS},
            "scheduling_step": 1,
        },
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": loss}, "weight": 1.0}}
            },
        },
    }
    data = {"train": TensorDataset(normalise(images), labels)}
    device = torch.device("cpu")
    box = get_distillation_box(teacher, student, data, config, device, None, False, 1)
    losses = []
    for epoch in range(EPOCHS):
        box.pre_epoch_process(epoch=epoch)
        for batch, targets, more in box.train_data_loader:
            value = box.forward_process(batch, targets, more)
            box.post_forward_process(loss=value)
            losses.append(value.item())
        box.post_epoch_process()
    return losses


def by_kd(job: Job, temperature: float) -> list[float]:
    student, teacher, images, labels = copy.deepcopy(job)
    accelerator = make_accelerator("fp32")
    model = AdaptedStudent(student.to(accelerator.device))
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    schedule = make_schedule(optimizer, EPOCHS * STEPS, name="cosine")
    training = Training(accelerator, accelerator.prepare(model), optimizer, schedule)
    term = build_term(
        TermSection(name="output_kd", weight=1 - HARD_WEIGHT, options={"temperature": temperature})
    )
    known = LiveTeacher(teacher.to(accelerator.device), Pictures())
    objective = Objective(Pictures(), {"cross_entropy": HARD_WEIGHT}, [term], known)
    losses: list[float] = []

    def log(values: Mapping[str, float], step: int) -> None:
        losses.extend(value for name, value in values.items() if name == "loss/total")

    hooks = Hooks(log=log, checkpoint=lambda: None)
    fit(training, objective, Whole(images, labels), epochs=EPOCHS, hooks=hooks, log_every=1)
    return losses


def test_the_same_seed_gives_the_same_losses(job: Job) -> None:
    ours, theirs = by_kd(job, 4.0), by_torchdistill(job, 4.0)
    assert len(ours) == EPOCHS * STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-1] < 0.9 * ours[0]
    # What tells the two curves apart is not lost in the tolerance.
    colder = by_kd(job, 3.9)
    gaps = [abs(a - b) / b for a, b in zip(colder, theirs, strict=True)]
    assert min(gaps) > 1e-4, gaps
