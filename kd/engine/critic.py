"""Train a critic: its own optimiser and schedule, its own step after the student's.

DDP does not support the second derivatives of the gradient penalty, so the critic is outside the
module that DDP wraps and its gradients are summed over ranks here. All ranks hold the same critic
and take the same steps.
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
    """A holistic term's critic, on the device, with its optimiser and schedule.

    `name` is the term's name; `clip_norm` the largest norm of the gradient, 0 for no clipping.
    """

    name: str
    adversary: Adversary
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    clip_norm: float = 0.0

    def step(
        self, judged: Sequence[tuple[Mean, Tensor | float]], accelerator: Accelerator
    ) -> Tensor:
        """Train on the score maps of the student's last step.

        `judged` has the term's value with its maps, and the scale of its unit, for each
        micro-batch. Returns the losses, one for each micro-batch, detached.
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
        """Average gradients over ranks; the losses' scales contain the number of ranks."""
        gradients = [p.grad for p in self.adversary.parameters() if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        together /= world
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        return {
            "model": self.adversary.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load(self, state: Mapping[str, Any], path: Path) -> None:
        """Restore from `state()`; a critic of another shape is a UserError."""
        load_state(self.adversary, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
