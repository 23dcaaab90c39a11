"""Set up a training run: its folder, optimiser, schedule, averaged weights and critics."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from kd.config.recipes import Critic, Train
from kd.data.loader import Samples, collate, to_device
from kd.engine.critic import CriticTraining
from kd.engine.loop import forward_losses
from kd.engine.optim import make_optimizer, make_schedule
from kd.engine.state import Objective, Training
from kd.errors import UserError
from kd.losses.holistic import Adversary
from kd.nn.freeze import FrozenBatchNorm
from kd.problems.base import Batch, Mean
from kd.runs.folder import RunFolder


def open_run(
    accelerator: Accelerator, path: Path, config: Mapping[str, Any], *, resume: bool
) -> RunFolder:
    """Open a run folder on every process; an error of the main process is raised on all."""
    folder: RunFolder | None = None
    message: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            folder = RunFolder(path, config, resume=resume)
        except UserError as error:
            message = [str(error)]
    broadcast_object_list(message)
    if message[0] is not None:
        raise UserError(message[0])
    for rank in range(
        1, accelerator.num_processes
    ):  # one after the other: opening may delete files
        if rank == accelerator.process_index:
            folder = RunFolder(path, config, resume=True)
        accelerator.wait_for_everyone()
    assert folder is not None
    return folder


def first_batch(samples: Samples, train: Train, accelerator: Accelerator) -> dict[str, Tensor]:
    """Return a batch of at most two training samples, to find mistakes before training."""
    own = train.batch_size // train.accumulate // accelerator.num_processes
    batch = collate([samples[0, place] for place in range(min(2, max(1, own), len(samples)))])
    return to_device(batch, accelerator.device, channels_last=False)


def check_losses(
    model: nn.Module, batch: Batch, objective: Objective, num_classes: int, *, called: str
) -> dict[str, Mean]:
    """Compute the losses of a batch before training; raise a UserError if the model does not fit.

    The model, an `AdaptedStudent`, runs in training mode, which changes its batch norm statistics.
    Error messages start with `called`. Returns the losses by name, without gradient.
    """
    task = objective.task
    model.train()
    try:
        with torch.no_grad():
            output, _ = model(*task.inputs(batch))
            for name in (name for name in task.class_scores if name in output):
                if output[name].shape[1] != num_classes:
                    raise UserError(
                        f"{called}: gives {name} {tuple(output[name].shape)}, but the dataset has "
                        f"{num_classes} classes"
                    )
            return forward_losses(model, batch, objective)
    except KeyError as error:
        if error.args[0] not in task.outputs:
            raise
        raise UserError(
            f"{called}: gives no output {error.args[0]!r}, which the task's losses read; it gives: "
            f"{', '.join(output)}"
        ) from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "train.batch_size: batch norm needs at least 2 images per process and micro-batch, got "
            f"{len(batch['images'])}"
        ) from error


def start_training(
    accelerator: Accelerator,
    model: nn.Module,
    train: Train,
    steps: int,
    critics: Mapping[str, nn.Module] | None = None,
) -> Training:
    """Move a model to the device and set up its optimiser, schedule, averaged weights and critics.

    `model` is an `AdaptedStudent`, and `steps` is the total number of training steps. `critics` has
    the `Adversary` of each holistic loss term, by name of the term.
    """
    # Baselines of counts have no parameters to optimise and no gradients for DDP.
    weights = model if learns(model) else nn.Linear(1, 1)
    optimizer = make_optimizer(weights, **train.optimizer.model_dump())
    schedule = make_schedule(optimizer, steps, **train.schedule.model_dump())
    model = model.to(accelerator.device)
    if train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if train.sync_batch_norm and accelerator.num_processes > 1:
        model = sync_batch_norms(model)
    ema = copy.deepcopy(model).eval().requires_grad_(False) if train.ema else None
    if train.compile:
        model.compile()
    # The optimiser is not wrapped: accelerate's wrapper scales fp16 gradients, and searches
    # the file system for a package at every step.
    wrapped = accelerator.prepare(model) if learns(model) else model
    return Training(
        accelerator, wrapped, optimizer, schedule, ema, train.ema, train.clip_norm,
        train.channels_last, [
            _start_critic(accelerator, name, adversary, train.critic, steps)
            for name, adversary in (critics or {}).items()
        ],
    )  # fmt: skip


def _start_critic(
    accelerator: Accelerator, name: str, adversary: nn.Module, section: Critic, steps: int
) -> CriticTraining:
    assert isinstance(adversary, Adversary)
    adversary = adversary.to(accelerator.device)
    if accelerator.num_processes > 1:
        for tensor in adversary.state_dict().values():
            dist.broadcast(tensor, 0)
    optimizer = make_optimizer(adversary, **section.optimizer.model_dump())
    schedule = make_schedule(optimizer, steps, **section.schedule.model_dump())
    return CriticTraining(name, adversary, optimizer, schedule, section.clip_norm)


def sync_batch_norms(module: nn.Module) -> nn.Module:
    """Make batch norms, except frozen ones, compute statistics over all processes."""
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        if isinstance(module, FrozenBatchNorm):
            return module
        shared: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return shared
    for name, child in module.named_children():
        setattr(module, name, sync_batch_norms(child))
    return module


def learns(model: nn.Module) -> bool:
    """Return whether the model has parameters that are trained by gradient descent."""
    return any(parameter.requires_grad for parameter in model.parameters())


def count_parameters(model: nn.Module) -> int:
    """Return the number of the model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
