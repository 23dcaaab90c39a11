"""Type-checked access to datasets with hidden objects and to context teachers."""

from __future__ import annotations

from typing import TypeAlias, cast

from kd.errors import UserError
from kd.problems.base import Dataset, Teacher
from kd.problems.objects.data import ObjectsDataset
from kd.problems.objects.inference import scene_sample
from kd.problems.objects.schema import ObjectsSection
from kd.problems.objects.task import ContextTask

__all__ = ["ObjectScenes", "context_task", "hidden_objects", "object_scenes", "scene_sample"]

ObjectScenes: TypeAlias = ObjectsDataset


def object_scenes(data: Dataset) -> ObjectScenes:
    """Return the dataset if its objects can be hidden; otherwise raise a UserError."""
    if not data.problem.hides_objects:
        name = data.problem.spec.name
        raise UserError(f"{data.section.name}: this is data of {name}; expected data of objects")
    return cast("ObjectScenes", data)


def hidden_objects(teacher: Teacher) -> ObjectsSection:
    """Return a context teacher's data section; raise a UserError for any other teacher."""
    if not teacher.problem.hides_objects:
        name = teacher.problem.spec.name
        raise UserError(f"{teacher.folder}: this is a {name} teacher; expected a context teacher")
    return cast("ObjectsSection", teacher.section)


def context_task(teacher: Teacher) -> ContextTask:
    """Return a context teacher's task; raise a UserError for any other teacher."""
    hidden_objects(teacher)
    return cast("ContextTask", teacher.task)
