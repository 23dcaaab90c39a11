"""Where trained teachers are looked for, and what is said where there is none."""

from __future__ import annotations

import shlex
from pathlib import Path

from kd.config import TeacherReference
from kd.config_reader import known_configs
from kd.errors import UserError

RUNS = Path("runs")


def default_folder(teacher: str, data: str) -> Path:
    """Where a teacher's run goes unless told otherwise."""
    return RUNS / "teacher" / teacher / data


def find_teacher(
    reference: TeacherReference, data: str, *, further: str = "", typed: str | None = None
) -> Path:
    """The run folder or file that a recipe means; nothing of it is read.

    Args:
        reference: As the recipe has it.
        data: Name of the recipe's data set.
        further: Its name in `more_teachers`; empty for the recipe's `teacher`.
        typed: What `--data` was given, for the command that the message advises.

    Raises:
        UserError: None is named and none is where the teacher command puts them; the message says
            which command makes one.
    """
    key = f"more_teachers.{further}" if further else "teacher"
    if reference.run is not None:
        path = Path(reference.run)
        if not path.exists():
            raise UserError(f"{key}.run: {path}: no such run folder or file")
        return path
    path = default_folder(reference.name, data)
    if not (path / "model.safetensors").is_file():
        whose, flag = (f"{key}: ", f"--set {key}.run=RUN") if further else ("", "--teacher RUN")
        raise UserError(
            f"{whose}no trained teacher at {path}; make one with: python -m kd.train_teacher "
            f"--teacher {reference.name} --data {_flag(data, typed)}, or name one with {flag}"
        )
    return path


def _flag(data: str, typed: str | None) -> str:
    """What `--data` must be given for the same data set."""
    if typed is not None:
        return shlex.quote(typed)
    if data in known_configs("data"):
        return data
    return f"{shlex.quote(data)}.yaml (a file of what the recipe has under data)"
