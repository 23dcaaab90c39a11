"""Use the mid-level losses of torchdistill as distillation terms.

A term gives the loss one student tensor and one teacher tensor instead of module paths: `losses:
[{name: torchdistill.DISTLoss, weight: 1.0, student: logits, teacher: logits}]`. The constructor's
other arguments are options of the term.

`KDLoss` and `LogitStdKDLoss` are corrected: they include no supervised loss, are multiplied by the
squared temperature, and average maps over pixels instead of images. Weights of a loss are trained
together with the student, which torchdistill does not do.
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
    """A torchdistill loss between one student tensor and one teacher tensor, times `factor`.

    `module` gets both tensors as outputs of a layer named `LAYER`.
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

    Its signature lists the options of the loss. Raises a UserError if the name is unknown, or if
    the loss needs more than one tensor of each model.
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
        """Build the loss as a module; `channels` is unused, since the options include channels."""
        factor = options["temperature"] ** 2 if self.name in SOFTENED else 1.0
        return Borrowed(self.name, self._build(**self._places, **options), factor)

    def has_weights(self, **options: Any) -> bool:
        """Whether the loss has weights or buffers."""
        return bool(self.module(**options).state_dict())


def _registry() -> dict[str, Callable[..., nn.Module]]:
    """Return torchdistill's mid-level losses by name, imported only when needed (takes seconds)."""
    importlib.import_module("torchdistill.losses.mid_level")  # fills the registry
    return dict(importlib.import_module("torchdistill.losses.registry").MIDDLE_LEVEL_LOSS_DICT)


def _places(name: str, parameters: list[str]) -> dict[str, Any]:
    """Choose the constructor arguments that tell a torchdistill loss where to find its tensors."""
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
