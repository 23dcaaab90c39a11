"""torchdistill's mid-level losses as ours: two tensors in, a scalar out.

A loss of torchdistill's reads features by module path from the outputs of whole models. Here it is
given exactly one tensor of each side, so that it can be a term like any other:
`losses: [{name: torchdistill.DISTLoss, weight: 1.0, student: logits, teacher: logits}]`. What its
constructor wants to know of paths is filled in; the rest are the term's options.

Handled on the way: `KDLoss` and `LogitStdKDLoss` mix in the labels' loss by `alpha` (the task
brings that one), leave out the temperature's square unless they do, and divide maps by the number
of images rather than of pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.losses import mid_level  # noqa: F401  (its import fills the registry)
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

from kd.catalog import look_up
from kd.errors import UserError
from kd.losses._checks import floating, one_device, wide_type

PREFIX = "torchdistill."
LAYER = "layer"
# The labels' part of these is the task's; what they call `beta` weighs the rest.
SOFTENED = ("KDLoss", "LogitStdKDLoss")
LABELS = {"alpha": 0.0, "beta": 1.0}
# Two layers of each side; and pairs of tensors, which modules of torchdistill's own make.
PAIRED = ("FSPLoss", "HierarchicalContextLoss", "VIDLoss")


def borrow(name: str) -> Callable[..., Tensor]:
    """A mid-level loss of torchdistill's as a function of student and teacher.

    Args:
        name: As in torchdistill's registry: "DISTLoss".

    Returns:
        A function `(student, teacher, *, options)`, whose signature lists the loss's options.

    Raises:
        UserError: An unknown name, or a loss that needs more than a tensor of each side.
    """
    known = {key: key for key in MIDDLE_LEVEL_LOSS_DICT}
    build = MIDDLE_LEVEL_LOSS_DICT[look_up(known, name, what="torchdistill loss")]
    parameters = [
        parameter
        for parameter in inspect.signature(build).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    places = _places(name, [parameter.name for parameter in parameters])
    if name in SOFTENED:
        places |= LABELS

    def loss(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        module: nn.Module = build(**places, **options)
        if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
            raise UserError(f"losses: {PREFIX}{name}: has weights of its own, which no term trains")
        if name in SOFTENED and student.ndim > 2:
            student, teacher = _rows(student), _rows(teacher)
        floating(f"{PREFIX}{name}", student=student, teacher=teacher)
        one_device(f"{PREFIX}{name}", student=student, teacher=teacher)
        wide = wide_type(student, teacher)
        kept = ({LAYER: {"output": side.to(wide)}} for side in (student, teacher))
        # Half precision would drown the small differences.
        with torch.autocast(student.device.type, enabled=False):
            value: Tensor = module(*kept)
        return value * options["temperature"] ** 2 if name in SOFTENED else value

    own = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.name not in places]
    sides = [
        inspect.Parameter(side, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for side in ("student", "teacher")
    ]
    loss.__signature__ = inspect.Signature([*sides, *own])  # type: ignore[attr-defined]
    loss.__name__ = loss.__qualname__ = f"{PREFIX}{name}"
    return loss


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
