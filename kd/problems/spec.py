"""Description of a problem without torch: its data section, its tasks, its implementation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from kd.config.datasets import AnySplit, DatasetSection, Generate, Split
from kd.formats import check_layout
from kd.registry import Entry, is_foreign, load_target, look_up


class LayoutSection(DatasetSection):
    """Keys of datasets with splits: in a published layout, or as COCO-format annotations.

    Attributes:
        layouts_of: Problem whose layouts `kd.formats.LAYOUTS` lists.
        annotated: The layout whose splits are paths of COCO-format annotations and images.
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
                wanted = "its annotations and images" if by_path else "a split's name"
                raise ValueError(f"{name}: layout {self.layout} takes {wanted}")
        return self


@dataclass(frozen=True)
class ProblemSpec:
    """A kind of problem, described without importing torch.

    Attributes:
        name: Key of `PROBLEMS`.
        help: What its datasets hold, for messages: "label maps".
        data: Schema of a recipe's `data` section.
        tasks: Tasks by name, for a recipe's `task.name`.
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
        """A task by name; a custom problem's name, `package.module:SPEC`, is its first task."""
        if is_foreign(name):
            return next(iter(self.tasks.values()))
        return look_up(self.tasks, name, what="task")

    def load(self) -> Any:
        """Import the implementation."""
        return load_target(self.implementation)
