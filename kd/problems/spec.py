"""Description of a problem without torch: its data section, its tasks, where its code lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kd.config.datasets import DatasetSection
from kd.registry import Entry, is_foreign, load_target, look_up


@dataclass(frozen=True)
class ProblemSpec:
    """A kind of problem, described without importing torch.

    Attributes:
        name: Key of `PROBLEMS`.
        help: Its data, for messages: "label maps".
        data: Schema of the recipes' `data`.
        tasks: Tasks by name, for the recipes' `task.name`.
        implementation: "package.module:attribute" of its `Problem`.
        example: A dataset of configs/data, for messages.
        abilities: Optional features: "folds" (out-of-fold teachers), "transfer" (trunks for
            `kd.transfer`), "context" (queries about hidden objects), "results_files" (of other
            models, in COCO's format).
    """

    name: str
    help: str
    data: type[DatasetSection]
    tasks: Mapping[str, Entry]
    implementation: str
    example: str = ""
    abilities: frozenset[str] = frozenset()

    def task(self, name: str) -> Entry:
        """A task by its name; the first one for a name such as `package.module:SPEC`."""
        if is_foreign(name):
            return next(iter(self.tasks.values()))
        return look_up(self.tasks, name, what="task")

    def load(self) -> Any:
        """Import the implementation."""
        return load_target(self.implementation)
