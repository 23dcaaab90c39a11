"""Checked access to datasets with hidden objects and their teachers, outside of `kd.problems`."""

from __future__ import annotations

from typing import TypeAlias, cast

from kd.errors import UserError
from kd.problems.base import Dataset, Teacher
from kd.problems.objects.data import ObjectsDataset
from kd.problems.objects.schema import ObjectsSection
from kd.problems.objects.task import ContextTask

ObjectScenes: TypeAlias = ObjectsDataset


def object_scenes(data: Dataset) -> ObjectScenes:
    """Return the dataset if objects can be hidden in it; otherwise raise a UserError."""
    if not data.problem.hides_objects:
        raise UserError(
            f"{data.section.name}: this is data of {data.problem.spec.name}; expected objects "
            "with boxes"
        )
    return cast("ObjectScenes", data)


def hidden_objects(teacher: Teacher) -> ObjectsSection:
    """Return the data section of a context teacher; raise a UserError for other teachers."""
    if not teacher.problem.hides_objects:
        raise UserError(
            f"{teacher.folder}: trained for {teacher.problem.spec.name}; expected a context teacher"
        )
    return cast("ObjectsSection", teacher.section)


def context_task(teacher: Teacher) -> ContextTask:
    """Return the task of a context teacher; raise a UserError for other teachers."""
    hidden_objects(teacher)
    return cast("ContextTask", teacher.task)
