"""The critic of a holistic term together with both sides' losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kd.losses._checks import comparable, mask_fits, not_negative
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


def without_void(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """The student's maps with the teacher's at void places, where a critic finds no difference.

    A critic judges whole maps, which have no holes: give both losses of `Adversary` this map for
    the student's. The student learns nothing at void places; what it learns beside them depends
    on what the critic sees there, which is the teacher's. Liu et al., 2019,
    https://arxiv.org/abs/1903.04197, do not mention such places.

    Args:
        student: Logits, (N, C, h, w).
        teacher: Logits, (N, C, h, w).
        valid: Places that have a class, bool (N, h, w).

    Returns:
        Logits, (N, C, h, w), in the wider of the two types, so that the teacher's keep all their
        digits. A gradient reaches the student's valid places alone, and never the teacher.

    Raises:
        UserError: Shapes or devices that differ, integers, or a mask that is not bool.
    """
    comparable("holistic", student, teacher, dimensions=4)
    mask_fits("holistic", "valid", valid, student, beside="student")
    return torch.where(valid[:, None], student, teacher.detach())


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
