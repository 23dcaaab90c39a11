"""Holistic distillation: a critic learns to tell a student's score maps from a teacher's.

Liu et al., 2019, https://arxiv.org/abs/1903.04197. The critic sees a score map together with its
image and says how real the map is *given the image*; it is trained as a Wasserstein critic with
gradient penalty (Gulrajani et al., 2017, https://arxiv.org/abs/1704.00028), and the student learns
to score high with it. The critic owns its optimiser; its loss takes detached maps.
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
from kd.losses._checks import comparable, floating, mask_fits, not_negative, one_device, wide_type

KERNEL = 4


class SelfAttention(nn.Module):
    """Every place looks at every other; starts as the identity.

    Zhang et al., 2019, https://arxiv.org/abs/1805.08318.

    Args:
        channels: In and out; queries and keys have an eighth of them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 8, 1)
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        query, key, value = (
            layer(features).flatten(2) for layer in (self.query, self.key, self.value)
        )
        # Not scaled_dot_product_attention: its fused kernels have no second derivative.
        weights = (query.transpose(1, 2) @ key).softmax(dim=2)  # (N, H*W, H*W)
        seen = (value @ weights.transpose(1, 2)).unflatten(2, features.shape[2:])
        out: Tensor = features + self.gamma * seen
        return out


class Critic(nn.Module):
    """How real a score map is, given its image.

    Convolutions of 4 x 4 and stride 2 under spectral normalisation, self-attention on the last two,
    a 4 x 4 convolution to one value, averaged over the places that it fits. It computes in the
    type of its weights, float32, whatever autocast says: half precision is where such critics
    break.

    Args:
        num_classes: Channels of the score maps.
        widths: Channels of the convolutions.
        slope: Of the leaky ReLUs below 0.

    Raises:
        UserError: No class, or fewer than two convolutions.
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
        self.num_classes = num_classes
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
        self.halvings = len(widths)

    def forward(self, scores: Tensor, images: Tensor) -> Tensor:
        """Judge score maps.

        Args:
            scores: Probabilities, (N, C, h, w), at least 2 to the number of convolutions wide and
                high.
            images: Normalised, (N, 3, H, W); resized to the maps' grid.

        Returns:
            (N,): the higher, the more like a teacher's.

        Raises:
            UserError: Shapes or devices that do not fit, integers, or maps too small for the
                convolutions.
        """
        self._check(scores, images)
        own = self.last.weight.dtype
        with torch.autocast(scores.device.type, enabled=False):
            grid = (scores.shape[2], scores.shape[3])
            seen = F.interpolate(images.to(own), grid, mode="bilinear", align_corners=False)
            features = self.layers(torch.cat([scores.to(own), seen], dim=1))
            # What is smaller than the last kernel is filled up with nothing.
            missing = [max(KERNEL - side, 0) for side in (features.shape[3], features.shape[2])]
            features = F.pad(features, (0, missing[0], 0, missing[1]))
            judged: Tensor = self.last(features)
            return judged.mean(dim=(1, 2, 3))

    def _check(self, scores: Tensor, images: Tensor) -> None:
        if scores.ndim != 4 or scores.shape[1] != self.num_classes:
            raise UserError(
                f"critic: scores must be (N, {self.num_classes}, h, w), got {tuple(scores.shape)}"
            )
        if images.ndim != 4 or images.shape[:2] != (len(scores), 3):
            raise UserError(
                f"critic: images must be ({len(scores)}, 3, H, W), got {tuple(images.shape)}"
            )
        floating("critic", scores=scores, images=images)
        one_device("critic", scores=scores, images=images, weights=self.last.weight)
        least = 2**self.halvings
        if min(scores.shape[2:]) < least:
            raise UserError(
                f"critic: {self.halvings} halvings need maps of {least} x {least} at least, got "
                f"{scores.shape[2]} x {scores.shape[3]}; enlarge the score maps"
            )


def critic_loss(
    critic: nn.Module,
    student: Tensor,
    teacher: Tensor,
    images: Tensor,
    *,
    penalty: float = 10.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What the critic minimises: `D(student) - D(teacher) + penalty * (|grad D| - 1)^2`.

    The gradient is taken at a random point of the line between the two maps of each image. No
    gradient reaches student or teacher. Within what `torch.compile` compiles it runs as it is.

    Args:
        critic: Score maps and images to (N,).
        student: Logits, (N, C, h, w).
        teacher: Logits, (N, C, h, w).
        images: Normalised, (N, 3, H, W).
        penalty: Weight of the gradient penalty.
        generator: Draws the points, on the maps' device; torch's own where not given.

    Returns:
        Scalar, the mean over N; 0 where N is 0.

    Raises:
        UserError: Shapes or devices that differ, integers, or a negative penalty.
    """
    comparable("critic_loss", student, teacher, dimensions=4)
    not_negative("critic_loss", "penalty", penalty)
    wide = wide_type(student, teacher)
    fake, real = (_probabilities(logits.detach(), wide) for logits in (student, teacher))
    loss: Tensor = _told_apart(critic, fake, real, images, penalty, generator)
    return loss


# What is compiled has no second derivative, which the penalty needs.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _told_apart(
    critic: nn.Module,
    fake: Tensor,
    real: Tensor,
    images: Tensor,
    penalty: float,
    generator: torch.Generator | None,
) -> Tensor:
    mix = torch.rand(len(fake), 1, 1, 1, device=fake.device, generator=generator)
    between = torch.lerp(fake, real, mix.to(fake.dtype)).requires_grad_()
    with parametrize.cached():  # one power iteration and one normalised weight for all three
        judged_fake, judged_real = critic(fake, images), critic(real, images)
        judged_between = critic(between, images).sum()
    (slope,) = torch.autograd.grad(judged_between, between, create_graph=True)
    # A norm has no derivative at 0, where a critic that sees no difference begins.
    length = (slope.flatten(1).square().sum(dim=1) + 1e-12).sqrt()
    loss: Tensor = (judged_fake - judged_real + penalty * (length - 1).square()).sum()
    return loss / max(len(fake), 1)


def holistic(student: Tensor, images: Tensor, critic: nn.Module) -> Tensor:
    """What the student minimises: `-D(student)`.

    The critic's weights get a gradient as well, which its own step must not use: clear it, or
    freeze the critic meanwhile, as `Adversary` does.

    Args:
        student: Logits, (N, C, h, w).
        images: Normalised, (N, 3, H, W).
        critic: Score maps and images to (N,).

    Returns:
        Scalar, the mean over N; 0 with a zero gradient where N is 0.

    Raises:
        UserError: Logits that are no maps, integers, or what the critic refuses.
    """
    if student.ndim != 4:
        raise UserError(f"holistic: student must be (N, C, h, w), got {tuple(student.shape)}")
    floating("holistic", student=student)
    one_device("holistic", student=student, images=images)
    loss: Tensor = -critic(_probabilities(student, wide_type(student)), images).sum()
    return loss / max(len(student), 1)


def _probabilities(logits: Tensor, wide: torch.dtype) -> Tensor:
    # A softmax makes a clean 0 of -inf, which must show: the second term is 0, or NaN.
    return logits.softmax(dim=1, dtype=wide) + 0.0 * logits.detach()


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
