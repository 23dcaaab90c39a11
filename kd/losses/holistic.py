"""Holistic distillation: a critic distinguishes the student's score maps from the teacher's.

Liu et al., 2019, https://arxiv.org/abs/1903.04197. The critic rates how much a score map looks like
the teacher's for the same image. It is a Wasserstein critic with gradient penalty (Gulrajani et
al., 2017, https://arxiv.org/abs/1704.00028), trained on detached maps with a separate optimiser.
The student is trained to get high ratings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from kd.errors import UserError
from kd.losses._checks import (
    check_floating,
    check_mask,
    check_not_negative,
    check_pair,
    wide_dtype,
)

KERNEL = 4


class SelfAttention(nn.Module):
    """Self-attention over all positions of a feature map, initialised to the identity.

    Zhang et al., 2019, https://arxiv.org/abs/1805.08318. Queries and keys have an eighth of the
    input's `channels`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 8, 1)
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        """Apply self-attention to features (N, C, H, W); the shape stays the same."""
        query, key, value = (
            layer(features).flatten(2) for layer in (self.query, self.key, self.value)
        )
        # Not scaled_dot_product_attention: its fused kernels have no second derivative.
        weights = (query.transpose(1, 2) @ key).softmax(dim=2)  # (N, H*W, H*W)
        attended = (value @ weights.transpose(1, 2)).unflatten(2, features.shape[2:])
        out: Tensor = features + self.gamma * attended
        return out


class Critic(nn.Module):
    """Network that rates how much a score map looks like the teacher's for the given image.

    It has 4 x 4 convolutions of stride 2 with spectral normalisation, self-attention after the last
    two of them, and a 4 x 4 convolution to one channel, whose output is averaged. It computes in
    float32 even under autocast, because critics are unstable in half precision.

    Args:
        num_classes: Number of classes, which are the channels of the score maps.
        widths: Output channels of the strided convolutions, at least two numbers.
        slope: Negative slope of the leaky ReLUs.
    """

    def __init__(
        self, num_classes: int, *, widths: Sequence[int] = (64, 128, 256, 512), slope: float = 0.1
    ) -> None:
        super().__init__()
        if num_classes < 1 or len(widths) < 2:
            raise UserError(
                "critic: needs at least one class and two widths, got "
                f"{num_classes} and {list(widths)}"
            )
        layers: list[nn.Module] = []
        channels = num_classes + 3
        for number, width in enumerate(widths):
            convolution = nn.Conv2d(channels, width, KERNEL, stride=2, padding=1)
            layers += [spectral_norm(convolution), nn.LeakyReLU(slope)]
            if number >= len(widths) - 2:
                layers.append(SelfAttention(width))
            channels = width
        self.layers = nn.Sequential(*layers)
        self.last = nn.Conv2d(channels, 1, KERNEL)
        self.strides = len(widths)

    def forward(self, scores: Tensor, images: Tensor) -> Tensor:
        """Rate score maps: ratings (N,), higher for maps that look more like the teacher's.

        Args:
            scores: Class probabilities, (N, C, h, w); h and w must be at least 2**n for n strided
                convolutions.
            images: Normalised images, (N, 3, H, W), which are resized to (h, w).
        """
        least = 2**self.strides
        if min(scores.shape[2:]) < least:
            raise UserError(
                f"critic: {self.strides} convolutions need maps of at least {least} x {least}, got "
                f"{scores.shape[2]} x {scores.shape[3]}"
            )
        own = self.last.weight.dtype
        with torch.autocast(scores.device.type, enabled=False):
            grid = (scores.shape[2], scores.shape[3])
            resized = F.interpolate(images.to(own), grid, mode="bilinear", align_corners=False)
            features = self.layers(torch.cat([scores.to(own), resized], dim=1))
            # Pad maps that are smaller than the last kernel.
            padding = [max(KERNEL - side, 0) for side in (features.shape[3], features.shape[2])]
            features = F.pad(features, (0, padding[0], 0, padding[1]))
            score: Tensor = self.last(features)
            return score.mean(dim=(1, 2, 3))


