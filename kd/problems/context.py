"""Datasets and teachers of hidden objects, for code outside of the problem."""

from __future__ import annotations

from typing import TypeAlias, cast

from kd.errors import UserError
from kd.problems.base import Dataset, Teacher
from kd.problems.objects.data import ObjectsDataset
from kd.problems.objects.schema import ObjectsSection
from kd.problems.objects.task import ContextTask

ObjectScenes: TypeAlias = ObjectsDataset


def object_scenes(data: Dataset) -> ObjectScenes:
    """Refuse datasets of problems that hide no objects."""
    if not data.problem.hides_objects:
        raise UserError(
            f"{data.section.name}: data of {data.problem.spec.name}; objects with boxes are needed "
            "here"
        )
    return cast("ObjectScenes", data)


def hidden_objects(teacher: Teacher) -> ObjectsSection:
    """The data section that a context teacher was trained with; refuse other teachers."""
    if not teacher.problem.hides_objects:
        raise UserError(
            f"{teacher.folder}: trained for {teacher.problem.spec.name}; a teacher of the context "
            "of objects is needed here"
        )
    return cast("ObjectsSection", teacher.section)


def context_task(teacher: Teacher) -> ContextTask:
    """The task of a context teacher; errors as of `hidden_objects`."""
    hidden_objects(teacher)
    return cast("ContextTask", teacher.task)
