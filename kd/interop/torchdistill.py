"""torchdistill's mid-level losses as ours: two tensors in, a scalar out.

A loss of torchdistill's reads features by module path from the outputs of whole models. Here it is
given exactly one tensor of each side, so that it can be a term like any other:
`losses: [{name: torchdistill.DISTLoss, weight: 1.0, student: logits, teacher: logits}]`. What its
constructor wants to know of paths is filled in; the rest are the term's options.

Handled on the way: `KDLoss` and `LogitStdKDLoss` mix in the labels' loss by `alpha` (the task
brings that one), leave out the temperature's square unless they do, and divide maps by the number
of images rather than of pixels. A loss with weights of its own, which torchdistill's engine gives
to no optimiser, becomes a part of the module that is trained.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kd.errors import UserError
from kd.losses._checks import check_device, check_floating, wide_dtype
from kd.registry import look_up

PREFIX = "torchdistill."
LAYER = "layer"
# The labels' part of these is the task's; what they call `beta` weighs the rest.
SOFTENED = ("KDLoss", "LogitStdKDLoss")
LABELS = {"alpha": 0.0, "beta": 1.0}
# Two layers of each side; and pairs of tensors, which modules of torchdistill's own make.
PAIRED = ("FSPLoss", "HierarchicalContextLoss", "VIDLoss")


class Borrowed(nn.Module):
    """A loss of torchdistill's between one tensor of each side.

    Args:
        name: As in torchdistill's registry.
        module: The loss, told that its tensors are the output of `LAYER`.
        factor: On its value.
    """

    def __init__(self, name: str, module: nn.Module, factor: float) -> None:
        super().__init__()
        self.name, self.module, self.factor = name, module, factor

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Two tensors to a scalar."""
        check_floating(f"{PREFIX}{self.name}", student=student, teacher=teacher)
        check_device(f"{PREFIX}{self.name}", student=student, teacher=teacher)
        if self.name in SOFTENED and student.ndim > 2:
            student, teacher = _rows(student), _rows(teacher)
        wide = wide_dtype(student, teacher)
        kept = ({LAYER: {"output": side.to(wide)}} for side in (student, teacher))
        # Half precision would drown the small differences.
        try:
            with torch.autocast(student.device.type, enabled=False):
                value: Tensor = self.module(*kept)
        except (RuntimeError, IndexError) as error:
            raise UserError(
                f"{PREFIX}{self.name}: cannot compare student {tuple(student.shape)} with teacher "
                f"{tuple(teacher.shape)}: {str(error).splitlines()[0]}"
            ) from error
        return value * self.factor


class Borrow:
    """A mid-level loss of torchdistill's as a function `(student, teacher, *, options)`.

    Its signature lists the loss's options.

    Args:
        name: As in torchdistill's registry: "DISTLoss".

    Raises:
        UserError: An unknown name, or a loss that needs more than a tensor of each side.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._build = look_up(_registry(), name, what="torchdistill loss")
        parameters = [
            parameter
            for parameter in inspect.signature(self._build).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        self._places = _places(name, [parameter.name for parameter in parameters])
        if name in SOFTENED:
            self._places |= LABELS
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.name not in self._places]
        sides = [
            inspect.Parameter(side, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for side in ("student", "teacher")
        ]
        self.__signature__ = inspect.Signature([*sides, *own])
        self.__name__ = f"{PREFIX}{name}"

    def __call__(self, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        """The loss, for one without weights."""
        value: Tensor = self.module(**options)(student, teacher)
        return value

    def module(self, channels: int = 0, /, **options: Any) -> Borrowed:
        """The loss as a module, for one with weights; its options say how many channels it has."""
        factor = options["temperature"] ** 2 if self.name in SOFTENED else 1.0
        return Borrowed(self.name, self._build(**self._places, **options), factor)

    def has_weights(self, **options: Any) -> bool:
        """Whether something of it is to be trained, saved and resumed."""
        return bool(self.module(**options).state_dict())


def _registry() -> dict[str, Callable[..., nn.Module]]:
    """Torchdistill's mid-level losses by name; imported here, for it takes seconds."""
    importlib.import_module("torchdistill.losses.mid_level")  # fills the registry
    return dict(importlib.import_module("torchdistill.losses.registry").MIDDLE_LEVEL_LOSS_DICT)


def _places(name: str, parameters: list[str]) -> dict[str, Any]:
    """What the constructor is told about where its tensors are."""
    places: dict[str, Any] = {}
    paths = [one for one in parameters if one.endswith("_path")]
    pairs = [one for one in parameters if one.endswith("_pairs")]
    sides = sorted(one.partition("_")[0] for one in paths)
    one_each = sides == ["student", "teacher"] and not pairs
    if name in PAIRED or not (one_each or (len(pairs) == 1 and not paths)):
        needs = ", ".join(paths + pairs) or "no layer at all"
        raise UserError(
            f"losses: {PREFIX}{name}: compares more than a tensor of the student with one of the "
            f"teacher ({needs}), and so is no term"
        )
    for one in parameters:
        if one in paths:
            places[one] = LAYER
        elif one in pairs:
            side = {"path": LAYER, "io": "output"}
            places[one] = {LAYER: {"student": side, "teacher": side}}
        elif one.startswith(("student_", "teacher_")) and one.endswith("_io"):
            places[one] = "output"
    return places


def _rows(logits: Tensor) -> Tensor:
    """Every place a row: (N, C, ...) to (N * places, C)."""
    return logits.flatten(2).transpose(1, 2).flatten(0, 1)
