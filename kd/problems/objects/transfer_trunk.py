"""A context teacher's trunk as a student's.

`student: {name: transferred, options: {weights: RUN}}` is all that it takes. Only here do teachers
and students meet in one model: the teacher's trunk, whatever it is, under heads of the student's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kd.config.reader import read_yaml
from kd.config.recipes import Model
from kd.errors import UserError
from kd.nn.trunk_base import Trunk
from kd.nn.weights import read_weights
from kd.problems.recipes import teacher_recipe
from kd.registry import build, resolve
from teachers import TEACHERS

TRANSFERRED = "transferred"
# A teacher's options that say how it was trained rather than what its trunk is.
_OF_TRAINING = {"weights": None, "frozen": None, "batch_norm_frozen": False, "remember": False}


def resolved(student: Model) -> Model:
    """The same student, the run that it is like read: its own run needs that one no more.

    Raises:
        UserError: No run is named, or it is not a teacher's.
    """
    if student.name != TRANSFERRED:
        return student
    like = student.options.get("like", student.options.get("weights"))
    if isinstance(like, Mapping):
        return student
    if not isinstance(like, str):
        raise UserError(
            "student transferred: whose trunk? Name a teacher's run: student.options.weights=RUN, "
            "or student.options.like=RUN for its trunk at other weights"
        )
    run = _folder_of(Path(like))
    teacher = teacher_recipe(read_yaml(run / "config.yaml"), run / "config.yaml").teacher
    described = {"name": teacher.name, "options": {**teacher.options}}
    return student.model_copy(update={"options": {**student.options, "like": described}})


def take_trunk(student: Model) -> tuple[Trunk, dict[str, Any]]:
    """The trunk of a transferred student, and the options that are left for its heads.

    Raises:
        UserError: Weights that are missing or of another trunk, or a teacher without a trunk.
    """
    options = dict(resolved(student).options)
    if options.pop("stride", None) is not None:
        raise UserError(
            "student transferred: the stride is that of its teacher; student.options.stride=null"
        )
    like, weights = Model(**options.pop("like")), options.pop("weights", None)
    return teachers_trunk(like, weights), options


def teachers_trunk(like: Model, weights: str | None) -> Trunk:
    """The trunk of a teacher of the catalogue.

    Args:
        like: The teacher; how it was trained is left aside.
        weights: None for random ones; a teacher's run or the model.safetensors in one; "imagenet"
            or a file of torchvision weights, where the teacher starts from such.

    Raises:
        UserError: As `take_trunk`.
    """
    builder = resolve(TEACHERS, like.name, what="teacher")
    options = {name: _OF_TRAINING.get(name, value) for name, value in like.options.items()}
    run = weights is not None and weights != "imagenet" and _is_run(Path(weights))
    if weights is not None and not run:
        if "weights" not in inspect.signature(builder).parameters:
            raise UserError(
                f"student transferred: {weights}: teacher {like.name!r} has no trunk of "
                "torchvision's; it starts at random weights (null) or from a teacher's run"
            )
        options["weights"] = weights
    teacher: nn.Module = build(TEACHERS, like.name, options, what="teacher", num_classes=2)
    scene_trunk: Any = getattr(teacher, "scene_trunk", None)
    if scene_trunk is None:
        raise UserError(f"student transferred: teacher {like.name!r} has no trunk to begin with")
    trunk: Trunk = scene_trunk()
    if run:
        _load_part(teacher, trunk, Path(str(weights)))
    return trunk


def _load_part(teacher: nn.Module, trunk: nn.Module, weights: Path) -> None:
    """Load the trunk's tensors of a teacher's run; its heads may be of other classes."""
    state = read_weights(weights)
    parts = {id(tensor) for tensor in trunk.state_dict(keep_vars=True).values()}
    own = {
        name: tensor
        for name, tensor in teacher.state_dict(keep_vars=True).items()
        if id(tensor) in parts
    }
    odd = [name for name in own if name not in state]
    odd += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if odd:
        raise UserError(
            f"{weights}: has another trunk than the student: {_few(odd)}; the student's is that of "
            "student.options.like, by default of the run that its weights are from"
        )
    teacher.load_state_dict({name: state[name] for name in own}, strict=False)


def _few(lines: Iterable[str]) -> str:
    listed = list(lines)
    return "; ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _is_run(path: Path) -> bool:
    """Whether a path is of a run: a folder, or a file beside its config.

    Raises:
        UserError: There is nothing.
    """
    if not path.exists():
        raise UserError(f"student transferred: {path}: no such run folder or file of weights")
    return path.is_dir() or (path.parent / "config.yaml").is_file()


def _folder_of(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"student transferred: {path}: no such run folder")
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.yaml").is_file():
        raise UserError(f"student transferred: {path}: not a teacher's run, it has no config.yaml")
    return folder
