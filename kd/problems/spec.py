"""Describe a kind of problem without torch: its data section, its tasks, where its code lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kd.config.datasets import DatasetSection
from kd.registry import Entry, is_foreign, load_target, look_up


@dataclass(frozen=True)
class ProblemSpec:
    """What can be said of a kind of problem before torch is imported.

    Attributes:
        name: As in `PROBLEMS`.
        help: What its data are, for messages: "label maps".
        data: The schema of the recipes' `data`.
        tasks: Name to where the task lies; a recipe's `task.name` is one of these names.
        implementation: "package.module:attribute" of its `Problem`.
        example: A dataset of configs/data, for messages.
        abilities: What not every problem can do: "folds" (out-of-fold teachers), "transfer" (trunks
            for `kd.transfer`), "context" (questions about hidden objects).
    """

    name: str
    help: str
    data: type[DatasetSection]
    tasks: Mapping[str, Entry]
    implementation: str
    example: str = ""
    abilities: frozenset[str] = frozenset()

    def task(self, name: str) -> Entry:
        """A task by its name; the first where the name is the problem's own `package.module:SPEC`.

        Raises:
            UserError: No such task.
        """
        if is_foreign(name):
            return next(iter(self.tasks.values()))
        return look_up(self.tasks, name, what="task")

    def load(self) -> Any:
        """Import the implementation."""
        return load_target(self.implementation)
