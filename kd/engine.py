"""The only training loop: `fit`, `train_step`, `evaluate`, for teachers and students alike.

Gradients are those of the whole batch: with several processes, or several micro-batches a step,
each loss is scaled by the share of labelled objects, hidden objects, ... that it speaks for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from kd.checkpoint import Progress
from kd.errors import UserError
from kd.objective import Term, distillation_losses, weighted_sum
from kd.optim import update_average
from kd.soft_targets import SoftTargetSource
from kd.tasks.base import Batch, Mean, Task, count_units, image_rows

Losses = dict[str, Mean]


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


class Metric(Protocol):
    """Collects predictions; adds up over ranks before it computes."""

    def update(
        self, log_probs: Tensor, labels: Tensor, shares: Tensor, object_ids: Tensor,
        image_ids: Tensor,
    ) -> None:  # fmt: skip
        """Take rows in."""
        ...

    def gather(self) -> None:
        """Exchange with the other ranks."""
        ...


@dataclass
class Objective:
    """What is minimised: the task's losses and the distillation terms with their weights."""

    task: Task
    weights: Mapping[str, float]
    terms: Sequence[Term] = ()
    soft_targets: SoftTargetSource | None = None

    def weights_at(self, progress: float) -> dict[str, float]:
        """Weights of all losses at a share 0..1 of training."""
        return {**self.weights, **{term.name: term.weight_at(progress) for term in self.terms}}


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
    progress: Progress = field(default_factory=Progress)

    @property
    def bare(self) -> nn.Module:
        """The model without the wrapper for several processes."""
        return self.accelerator.unwrap_model(self.model)  # type: ignore[no-any-return]

    @property
    def result(self) -> nn.Module:
        """What is evaluated and exported: the averaged weights where there are some."""
        return self.bare if self.ema is None else self.ema

    @property
    def exported(self) -> nn.Module:
        """The result without its adapters."""
        student = self.result.student
        assert isinstance(student, nn.Module)
        return student


@dataclass
class Hooks:
    """What `fit` calls; a command decides what to do with it."""

    log: Callable[[dict[str, float], int], None]
    checkpoint: Callable[[], None]
    epoch_end: Callable[[int], None]
    stop: Callable[[], None]
    progress: Callable[[Progress, int], None] = lambda progress, batches: None


def to_device(
    batch: Mapping[str, Tensor], device: torch.device, *, channels_last: bool
) -> dict[str, Tensor]:
    """Move a batch; images in the memory format of the model."""
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    if channels_last:
        moved["images"] = moved["images"].contiguous(memory_format=torch.channels_last)
    return moved


def forward_losses(model: nn.Module, batch: Batch, objective: Objective) -> Losses:
    """Supervised losses and distillation terms of one batch, unweighted."""
    task = objective.task
    output, features = model(*task.inputs(batch))
    losses = task.losses(output, batch)
    if objective.terms and objective.soft_targets is not None:
        with torch.no_grad():
            known = objective.soft_targets(batch)
        losses |= distillation_losses(
            objective.terms, {**output, **features}, known, task.masks(batch), image_rows(batch)
        )
    return losses


def _scales(
    batches: Sequence[Batch], units: set[str], accelerator: Accelerator
) -> tuple[list[dict[str, Tensor | float]], list[dict[str, Tensor]]]:
    """Factor of each unit for each micro-batch, and the micro-batches' own counts."""
    world = accelerator.num_processes
    counts = [count_units(batch, units) for batch in batches]
    if world == 1 and len(batches) == 1:
        return [dict.fromkeys(units, 1.0)], counts
    names = sorted(units)
    whole = torch.stack([torch.stack([count[unit] for unit in names]) for count in counts]).sum(0)
    if world > 1:
        dist.all_reduce(whole)
    totals = dict(zip(names, whole, strict=True))
    # DDP averages gradients over ranks; the whole batch's mean wants their sum.
    scales: list[dict[str, Tensor | float]] = [
        {unit: count[unit] * world / totals[unit].clamp(min=1e-9) for unit in units}
        for count in counts
    ]
    return scales, counts


