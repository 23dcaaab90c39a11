"""Use the mid-level losses of torchdistill as distillation terms.

In torchdistill a loss selects features by module path from the outputs of whole models. Here it
gets one tensor of the student and one of the teacher, and is a term like any other: `losses:
[{name: torchdistill.DISTLoss, weight: 1.0, student: logits, teacher: logits}]`. The module paths in
the constructor of the loss are filled in; all other arguments are options of the term.

`KDLoss` and `LogitStdKDLoss` are corrected. In torchdistill they add a supervised loss with the
weight `alpha`, which is part of the task here. Without this part they omit the factor of the
squared temperature, and they divide the loss of maps by the number of images instead of pixels. If
a loss has weights, which torchdistill's engine does not optimise, they are trained here together
with the student.
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
# Losses that include a supervised loss with the weight `alpha`; `beta` weights the distillation.
SOFTENED = ("KDLoss", "LogitStdKDLoss")
LABELS = {"alpha": 0.0, "beta": 1.0}
# Losses that need two layers of each model, or pairs of tensors from modules of torchdistill.
PAIRED = ("FSPLoss", "HierarchicalContextLoss", "VIDLoss")


class Borrowed(nn.Module):
    """A loss of torchdistill between one tensor of the student and one tensor of the teacher.

    Both tensors are passed to `module` as outputs of a layer called `LAYER`, and the result is
    multiplied by `factor`.
    """

    def __init__(self, name: str, module: nn.Module, factor: float) -> None:
        super().__init__()
        self.name, self.module, self.factor = name, module, factor

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_floating(f"{PREFIX}{self.name}", student=student, teacher=teacher)
        check_device(f"{PREFIX}{self.name}", student=student, teacher=teacher)
        if self.name in SOFTENED and student.ndim > 2:
            student, teacher = _rows(student), _rows(teacher)
        wide = wide_dtype(student, teacher)
        sides = ({LAYER: {"output": side.to(wide)}} for side in (student, teacher))
        # Without autocast, because half precision would lose small differences.
        with torch.autocast(student.device.type, enabled=False):
            value: Tensor = self.module(*sides)
        return value * self.factor


class Borrow:
    """A mid-level loss of torchdistill as a function `(student, teacher, *, options)`.

    The signature of the object lists the options of the loss, so that they can be checked.

    Raises:
        UserError: The name is unknown, or the loss needs more than one tensor of each model.
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
        value: Tensor = self.module(**options)(student, teacher)
        return value

    def module(self, channels: int = 0, /, **options: Any) -> Borrowed:
        """Build the loss as a module; `channels` is not used, since options include channels."""
        factor = options["temperature"] ** 2 if self.name in SOFTENED else 1.0
        return Borrowed(self.name, self._build(**self._places, **options), factor)

    def has_weights(self, **options: Any) -> bool:
        """Whether the loss has weights or buffers."""
        return bool(self.module(**options).state_dict())


def _registry() -> dict[str, Callable[..., nn.Module]]:
    """Return torchdistill's mid-level losses by name; imported only here, as it takes seconds."""
    importlib.import_module("torchdistill.losses.mid_level")  # fills the registry
    return dict(importlib.import_module("torchdistill.losses.registry").MIDDLE_LEVEL_LOSS_DICT)


def _places(name: str, parameters: list[str]) -> dict[str, Any]:
    """Choose the constructor arguments by which a loss of torchdistill finds its tensors."""
    places: dict[str, Any] = {}
    paths = [one for one in parameters if one.endswith("_path")]
    pairs = [one for one in parameters if one.endswith("_pairs")]
    sides = sorted(one.partition("_")[0] for one in paths)
    one_each = sides == ["student", "teacher"] and not pairs
    if name in PAIRED or not (one_each or (len(pairs) == 1 and not paths)):
        needs = ", ".join(paths + pairs) or "no layer at all"
        raise UserError(
            f"losses: {PREFIX}{name}: takes {needs}, but a term compares one tensor of the student "
            "with one of the teacher"
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
    """Reshape maps (N, C, ...) to one row per cell, (N * cells, C)."""
    return logits.flatten(2).transpose(1, 2).flatten(0, 1)
