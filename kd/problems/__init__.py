"""Problems: kinds of data, each a folder with all that depends on it."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from kd.errors import UserError
from kd.registry import suggestion

if TYPE_CHECKING:
    from kd.problems.base import Problem

# Task -> the problem that it belongs to; the first task of data without one is that of their kind.
PROBLEM_OF_TASK = {
    "context": "objects",
    "context_pixels": "objects",
    "scene_tokens": "objects",
    "context_map": "objects",
    "context_scene": "objects",
    "classification": "objects",
    "scene_labels": "objects",
    "segmentation": "segmentation",
    "detection": "detection",
    "saliency": "saliency",
}
PROBLEMS = ("objects", "segmentation", "detection", "saliency")


@cache
def problem(name: str) -> Problem[Any]:
    """The problem of a folder of this package."""
    return cast("Problem[Any]", import_module(f"kd.problems.{name}.problem").PROBLEM)


def problem_of_task(task: str) -> Problem[Any]:
    """The problem that a task belongs to.

    Raises:
        UserError: There is no such task.
    """
    if task not in PROBLEM_OF_TASK:
        raise UserError(f"unknown task {task!r}{suggestion(task, PROBLEM_OF_TASK)}")
    return problem(PROBLEM_OF_TASK[task])


def problem_of_data(section: object) -> Problem[Any]:
    """The first problem with data sections of this kind."""
    return next(known for known in map(problem, PROBLEMS) if known.section_type is type(section))
