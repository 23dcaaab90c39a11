"""The critic of a holistic term together with both sides' losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from kd.losses._checks import comparable, not_negative
from kd.losses.holistic import Critic, critic_loss, holistic


class Adversary(nn.Module):
    """A critic and both sides' losses: what a holistic term consists of.

    Args:
        num_classes: Channels of the score maps.
        penalty: Weight of the gradient penalty.
        widths: Channels of the critic's convolutions.
        slope: Of its leaky ReLUs below 0.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        penalty: float = 10.0,
        widths: Sequence[int] = (64, 128, 256, 512),
        slope: float = 0.1,
    ) -> None:
        super().__init__()
        not_negative("holistic", "penalty", penalty)
        self.critic = Critic(num_classes, widths=widths, slope=slope)
        self.penalty = penalty

    def forward(self, student: Tensor, teacher: Tensor, images: Tensor) -> Tensor:
        """The student's loss; nothing about the critic changes, its gradient included."""
        comparable("holistic", student, teacher, dimensions=4)
        with _frozen(self.critic):
            return holistic(student, images, self.critic)

    def judge(self, student: Tensor, teacher: Tensor, images: Tensor) -> Tensor:
        """The critic's loss."""
        return critic_loss(self.critic, student, teacher, images, penalty=self.penalty)


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradient for the weights, and no step of spectral norm's power iteration."""
    training = module.training
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        module.train(training)
        for parameter in learning:
            parameter.requires_grad_(True)
