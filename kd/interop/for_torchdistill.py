"""Use the losses of kd in torchdistill, e.g. `kd.pair_wise`.

Importing this module registers `kd.<loss>` for each loss between one student tensor and one teacher
tensor. List it in the `dependencies` of a torchdistill config, as in
`docs/examples/torchdistill.yaml`. A loss takes torchdistill's module paths and its options in kd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss

from kd.errors import UserError
from kd.losses import (
    channel_wise,
    hint,
    imitation,
    imitation_mask,
    kl_logits,
    pair_wise,
    pixel_wise,
)
from kd.losses.imitation import anchor_grid
from kd.registry import check_options

LOSSES: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss for loss in (kl_logits, pixel_wise, pair_wise, channel_wise, hint)
}
Outputs = Mapping[str, Mapping[str, Tensor]]


class _Loss(nn.Module):
    """A loss of kd in torchdistill's interface, between the outputs of two modules."""

    def __init__(
        self,
        name: str,
        loss: Callable[..., Tensor],
        *,
        student_module_path: str,
        teacher_module_path: str,
        student_module_io: str = "output",
        teacher_module_io: str = "output",
        **options: Any,
    ) -> None:
        super().__init__()
        check_options(loss, options, what=f"kd.{name}")
        self.loss, self.options = loss, options
        self.student = student_module_path, student_module_io
        self.teacher = teacher_module_path, teacher_module_io

    def forward(
        self, student: Outputs, teacher: Outputs, targets: object = None, *_: Any
    ) -> Tensor:
        return self.loss(*self._sides(student, teacher), **self.options)

    def _sides(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        ours, theirs = student[self.student[0]], teacher[self.teacher[0]]
        return ours[self.student[1]], theirs[self.teacher[1]]


class _Imitation(_Loss):
    """Imitation loss in cells whose anchors fit an object.

    The targets must be lists of `{"boxes": ...}`, one per image. `stride` is the distance between
    anchors in pixels, `scales` are anchor sides in strides, and `ratios` are height / width. For
    `psi` see `imitation_mask`.
    """

    def __init__(
        self,
        name: str,
        loss: Callable[..., Tensor],
        *,
        stride: float = 16.0,
        scales: Sequence[float] = (8.0, 16.0, 32.0),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        psi: float = 0.5,
        **places: Any,
    ) -> None:
        super().__init__(name, loss, **places)
        sides = [(stride * s / r**0.5, stride * s * r**0.5) for s in scales for r in ratios]
        self.stride, self.sides, self.psi = stride, sides, psi

    def forward(
        self, student: Outputs, teacher: Outputs, targets: object = None, *_: Any
    ) -> Tensor:
        ours, theirs = self._sides(student, teacher)
        try:
            boxes = [one["boxes"] for one in targets]  # type: ignore[attr-defined]
        except (TypeError, KeyError, IndexError):
            message = 'kd.imitation: targets must be a list of {"boxes": (G, 4), ...}'
            raise UserError(message) from None
        grid = theirs.shape[2], theirs.shape[3]
        anchors = anchor_grid(*grid, stride=self.stride, sides=self.sides, device=theirs.device)
        mask = imitation_mask(boxes, anchors, psi=self.psi)
        return self.loss(ours, theirs, mask)


def _register(name: str, loss: Callable[..., Tensor], kind: type[_Loss]) -> None:
    def build(**options: Any) -> nn.Module:
        return kind(name, loss, **options)

    build.__doc__ = loss.__doc__
    register_mid_level_loss(build, key=f"kd.{name}")


for _name, _loss in LOSSES.items():
    _register(_name, _loss, _Loss)
_register("imitation", imitation, _Imitation)
