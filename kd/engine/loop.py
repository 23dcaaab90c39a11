"""The training loop of teachers and students: `fit`, `train_step` and `evaluate`.

Several processes or micro-batches give the same gradient as one large batch: the mean of each loss
is weighted by the process's or micro-batch's fraction of all objects (or images, boxes, cells).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from kd.data.loader import to_device
from kd.distillation.targets import known_counts
from kd.distillation.terms import distillation_losses, layer_masks, weighted_sum
from kd.engine.optim import update_average
from kd.engine.state import EpochLoader, Hooks, Objective, Sums, Training, Window, add
from kd.errors import UserError
from kd.nn.freeze import evaluating
from kd.problems.base import Batch, Collector, Mask, Mean, Task, cached_masks


def forward_losses(
    model: nn.Module, batch: Batch, objective: Objective, masks: Mapping[str, Mask] | None = None
) -> dict[str, Mean]:
    """Compute the supervised losses and distillation terms of one batch, unweighted, by name.

    Args:
        model: An `AdaptedStudent`, possibly wrapped by DDP.
        batch: The batch, on the device.
        objective: The task, the distillation terms and the source of soft targets.
        masks: The task's masks of this batch; None: compute them.
    """
    task = objective.task
    masks = task.masks(batch) if masks is None else masks
    rows = task.rows(batch)
    where = {} if rows.hidden else layer_masks(objective.terms, masks)
    output, features = model(*task.inputs(batch), where=where)
    losses = task.losses(output, batch)
    if objective.terms and objective.soft_targets is not None:
        with torch.no_grad():
            targets = objective.soft_targets(batch, rows)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not objective.watched):
            losses |= distillation_losses(
                objective.terms, {**output, **features}, targets, task, batch, masks
            )
    return losses


def _counts(batch: Batch, objective: Objective, masks: Mapping[str, Mask]) -> dict[str, Tensor]:
    counts = objective.task.counts(batch, objective.units, masks)
    return counts | known_counts(objective.soft_targets, objective.task.rows(batch))


def _scales(
    counts: Sequence[Mapping[str, Tensor]], accelerator: Accelerator
) -> list[dict[str, Tensor | float]]:
    """Return, for each micro-batch, the factor of a loss by the unit of its mean.

    The factor is the micro-batch's fraction of the whole batch's units (`counts`), times the number
    of processes.
    """
    world = accelerator.num_processes
    if world == 1 and len(counts) == 1:
        return [dict.fromkeys(counts[0], 1.0)]
    names = sorted(counts[0])
    whole = torch.stack([torch.stack([count[unit] for unit in names]) for count in counts]).sum(0)
    if world > 1:
        dist.all_reduce(whole)
    totals = dict(zip(names, whole, strict=True))
    # DDP averages gradients over ranks; the mean over the whole batch needs their sum.
    return [
        {unit: count[unit] * world / totals[unit].clamp(min=1e-9) for unit in names}
        for count in counts
    ]


def train_step(
    training: Training, batches: Sequence[Batch], objective: Objective, weights: Mapping[str, float]
) -> tuple[Sums, Sums]:
    """Take one optimiser step over one or more micro-batches of this process, on the device.

    `weights` has the weight of each loss by name.

    Returns:
        Two dicts by name of the loss, and `total`: the sum over micro-batches of the loss times its
            count, and the sum of the counts. The values are detached, of this process only.
    """
    accelerator = training.accelerator
    sums: Sums = {}
    counts: Sums = {}
    masks = [cached_masks(objective.task.masks(batch)) for batch in batches]
    sizes = [_counts(batch, objective, own) for batch, own in zip(batches, masks, strict=True)]
    scales = _scales(sizes, accelerator)
    taken: list[dict[str, Mean]] = []
    for number, (batch, scale, own) in enumerate(zip(batches, scales, sizes, strict=True)):
        last = number == len(batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(training.model):
            losses = forward_losses(training.model, batch, objective, masks[number])
            total = weighted_sum(losses, weights, scale)
            accelerator.backward(total)
        for name, loss in losses.items():
            add(sums, name, loss.value.detach() * own[loss.unit])
            add(counts, name, own[loss.unit])
        add(sums, "total", total.detach())  # already scaled, so that micro-batches can be summed
        taken.append({name: loss.detach() for name, loss in losses.items()})
    counts["total"] = torch.ones_like(sums["total"])
    if training.clip_norm:
        accelerator.clip_grad_norm_(training.model.parameters(), training.clip_norm)
    training.optimizer.step()
    training.schedule.step()
    training.optimizer.zero_grad(set_to_none=True)
    if training.ema is not None:
        update_average(training.ema, training.unwrapped, training.ema_decay, training.progress.step)
    for critic in training.critics:
        units = [losses[critic.name].unit for losses in taken]
        factors = [scale[unit] for scale, unit in zip(scales, units, strict=True)]
        judged = [losses[critic.name] for losses in taken]
        values = critic.step(list(zip(judged, factors, strict=True)), accelerator)
        for value, unit, own in zip(values, units, sizes, strict=True):
            add(sums, f"{critic.name}_critic", value * own[unit])
            add(counts, f"{critic.name}_critic", own[unit])
    return sums, counts


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
    """Train until `epochs` epochs are done in total, including epochs before a resume.

    A loss that is not finite is a UserError, and no new checkpoint is written. If training is
    interrupted, KeyboardInterrupt is raised after a checkpoint was written.

    Args:
        training: What is trained, at the position where training starts or resumes.
        objective: The losses to minimise.
        loader: Yields the micro-batches of this process.
        epochs: Total number of epochs.
        hooks: Callbacks for logs, checkpoints, evaluation and interruption.
        accumulate: Number of micro-batches per optimiser step.
        log_every: Steps between log entries.
        checkpoint_every: Steps between checkpoints within an epoch; 0: only at the end of epochs.
    """
    place, alone = training.progress, training.accelerator.num_processes == 1
    steps = epochs * math.ceil(len(loader) / accumulate)
    window = Window(training.accelerator)
    save = partial(_save, training, window, hooks)
    while place.epoch < epochs:
        training.model.train()
        loader.set_epoch(place.epoch, place.batch)
        for group in _groups(loader, accumulate, save if alone else None):
            window.rate = training.rate
            window.take(*_advance(training, group, objective, steps))
            hooks.progress(place, len(loader))
            if logs := place.step % log_every == 0:
                hooks.log(window.close(place.step), place.step)
            stops = _stop_requested(hooks, training.accelerator, poll=logs)
            due = bool(checkpoint_every) and place.step % checkpoint_every == 0
            if stops or (due and place.batch < len(loader)):
                save()
            if stops:
                raise KeyboardInterrupt
        place.epoch, place.batch = place.epoch + 1, 0
        save()
        window.warn_of_empty_losses(place.epoch)
        hooks.epoch_end(place.epoch)


def _save(training: Training, window: Window, hooks: Hooks) -> None:
    """Log the losses since the last log entry, and write a checkpoint if all are finite."""
    hooks.log(window.close(training.progress.step), training.progress.step)
    hooks.checkpoint()


def _advance(
    training: Training, group: Sequence[Batch], objective: Objective, steps: int
) -> tuple[Sums, Sums]:
    place, device = training.progress, training.accelerator.device
    batches = [to_device(b, device, channels_last=training.channels_last) for b in group]
    weights = objective.weights_at(place.step / max(steps - 1, 1), place.step)
    result = train_step(training, batches, objective, weights)
    place.step += 1
    place.batch += len(group)
    return result


def _groups(
    loader: EpochLoader, size: int, save: Callable[[], None] | None
) -> Iterator[list[dict[str, Tensor]]]:
    """Yield the micro-batches of each step: `size`, or fewer in the last step of an epoch.

    If an image cannot be read, `save` writes a checkpoint before the UserError ends training. It is
    None with several processes, because all ranks would have to call it, but only one has the
    error.
    """
    group: list[dict[str, Tensor]] = []
    try:
        for batch in loader:
            group.append(batch)
            if len(group) == size:
                yield group
                group = []
    except UserError:
        if save is not None:
            save()
        raise
    if group:
        yield group


def _stop_requested(hooks: Hooks, accelerator: Accelerator, *, poll: bool) -> bool:
    """Return whether any process was interrupted, so that all stop after the same step.

    With several processes this synchronises the device, so it returns False unless `poll` is true.
    """
    if accelerator.num_processes == 1:
        return hooks.stop()
    if not poll:
        return False
    requests = torch.tensor(float(hooks.stop()), device=accelerator.device)
    dist.all_reduce(requests)
    return bool(requests.item())


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    loader: EpochLoader,
    metric: Collector,
    accelerator: Accelerator,
    *,
    channels_last: bool = False,
) -> None:
    """Predict every batch of `loader`, add the predictions to `metric`, and gather all ranks.

    With several processes, the model's buffers, such as batch norm statistics, are first
    overwritten with those of rank 0. `model` is an `AdaptedStudent` without the DDP wrapper.
    """
    if accelerator.num_processes > 1:  # as DDP does before each training step
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    loader.set_epoch(0)
    with evaluating(model):
        for cpu_batch in loader:
            batch = to_device(cpu_batch, accelerator.device, channels_last=channels_last)
            with accelerator.autocast():
                output, _ = model(*task.inputs(batch))
            metric.take(task.decode(output, batch), batch)
    metric.gather()
