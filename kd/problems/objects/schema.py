"""Objects in scenes: the data section and the tasks. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kd.config.datasets import (
    AnySplit,
    Count,
    DatasetSection,
    Fraction,
    Generate,
    Scale,
    Section,
    check_splits,
)
from kd.formats import check_layout
from kd.problems.spec import ProblemSpec
from kd.registry import Entry


class Partial(Section):
    """Partial masking: hide a share of the object first, all of it later."""

    start: Fraction = Field(0.3, description="share of the region hidden at the first step")
    until: Fraction = Field(0.5, description="share of training after which all of it is hidden")


class Withhold(Section):
    """Hide several objects of a scene at once, for teachers that read scenes as tokens."""

    start: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the objects withheld from the others' answers in the first epoch"
    )
    end: Annotated[float, Field(ge=0, lt=1)] = Field(0.5, description="the same in the last epoch")


class ObjectsSection(DatasetSection):
    """Annotated objects: where they lie, and how they are hidden or, for detectors, shown."""

    layout: str = Field(
        "coco",
        description="coco, or a layout from which COCO JSONs are written once: voc, kitti or "
        "package.module:attribute",
        examples=["coco", "voc", "kitti"],
    )
    classes: tuple[str, ...] | None = Field(
        None,
        description="with layout voc: names of one's own classes, in order; null: VOC's 20",
    )
    train: AnySplit = Field(
        description="of coco its two paths; of other layouts a name: VOC2007/trainval of voc, "
        "with + between several; train of kitti"
    )
    val: AnySplit
    generate: Generate | None = Field(None, description="only for the embedded scenes")
    size: Annotated[int, Field(ge=16)] = Field(384, description="pixels of the long side")
    min_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0015,
        description="smallest box, as a share of the picture, that is hidden and scored; detectors "
        "take all",
    )
    max_share: Fraction = Field(0.30, description="largest such box")
    shape: Literal["box", "square", "ellipse", "segment"] = "box"
    partial: Partial | None = None
    withhold: Withhold | None = None
    images: bool = Field(
        True, description="false: images are not read, for teachers on annotations alone"
    )
    augment: dict[str, Any] | None = Field(
        default_factory=dict, description="options of kd.transforms.augment.Augment; null = none"
    )
    scales: tuple[Scale, Scale] = Field(
        (1.0, 1.0),
        description="detectors only: smallest and largest long side of train pictures, as factors "
        "on size; what is larger than size is cut anywhere, what is smaller padded",
    )
    labelled: Fraction = Field(1.0, description="share of train images whose labels a student sees")
    repeat_labelled: Count = Field(
        1, description="times that a labelled image comes in a student's epoch; unlabelled: once"
    )
    prepared: str | None = Field(
        None, description="folder with train/ and val/, each made by kd.data.prepare"
    )

    @field_validator("layout")
    @classmethod
    def _layout_is_known(cls, name: str) -> str:
        return check_layout(name, "objects", annotated="coco")

    @model_validator(mode="after")
    def _limits_in_order(self) -> ObjectsSection:
        if self.min_share >= self.max_share:
            raise ValueError(f"min_share {self.min_share} is not below max_share {self.max_share}")
        if self.scales[0] > self.scales[1]:
            raise ValueError(f"scales {list(self.scales)} are not in order, the smaller one first")
        return self

    @model_validator(mode="after")
    def _splits_fit_layout(self) -> ObjectsSection:
        check_splits(self, self.layout, drawn="coco")
        if self.classes is not None and (self.layout != "voc" or not self.classes):
            raise ValueError("classes: names, one or more, for layout voc; others bring theirs")
        if self.layout != "coco" and self.generate is not None:
            raise ValueError(f"generate: is for the embedded scenes, not for layout {self.layout}")
        return self


def _task(target: str, text: str) -> Entry:
    return Entry(f"kd.problems.objects.{target}", text)


SPEC = ProblemSpec(
    name="objects",
    help="objects with boxes",
    data=ObjectsSection,
    tasks={
        "context": _task("context:Context", "name a hidden object from the image around it"),
        "context_pixels": _task("context:ContextPixels", "score every class at every pixel"),
        "context_map": _task("context:ContextMap", "name the class that covers each pixel"),
        "context_scene": _task("context:ContextScene", "name the classes of a scene"),
        "scene_tokens": _task("context_tokens:SceneTokens", "name objects from others as tokens"),
        "classification": _task("classification:Classification", "classify objects in scenes"),
        "scene_labels": _task("scene_labels:SceneLabels", "name the classes that an image holds"),
    },
    implementation="kd.problems.objects.problem:PROBLEM",
    example="scenes",
    abilities=frozenset({"context", "folds", "transfer"}),
)
