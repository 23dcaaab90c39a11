"""What a training consists of: a model with all that changes beside it, an objective, hooks."""

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
    """A loader whose order is a function of the epoch."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches of this process."""
        ...

    def __len__(self) -> int:
        """Batches an epoch."""
        ...

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Order of this epoch, from this batch on."""
        ...


@dataclass
class Objective:
    """What is minimised: the task's losses and the distillation terms with their weights.

    Args:
        task: Its losses are the supervised ones.
        weights: Weight of each supervised loss.
        terms: Distillation terms.
        soft_targets: What they compare the student with.
        watched: The terms are computed for their curves alone, without weight or gradient: so a
            plain student shows the same curves as its distilled twin.
    """

    task: Task
    weights: Mapping[str, float]
    terms: Sequence[Term] = ()
    soft_targets: SoftTargetSource | None = None
    watched: bool = False

    def weights_at(self, progress: float, step: int = 0) -> dict[str, float]:
        """Weights of all losses at a fraction 0..1 of training, after so many steps."""
        own = {t.name: 0.0 if self.watched else t.weight_at(progress, step) for t in self.terms}
        return {**self.weights, **own}

    @property
    def units(self) -> set[str]:
        """What the task has to count for the terms, beside its own units."""
        return {term.count for term in self.terms if term.count}


@dataclass
class Training:
    """A model being trained and all that changes with it; everything here is saved."""

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
        """The model without the wrapper for several processes."""
        return self.accelerator.unwrap_model(self.model)  # type: ignore[no-any-return]

    @property
    def result(self) -> nn.Module:
        """What is evaluated and exported: the averaged weights where there are some."""
        return self.unwrapped if self.ema is None else self.ema

    @property
    def exported(self) -> nn.Module:
        """The result without its adapters."""
        student = self.result.student
        assert isinstance(student, nn.Module)
        return student

    @property
    def rate(self) -> float:
        """The base learning rate of the next step; groups have their factors on it."""
        group = self.optimizer.param_groups[0]
        base: float = self.optimizer.defaults["lr"]
        return base * float(group["lr"]) / float(group["initial_lr"])


@dataclass
class Hooks:
    """What `fit` calls; a command decides what to do with it.

    `log` takes scalars by tag and the step; `stop` says whether this process was asked to stop;
    `epoch_end` takes the number of finished epochs; `progress` the place and an epoch's batches.
    """

    log: Callable[[dict[str, float], int], None]
    checkpoint: Callable[[], None]
    epoch_end: Callable[[int], None] = lambda epoch: None
    stop: Callable[[], bool] = lambda: False
    progress: Callable[[Progress, int], None] = lambda progress, batches: None


def save_training(training: Training, path: Path, config: Mapping[str, Any]) -> None:
    """Write everything that an exact resumption needs; every rank brings its random streams.

    Args:
        training: The model and all that changes with it.
        path: The checkpoint.
        config: The resolved recipe, kept in it.
    """
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
    """Put a training back to where its checkpoint was written.

    Raises:
        UserError: Not such a file, of another model, or of another number of processes.
    """
    accelerator = training.accelerator
    place, _, parts = load_checkpoint(path)
    streams = parts["streams"]
    if len(streams) != accelerator.num_processes:
        raise UserError(
            f"{path}: written by {len(streams)} processes, cannot be resumed with "
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
    """Add to a named sum, which may not be there yet."""
    sums[name] = sums[name] + value if name in sums else value


def not_finite(what: str, step: int) -> UserError:
    """The error for a loss that is not finite."""
    return UserError(
        f"{what} not finite at step {step}; training stopped, the last good checkpoint, if one was "
        f"written by then, is kept. {REMEDIES}"
    )


class Window:
    """Losses since the last log line, summed on the device and over ranks when it closes."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sums: Sums = {}
        self._counts: Sums = {}
        self._heard: dict[str, bool] = {}
        self.rate = 0.0

    def take(self, sums: Sums, counts: Sums) -> None:
        """Add a step's losses times counts, and its counts, both of this process."""
        for name in sums:
            add(self._sums, name, sums[name])
            add(self._counts, name, counts[name])

    def close(self, step: int) -> dict[str, float]:
        """Means by tag, with the rate of the last step; a loss that is not finite is an error."""
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
            self._heard[name] = self._heard.get(name, False) or count > 0
        broken = [name for name, value in zip(names, sums, strict=True) if not math.isfinite(value)]
        if broken:
            raise not_finite(f"loss {', '.join(broken)} is", step)
        means = {
            f"loss/{name}": value / count
            for name, value, count in zip(names, sums, totals, strict=True)
            if count > 0
        }
        return {**means, "train/lr": self.rate}

    def warn_of_silence(self, epoch: int) -> None:
        """Name the losses that had nothing to be a mean of in the epoch that ends."""
        heard, self._heard = self._heard, {}
        for name in (name for name, any_at_all in heard.items() if not any_at_all):
            log.warning(
                "epoch %d: loss %s had nothing to compare, no labelled object or an empty mask: it "
                "taught nothing",
                epoch,
                name,
            )
