"""Description of a problem: its data section, tasks and implementation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from kd.config.datasets import AnySplit, DatasetSection, Generate, Split
from kd.formats import check_layout
from kd.registry import Entry, is_foreign, load_target, look_up


class LayoutSection(DatasetSection):
    """Base class of data sections with two splits, in a published layout or in COCO's format.

    Attributes:
        layouts_of: Name of the problem whose layouts in `kd.formats.LAYOUTS` are allowed.
        annotated: The layout that takes paths of COCO annotations and images instead of split
            names.
    """

    layouts_of: ClassVar[str]
    annotated: ClassVar[str] = "coco"

    layout: str
    train: AnySplit
    val: AnySplit
    generate: Generate | None = Field(None, description="only for the embedded scenes")

    @field_validator("layout")
    @classmethod
    def _layout_is_known(cls, name: str) -> str:
        return check_layout(name, cls.layouts_of, annotated=cls.annotated)

    @model_validator(mode="after")
    def _splits_fit_layout(self) -> LayoutSection:
        by_path = self.layout == self.annotated
        for name in ("train", "val"):
            if isinstance(getattr(self, name), Split) is not by_path:
                wanted = "paths of annotations and images" if by_path else "the name of a split"
                raise ValueError(f"{name}: layout {self.layout} expects {wanted}")
        return self


@dataclass(frozen=True)
class ProblemSpec:
    """A problem's data section, tasks and implementation, importable without torch.

    Attributes:
        name: Key of `kd.problems.PROBLEMS`.
        help: What its datasets contain, for messages, such as "label maps".
        data: Schema of a recipe's `data` section.
        tasks: Tasks by name, for a recipe's `task.name`.
        implementation: `package.module:attribute` of the `Problem` object.
        example: Name of a suitable dataset in configs/data, for messages.
        pipeline: Name of the task on Hugging Face's hub, for model cards; "" if it has none.
        abilities: Optional features: "folds" (out-of-fold teachers), "transfer" (trunks for
            `kd.transfer`), "context" (queries about hidden objects), "results_files" (COCO
            results).
    """

    name: str
    help: str
    data: type[DatasetSection]
    tasks: Mapping[str, Entry]
    implementation: str
    example: str = ""
    pipeline: str = ""
    abilities: frozenset[str] = frozenset()

    def task(self, name: str) -> Entry:
        """Return a task by name; for a custom `package.module:SPEC`, return the first task."""
        if is_foreign(name):
            return next(iter(self.tasks.values()))
        return look_up(self.tasks, name, what="task")

    def load(self) -> Any:
        """Import the `Problem` object."""
        return load_target(self.implementation)
