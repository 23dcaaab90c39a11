"""Students on a context teacher's trunk.

`student: {name: transferred, options: {weights: RUN}}`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
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
# A teacher's options that belong to its training rather than its trunk.
_OF_TRAINING = {"weights": None, "frozen": None, "batch_norm_frozen": False, "remember": False}


def resolved(student: Model) -> Model:
    """Replace a run in the option `like`, by default that of `weights`, by its teacher's section.

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
    """Build a transferred student's trunk; return it and the options of the heads.

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
    """Build a teacher's trunk; errors as of `take_trunk`.

    Args:
        like: The teacher; options of its training are ignored.
        weights: None for random ones; a teacher's run or its model.safetensors; "imagenet" or a
            file of torchvision weights, for teachers that take them.
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
    """Load the trunk's tensors of a teacher's run; its heads may have other classes."""
    state = read_weights(weights)
    parts = {id(tensor) for tensor in trunk.state_dict(keep_vars=True).values()}
    tensors = teacher.state_dict(keep_vars=True).items()
    own = {name: tensor for name, tensor in tensors if id(tensor) in parts}
    odd = [name for name in own if name not in state]
    odd += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if odd:
        raise UserError(
            f"{weights}: has another trunk than the student: {'; '.join(odd[:3])}"
            + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
            + "; the student's is that of student.options.like, by default of the run that its "
            "weights are from"
        )
    teacher.load_state_dict({name: state[name] for name in own}, strict=False)


def _is_run(path: Path) -> bool:
    """Whether a path is a run folder or a file beside its config."""
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
