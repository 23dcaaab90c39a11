"""Our losses in torchdistill: name this module in a config's `dependencies` and use `kd.pair_wise`.

Importing it registers `kd.<loss>` for each loss that compares one tensor of the student with one of
the teacher, as torchdistill's own extensions do; `docs/examples/torchdistill.yaml` is a config that
does. Their keyword arguments are the paths, as torchdistill's losses take them, and our options.
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

LENT: dict[str, Callable[..., Tensor]] = {
    "kl_logits": kl_logits,
    "pixel_wise": pixel_wise,
    "pair_wise": pair_wise,
    "channel_wise": channel_wise,
    "hint": hint,
}
Kept = Mapping[str, Mapping[str, Tensor]]


class _Lent(nn.Module):
    """A loss of ours between what torchdistill kept of two modules."""

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

    def forward(self, student: Kept, teacher: Kept, targets: object = None, *_: Any) -> Tensor:
        """What the modules gave, by path and "input" or "output", to a scalar."""
        return self.loss(*self._sides(student, teacher), **self.options)

    def _sides(self, student: Kept, teacher: Kept) -> tuple[Tensor, Tensor]:
        ours, theirs = student[self.student[0]], teacher[self.teacher[0]]
        return ours[self.student[1]], theirs[self.teacher[1]]


class _LentImitation(_Lent):
    """Imitation on the places whose anchors fit an object; targets are lists of `{"boxes": ...}`.

    Args:
        stride: Pixels between anchors.
        scales: Sides of the anchors, in strides.
        ratios: Heights over widths.
        psi: See `imitation_mask`.
        places: Where the features are.
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

    def forward(self, student: Kept, teacher: Kept, targets: object = None, *_: Any) -> Tensor:
        """As `_Lent`, with the boxes that say where."""
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


def _lend(name: str, loss: Callable[..., Tensor], kind: type[_Lent]) -> None:
    def build(**options: Any) -> nn.Module:
        return kind(name, loss, **options)

    build.__doc__ = loss.__doc__
    register_mid_level_loss(build, key=f"kd.{name}")


for _name, _loss in LENT.items():
    _lend(_name, _loss, _Lent)
_lend("imitation", imitation, _LentImitation)