# Not compiled, because compiled code has no second derivative, which the gradient penalty needs.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def critic_loss(
    critic: nn.Module,
    student: Tensor,
    teacher: Tensor,
    images: Tensor,
    *,
    penalty: float = 10.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Loss of the critic D: `D(student) - D(teacher) + penalty * (|grad D| - 1)^2`, mean over N.

    The gradient of D is taken at a random point on the line between the student's and the teacher's
    probabilities of an image. Student and teacher get no gradient. Under `torch.compile` this
    function runs uncompiled. The loss is 0 if N is 0.

    Args:
        critic: Module that maps class probabilities (N, C, h, w) and images to ratings (N,).
        student: Logits, (N, C, h, w).
        teacher: Logits, (N, C, h, w).
        images: Normalised images, (N, 3, H, W).
        penalty: Weight of the gradient penalty.
        generator: Random generator for the points, on the maps' device; None = torch's default.
    """
    check_pair("critic_loss", student, teacher, dimensions=4)
    check_not_negative("critic_loss", "penalty", penalty)
    dtype = wide_dtype(student, teacher)
    fake, real = (_probabilities(logits.detach(), dtype) for logits in (student, teacher))
    loss: Tensor = _critic_loss(critic, fake, real, images, penalty, generator)
    return loss


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _critic_loss(
    critic: nn.Module,
    fake: Tensor,
    real: Tensor,
    images: Tensor,
    penalty: float,
    generator: torch.Generator | None,
) -> Tensor:
    mix = torch.rand(len(fake), 1, 1, 1, device=fake.device, generator=generator)
    between = torch.lerp(fake, real, mix.to(fake.dtype)).requires_grad_()
    with parametrize.cached():  # one power iteration for all three calls
        score_fake, score_real = critic(fake, images), critic(real, images)
        score_between = critic(between, images).sum()
    (slope,) = torch.autograd.grad(score_between, between, create_graph=True)
    # A norm has no derivative at 0, and the gradient of an untrained critic may be 0.
    length = (slope.flatten(1).square().sum(dim=1) + 1e-12).sqrt()
    loss: Tensor = (score_fake - score_real + penalty * (length - 1).square()).sum()
    return loss / max(len(fake), 1)


def holistic(student: Tensor, images: Tensor, critic: nn.Module) -> Tensor:
    """Loss of the student, `-D(student)` for the critic D, mean over N.

    The critic's weights also receive a gradient, which its optimiser must not use: clear it, or
    freeze the critic as `Adversary` does. The loss is 0 with a zero gradient if N is 0.

    Args:
        student: Logits, (N, C, h, w).
        images: Normalised images, (N, 3, H, W).
        critic: Module that maps class probabilities (N, C, h, w) and images to ratings (N,).
    """
    check_floating("holistic", student=student)
    loss: Tensor = -critic(_probabilities(student, wide_dtype(student)), images).sum()
    return loss / max(len(student), 1)


def _probabilities(logits: Tensor, dtype: torch.dtype) -> Tensor:
    # The second term is NaN for infinite logits, so that training stops at them.
    return logits.softmax(dim=1, dtype=dtype) + 0.0 * logits.detach()


class Adversary(nn.Module):
    """A critic with the losses of student and critic.

    Args:
        num_classes: Number of classes, which are the channels of the score maps.
        penalty: Weight of the gradient penalty in the critic's loss.
        widths: Output channels of the critic's convolutions, see `Critic`.
        slope: Negative slope of the critic's leaky ReLUs.
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
        check_not_negative("holistic", "penalty", penalty)
        self.critic = Critic(num_classes, widths=widths, slope=slope)
        self.penalty = penalty

    def forward(self, student: Tensor, teacher: Tensor, images: Tensor) -> Tensor:
        """Compute the student's loss (`holistic`) without changing the critic or its gradients."""
        check_pair("holistic", student, teacher, dimensions=4)
        with _frozen(self.critic):
            return holistic(student, images, self.critic)

    def judge(self, student: Tensor, teacher: Tensor, images: Tensor) -> Tensor:
        """Compute the critic's loss, see `critic_loss`."""
        loss: Tensor = critic_loss(self.critic, student, teacher, images, penalty=self.penalty)
        return loss


def without_void(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Replace the student's logits by the teacher's at void pixels, which have no class.

    A critic rates whole maps and cannot exclude pixels. Pass the result to both losses of
    `Adversary` instead of the student's map, so that the critic sees no difference at void pixels.
    The paper (Liu et al., 2019, https://arxiv.org/abs/1903.04197) does not mention void.

    Args:
        student: Logits, (N, C, h, w).
        teacher: Logits, (N, C, h, w).
        valid: Pixels that have a class, bool (N, h, w).

    Returns:
        Logits, (N, C, h, w), in the wider of the two dtypes. Gradients reach only the student's
        valid pixels.
    """
    check_pair("holistic", student, teacher, dimensions=4)
    check_mask("holistic", "valid", valid, student, like="student")
    return torch.where(valid[:, None], student, teacher.detach())


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Within a `with` block, disable weight gradients and spectral norm's power iteration."""
    training = module.training
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        module.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)
