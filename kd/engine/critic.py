"""Train the critic of a holistic term, in an optimiser step after the student's step.

DDP does not support the second derivatives of the critic's gradient penalty. Therefore the critic
is outside the DDP wrapper, and its gradients are averaged over ranks here. All ranks have the same
critic weights and take the same steps.
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
    """The critic of a holistic term, with its optimiser and learning rate schedule.

    Attributes:
        name: Name of the holistic term.
        adversary: The critic and its losses, on the training device.
        optimizer: Optimiser of the critic's weights.
        schedule: Learning rate schedule of that optimiser.
        clip_norm: Largest norm of the critic's gradient; 0 turns clipping off.
    """

    name: str
    adversary: Adversary
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    clip_norm: float = 0.0

    def step(
        self, judged: Sequence[tuple[Mean, Tensor | float]], accelerator: Accelerator
    ) -> Tensor:
        """Train the critic for one step; return its detached losses, one per micro-batch, (M,).

        `judged` has, for each micro-batch, the holistic term's `Mean` (whose `judged` holds the
        score maps and images of the student's last step) and the factor of the micro-batch's loss.
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
        """Average gradients over ranks; the losses were multiplied by `world`, as for DDP."""
        gradients = [p.grad for p in self.adversary.parameters() if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        together /= world
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def state(self) -> dict[str, Any]:
        """Return the state dicts of critic, optimiser and schedule, for a checkpoint."""
        return {
            "model": self.adversary.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load(self, state: Mapping[str, Any], path: Path) -> None:
        """Restore a result of `state()` that was read from the checkpoint `path`."""
        load_state(self.adversary, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
