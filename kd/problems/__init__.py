"""The registry of problems, importable without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kd.errors import UserError
from kd.problems.spec import ProblemSpec
from kd.registry import Entry, all_names, is_foreign, resolve

if TYPE_CHECKING:
    from kd.problems.base import Problem

PROBLEMS = {
    "objects": Entry("kd.problems.objects.schema:SPEC", "objects in scenes, hidden or visible"),
    "segmentation": Entry("kd.problems.segmentation.schema:SPEC", "the class of each pixel"),
    "detection": Entry("kd.problems.detection.schema:SPEC", "objects to detect with boxes"),
    "saliency": Entry("kd.problems.saliency.schema:SPEC", "where people look"),
}


def specs() -> list[ProblemSpec]:
    """Return all registered problems in the order of `PROBLEMS`."""
    return [entry.load() for entry in PROBLEMS.values()]


def tasks() -> dict[str, Entry]:
    """Return the tasks of all problems by name."""
    return {name: task for spec in specs() for name, task in spec.tasks.items()}


def spec_of_task(name: str) -> ProblemSpec:
    """Return the spec of the problem that a task belongs to.

    Args:
        name: A registered task, or a custom problem as `package.module:SPEC`.

    Raises:
        UserError: The task is unknown; the message lists the registered ones.
    """
    for spec in specs():
        if name in spec.tasks:
            return spec
    if not is_foreign(name):
        raise UserError(f"unknown task {name!r}{all_names(name, tasks())}")
    found = resolve({}, name, what="task")
    if not isinstance(found, ProblemSpec):
        raise UserError(f"task {name!r}: expected a ProblemSpec, got {found!r:.60}")
    return found


def problem(name: str) -> Problem[Any]:
    """Import a registered problem by name."""
    found: Problem[Any] = PROBLEMS[name].load().load()
    return found


def problem_of_task(name: str) -> Problem[Any]:
    """Import the problem that a task belongs to. Same argument and errors as `spec_of_task`."""
    found: Problem[Any] = spec_of_task(name).load()
    return found


def problem_of_data(section: object) -> Problem[Any]:
    """Import the first problem whose data section has the type of `section`."""
    found: Problem[Any] = next(spec for spec in specs() if spec.data is type(section)).load()
    return found


def problem_with(ability: str, spec: ProblemSpec, *, where: str) -> ProblemSpec:
    """Return `spec` if it supports `ability`, one of `ProblemSpec.abilities`.

    Otherwise raise a UserError that names problems that do. `where` is the prefix of its message.
    """
    if ability in spec.abilities:
        return spec
    able = [one for one in specs() if ability in one.abilities]
    named = " or ".join(f"{one.name}, such as --data {one.example}" for one in able)
    raise UserError(f"{where}: this is data of {spec.name}; expected data of {named}")
