"""Students built on the trunk of a context teacher.

In a recipe, `student: {name: transferred, options: {weights: RUN}}` builds and loads the trunk of
RUN's teacher. With the option `like: RUN`, only the architecture is taken from RUN.
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
# Values that replace a teacher's options that concern its training, not the shape of its trunk.
_OF_TRAINING = {"weights": None, "frozen": None, "batch_norm_frozen": False, "remember": False}


def resolved(student: Model) -> Model:
    """Replace the run in option `like` (default: `weights`) by its teacher's name and options."""
    if student.name != TRANSFERRED:
        return student
    like = student.options.get("like", student.options.get("weights"))
    if isinstance(like, Mapping):
        return student
    if not isinstance(like, str):
        raise UserError(
            "student transferred: whose trunk? Name a teacher's run: student.options.weights=RUN, "
            "or student.options.like=RUN for the same trunk with other weights"
        )
    if not Path(like).exists():
        raise UserError(f"student transferred: {like}: no such run folder")
    folder = Path(like) if Path(like).is_dir() else Path(like).parent
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"student transferred: {like}: not a teacher's run, it has no config.yaml")
    teacher = teacher_recipe(read_yaml(config), config).teacher
    described = {"name": teacher.name, "options": {**teacher.options}}
    return student.model_copy(update={"options": {**student.options, "like": described}})


def take_trunk(student: Model) -> tuple[Trunk, dict[str, Any]]:
    """Build a transferred student's trunk; return it with the options of the student's heads.

    The option `weights` is None (random weights), a teacher's run folder or model.safetensors, or,
    if the teacher accepts them, "imagenet" or a file of torchvision weights. Raises a UserError if
    the weights are missing or do not fit.
    """
    heads = dict(resolved(student).options)
    if heads.pop("stride", None) is not None:
        raise UserError(
            "student transferred: the trunk has the stride of its teacher; set "
            "student.options.stride=null"
        )
    like, weights = Model(**heads.pop("like")), heads.pop("weights", None)
    builder = resolve(TEACHERS, like.name, what="teacher")
    options = {name: _OF_TRAINING.get(name, value) for name, value in like.options.items()}
    run = weights not in (None, "imagenet") and _is_run(Path(weights))
    if weights is not None and not run:
        if "weights" not in inspect.signature(builder).parameters:
            raise UserError(
                f"student transferred: {weights}: teacher {like.name!r} does not accept "
                "torchvision's weights; set weights to null for random ones or to a teacher's run"
            )
        options["weights"] = weights
    teacher: nn.Module = build(TEACHERS, like.name, options, what="teacher", num_classes=2)
    scene_trunk: Any = getattr(teacher, "scene_trunk", None)
    if scene_trunk is None:
        raise UserError(f"student transferred: teacher {like.name!r} has no trunk")
    trunk: Trunk = scene_trunk()
    if run:
        _load_part(teacher, trunk, Path(weights))
    return trunk, heads


def _load_part(teacher: nn.Module, trunk: nn.Module, weights: Path) -> None:
    """Load only the trunk's tensors from a teacher's run; its heads may have other classes."""
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
            + "; the student has the trunk of the run student.options.like, or if that is not set, "
            "of the run student.options.weights"
        )
    teacher.load_state_dict({name: state[name] for name in own}, strict=False)


def _is_run(path: Path) -> bool:
    """Return True if the path is a run folder or a file in one."""
    if not path.exists():
        raise UserError(f"student transferred: {path}: no such run folder or file of weights")
    return path.is_dir() or (path.parent / "config.yaml").is_file()