def train_step(
    training: Training, batches: Sequence[Batch], objective: Objective, weights: Mapping[str, float]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step of the optimiser over one or more micro-batches.

    Returns:
        Sums over this process of each loss times its count, and the counts: both detached, on the
        device. `loss/total` among them.
    """
    accelerator = training.accelerator
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    units = {"hidden", "labelled"} | {t.kind.mask for t in objective.terms if t.kind.mask}
    scales, held = _scales(batches, units, accelerator)
    for number, (batch, scale, own) in enumerate(zip(batches, scales, held, strict=True)):
        last = number == len(batches) - 1
        quiet = contextlib.nullcontext() if last else accelerator.no_sync(training.model)
        with quiet:
            losses = forward_losses(training.model, batch, objective)
            total = weighted_sum(losses, weights, scale)
            accelerator.backward(total)
        for name, loss in losses.items():
            _add(sums, name, loss.value.detach() * own[loss.unit])
            _add(counts, name, own[loss.unit])
        _add(sums, "total", total.detach())
        _add(counts, "total", torch.ones_like(total.detach()) if last else torch.zeros(()))
    if training.clip_norm:
        accelerator.clip_grad_norm_(training.model.parameters(), training.clip_norm)
    training.optimizer.step()
    training.schedule.step()
    training.optimizer.zero_grad(set_to_none=True)
    if training.ema is not None:
        update_average(training.ema, training.bare, training.ema_decay, training.progress.step)
    return sums, counts


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _groups(loader: EpochLoader, size: int) -> Iterator[list[dict[str, Tensor]]]:
    """Micro-batches, `size` a step; the last step of an epoch may have fewer."""
    group: list[dict[str, Tensor]] = []
    # A loader draws a seed when it starts; a resumed epoch must not shift the global stream.
    with torch.random.fork_rng(devices=[]):
        iterator = iter(loader)
    for batch in iterator:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def fit(
    training: Training,
    objective: Objective,
    loader: EpochLoader,
    *,
    epochs: int,
    hooks: Hooks,
    accumulate: int = 1,
    log_every: int = 20,
    checkpoint_every: int = 0,
) -> None:
    """Train from `training.progress` to the last epoch.

    Args:
        training: Model, optimiser and the place in training.
        objective: What is minimised.
        loader: Micro-batches of this process.
        epochs: How many, counted from the very start.
        hooks: What happens on the way.
        accumulate: Micro-batches a step.
        log_every: Steps between log lines.
        checkpoint_every: Steps between checkpoints inside an epoch; 0 = only at its end.

    Raises:
        UserError: A loss became NaN or infinite; the last good checkpoint stays.
    """
    place = training.progress
    steps = epochs * math.ceil(len(loader) / accumulate)
    window = _Window(training.accelerator)
    while place.epoch < epochs:
        training.model.train()
        loader.set_epoch(place.epoch, place.batch)
        for group in _groups(loader, accumulate):
            batches = [
                to_device(batch, training.accelerator.device, channels_last=training.channels_last)
                for batch in group
            ]
            weights = objective.weights_at(place.step / max(steps - 1, 1))
            window.take(*train_step(training, batches, objective, weights))
            place.step += 1
            place.batch += len(group)
            hooks.progress(place, len(loader))
            save = bool(checkpoint_every) and place.step % checkpoint_every == 0
            if place.step % log_every == 0 or save:
                values = window.close(place.step)
                values["train/lr"] = training.optimizer.param_groups[-1]["lr"]
                hooks.log(values, place.step)
            if save and place.batch < len(loader):
                hooks.checkpoint()
            hooks.stop()
        hooks.log(window.close(place.step), place.step)
        place.epoch, place.batch = place.epoch + 1, 0
        hooks.checkpoint()
        hooks.epoch_end(place.epoch)


class _Window:
    """Losses since the last log line, summed on the device and over ranks when it closes."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def take(self, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> None:
        for name in sums:
            _add(self._sums, name, sums[name])
            _add(self._counts, name, counts[name])

    def close(self, step: int) -> dict[str, float]:
        """Means by tag; an infinite or missing number stops the training."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        values = torch.stack([self._sums[n].float() for n in names])
        counts = torch.stack([self._counts[n].float().to(values.device) for n in names])
        both = torch.stack([values, counts])
        if self._accelerator.num_processes > 1:
            dist.all_reduce(both)
        self._sums, self._counts = {}, {}
        sums, totals = both.tolist()
        broken = [name for name, value in zip(names, sums, strict=True) if not math.isfinite(value)]
        if broken:
            raise UserError(
                f"loss {', '.join(broken)} is not finite at step {step}; training stopped, the "
                "last good checkpoint is kept. Lower train.optimizer.lr, raise "
                "train.schedule.warmup or set train.precision=fp32, and train again"
            )
        return {
            f"loss/{name}": value / count
            for name, value, count in zip(names, sums, totals, strict=True)
            if count > 0
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    loader: EpochLoader,
    metric: Metric,
    accelerator: Accelerator,
    *,
    channels_last: bool = False,
) -> None:
    """Put the predictions of every hidden object of `loader` into `metric`, over all ranks.

    Args:
        model: An `AdaptedStudent`, not wrapped.
        task: How it is asked and read.
        loader: Batches of this process.
        metric: Takes the predictions; ranks are put together at the end.
        accelerator: Devices and processes.
        channels_last: Memory format of the images.
    """
    was_training = model.training
    model.eval()
    loader.set_epoch(0)
    with torch.random.fork_rng(devices=[]):
        iterator = iter(loader)
    for cpu_batch in iterator:
        batch = to_device(cpu_batch, accelerator.device, channels_last=channels_last)
        with accelerator.autocast():
            output, _ = model(*task.inputs(batch))
        hidden = batch["hidden"]
        metric.update(
            task.decode(output, batch),
            batch["labels"][hidden],
            batch["shares"][hidden],
            batch["object_ids"][hidden],
            batch["image_ids"][image_rows(batch)],
        )
    metric.gather()
    model.train(was_training)
