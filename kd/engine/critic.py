"""A critic in training: its own optimiser and schedule, its own step after the student's.

It is no part of the module that DDP wraps, which does not go with the second derivatives of the
gradient penalty: its gradients are summed over ranks here. All ranks hold the same critic and take
the same steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from kd.engine.checkpoint import load_state
from kd.losses.holistic import Adversary
from kd.problems.base import Mean


@dataclass
class CriticTraining:
    """A holistic term's critic and all that changes with it.

    Args:
        name: The term's.
        adversary: The critic with its losses, on the device.
        optimizer: Of its weights.
        schedule: Of its learning rate.
        clip_norm: Largest norm of its gradient; 0 = no clipping.
    """

    name: str
    adversary: Adversary
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    clip_norm: float = 0.0

    def step(
        self, judged: Sequence[tuple[Mean, Tensor | float]], accelerator: Accelerator
    ) -> Tensor:
        """Learn from what the student was just judged by.

        Args:
            judged: The term's value of each micro-batch with its maps, and the scale of its unit.
            accelerator: Devices and processes.

        Returns:
            The losses, one for each micro-batch, detached.
        """
        values = []
        for mean, scale in judged:
            loss = self.adversary.judge(*mean.judged)
            (loss * scale).backward()
            values.append(loss.detach())
        if accelerator.num_processes > 1:
            self._add_up(accelerator.num_processes)
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.adversary.parameters(), self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(values)

    def _add_up(self, world: int) -> None:
        """Average gradients over ranks, whose scales have the number of ranks in them."""
        gradients = [p.grad for p in self.adversary.parameters() if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        together /= world
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "model": self.adversary.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load(self, state: Mapping[str, Any], path: Path) -> None:
        """Put it back to `state()`.

        Raises:
            UserError: A critic of another shape.
        """
        load_state(self.adversary, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
