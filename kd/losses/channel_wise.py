"""What each channel of a score or feature map looks at."""

from __future__ import annotations

from torch import Tensor

from kd.losses._checks import comparable, positive
from kd.losses.logits import kl_logits


def channel_wise(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """KL(teacher || student) of where each channel is active: a softmax over its places.

    Shu et al., 2021, https://arxiv.org/abs/2011.13256: `T^2 / (N * C)` times the sum over images
    and channels. A constant added to a channel changes nothing.

    Args:
        student: Logits or features, (N, C, H, W).
        teacher: The same, (N, C, H, W).
        temperature: Divides both; above 1 widens what a channel looks at.

    Returns:
        Scalar, the mean over N and C; 0 with a zero gradient where N is 0.

    Raises:
        UserError: Shapes or devices that differ, integers, or a temperature that is not above 0.
    """
    comparable("channel_wise", student, teacher, dimensions=4)
    positive("channel_wise", "temperature", temperature)
    rows = (maps.flatten(2).flatten(0, 1) for maps in (student, teacher))  # (N * C, H * W)
    return kl_logits(*rows, temperature=temperature)
