"""State of a training run: model and optimiser, objective, hooks, running losses."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from kd.distillation.targets import SoftTargetSource
from kd.distillation.terms import Term
from kd.engine.checkpoint import (
    REMEDIES,
    Progress,
    load_checkpoint,
    load_state,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from kd.engine.critic import CriticTraining
from kd.errors import UserError
from kd.problems.base import Task

Sums = dict[str, Tensor]
log = logging.getLogger(__name__)


class EpochLoader(Protocol):
    """A loader of batches whose order depends on the epoch only."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Select the epoch that iteration yields, from batch `start_batch` on."""
        ...


@dataclass
class Objective:
    """The loss to minimise: the task's supervised losses and the distillation terms.

    Attributes:
        task: Computes the supervised losses.
        weights: Weights of the supervised losses by name.
        terms: Distillation terms, which define their own weights.
        soft_targets: Source of the teachers' outputs that the terms compare.
        watched: Whether the terms are only logged, without gradient. A plain student's terms are
            logged to compare its curves with those of a distilled student.
    """

    task: Task
    weights: Mapping[str, float]
    terms: Sequence[Term] = ()
    soft_targets: SoftTargetSource | None = None
    watched: bool = False

    def weights_at(self, progress: float, step: int = 0) -> dict[str, float]:
        """Return each loss's weight after `step` steps, at a fraction `progress` of training."""
        own = {t.name: 0.0 if self.watched else t.weight_at(progress, step) for t in self.terms}
        return {**self.weights, **own}

    @property
    def units(self) -> set[str]:
        """Units that the task has to count for the terms' means, in addition to its own units."""
        return {term.count for term in self.terms if term.count}


@dataclass
class Training:
    """A model in training, with everything that changes in a step and is saved in checkpoints.

    Attributes:
        accelerator: Devices, processes and precision.
        model: The `AdaptedStudent`, wrapped by DDP if there are several processes.
        optimizer: Optimiser of the model.
        schedule: Learning rate schedule of the optimiser.
        ema: Exponential moving average of the model, or None.
        ema_decay: Decay of that average.
        clip_norm: Largest norm of the gradient; 0 turns clipping off.
        channels_last: Whether images are in the channels-last memory format.
        critics: Critics of the holistic terms.
        progress: Position in training.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    ema: nn.Module | None = None
    ema_decay: float = 0.0
    clip_norm: float = 0.0
    channels_last: bool = False
    critics: Sequence[CriticTraining] = ()
    progress: Progress = field(default_factory=Progress)

    @cached_property
    def unwrapped(self) -> nn.Module:
        """The model without the DDP wrapper."""
        return self.accelerator.unwrap_model(self.model)  # type: ignore[no-any-return]

    @property
    def result(self) -> nn.Module:
        """The `AdaptedStudent` to evaluate: the moving average if there is one, else the model."""
        return self.unwrapped if self.ema is None else self.ema

    @property
    def exported(self) -> nn.Module:
        """The student network to export: `result` without its adapters."""
        student = self.result.student
        assert isinstance(student, nn.Module)
        return student

    @property
    def rate(self) -> float:
        """Learning rate of the next step, before any factor of `lr_scale`."""
        group = self.optimizer.param_groups[0]
        base: float = self.optimizer.defaults["lr"]
        return base * float(group["lr"]) / float(group["initial_lr"])


@dataclass
class Hooks:
    """Callbacks of `fit`.

    Attributes:
        log: Called with scalars by tag, and the step.
        checkpoint: Called to write a checkpoint.
        epoch_end: Called after each epoch, with the number of finished epochs.
        stop: Called after each step; returns whether training should stop.
        progress: Called after each step, with the position and the number of batches per epoch.
    """

    log: Callable[[dict[str, float], int], None]
    checkpoint: Callable[[], None]
    epoch_end: Callable[[int], None] = lambda epoch: None
    stop: Callable[[], bool] = lambda: False
    progress: Callable[[Progress, int], None] = lambda progress, batches: None


def save_training(training: Training, path: Path, config: Mapping[str, Any]) -> None:
    """Write a checkpoint with the random states of all ranks; every rank has to call this."""
    accelerator = training.accelerator
    streams: list[Any] = [rng_state()]
    if accelerator.num_processes > 1:
        own, streams = streams[0], [None] * accelerator.num_processes
        dist.all_gather_object(streams, own)
    if not accelerator.is_main_process:
        return
    parts: dict[str, Any] = {
        "model": training.unwrapped.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "schedule": training.schedule.state_dict(),
        "streams": streams,
        "critics": {critic.name: critic.state() for critic in training.critics},
    }
    if training.ema is not None:
        parts["ema"] = training.ema.state_dict()
    save_checkpoint(path, training.progress, config, parts)


def resume_training(training: Training, path: Path) -> None:
    """Restore a training run from a checkpoint of the same model and number of processes."""
    accelerator = training.accelerator
    place, _, parts = load_checkpoint(path)
    streams = parts["streams"]
    if len(streams) != accelerator.num_processes:
        raise UserError(
            f"{path}: written by {len(streams)} processes; it cannot be resumed with "
            f"{accelerator.num_processes}"
        )
    load_state(training.unwrapped, parts["model"], path)
    if training.ema is not None:
        load_state(training.ema, parts["ema"], path)
    training.optimizer.load_state_dict(parts["optimizer"])
    training.schedule.load_state_dict(parts["schedule"])
    for critic in training.critics:
        critic.load(parts["critics"][critic.name], path)
    set_rng_state(streams[accelerator.process_index])
    training.progress = place


def add(sums: Sums, name: str, value: Tensor) -> None:
    """Add `value` to the entry `name` of `sums`, and create the entry if it is missing."""
    sums[name] = sums[name] + value if name in sums else value


class Window:
    """Sums of the losses since the last log entry.

    They stay on the device to avoid synchronising it at each step; `close` returns the means over
    all ranks.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sums: Sums = {}
        self._counts: Sums = {}
        self._counted: dict[str, bool] = {}
        self.rate = 0.0

    def take(self, sums: Sums, counts: Sums) -> None:
        """Add the result of one `train_step`: sums of loss times count, and counts, by loss."""
        for name in sums:
            add(self._sums, name, sums[name])
            add(self._counts, name, counts[name])

    def close(self, step: int) -> dict[str, float]:
        """Return the mean of each loss and the learning rate by tag, and start a new window.

        A loss that is not finite is a UserError.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        both = torch.stack(
            [torch.stack([part[n].float() for n in names]) for part in (self._sums, self._counts)]
        )
        if self._accelerator.num_processes > 1:
            dist.all_reduce(both)
        self._sums, self._counts = {}, {}
        sums, totals = both.tolist()
        for name, count in zip(names, totals, strict=True):
            self._counted[name] = self._counted.get(name, False) or count > 0
        broken = [name for name, value in zip(names, sums, strict=True) if not math.isfinite(value)]
        if broken:
            raise UserError(
                f"loss {', '.join(broken)} is not finite at step {step}; training stopped. The "
                f"last checkpoint, if any, is unchanged. {REMEDIES}"
            )
        means = {
            f"loss/{name}": value / count
            for name, value, count in zip(names, sums, totals, strict=True)
            if count > 0
        }
        return {**means, "train/lr": self.rate}

    def warn_of_empty_losses(self, epoch: int) -> None:
        """Log a warning for each loss that was a mean over nothing in the whole of `epoch`."""
        for name, counted in self._counted.items():
            if not counted:
                log.warning(
                    "epoch %d: loss %s had no effect: no labelled object, or all masks are empty",
                    epoch, name,
                )  # fmt: skip
        self._counted = {}
