"""Data section and tasks of the objects problem; does not import torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kd.config.datasets import AnySplit, Count, Fraction, Scale, Section
from kd.problems.spec import LayoutSection, ProblemSpec
from kd.registry import Entry


class Partial(Section):
    """Partial masking: early in training, only a fraction of the object's region is hidden."""

    start: Fraction = Field(0.3, description="fraction of the region hidden at the first step")
    until: Fraction = Field(0.5, description="training progress (0..1) at full hiding")


class HideSeveral(Section):
    """Hide several objects of a scene at once; only for the task scene_tokens."""

    start: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="fraction of the other objects to hide too in the first epoch"
    )
    end: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.5, description="fraction of the other objects to hide too in the last epoch"
    )


class ObjectsSection(LayoutSection):
    """Images with annotated objects, and how objects are hidden or scaled for training."""

    layouts_of = "objects"

    layout: str = Field(
        "coco",
        description="coco, or a layout to convert to COCO JSON once: voc, kitti or "
        "package.module:attribute",
        examples=["coco", "voc", "kitti"],
    )
    classes: tuple[str, ...] | None = Field(
        None, description="layout voc only: names of custom classes in order; null: VOC's 20"
    )
    train: AnySplit = Field(
        description="layout coco: annotations and images; other layouts: a split name, such as "
        "VOC2007/trainval for voc (join several with +) or train for kitti"
    )
    size: Annotated[int, Field(ge=16)] = Field(384, description="long side of the images in pixels")
    min_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0015,
        description="smallest box area to hide and score, as a fraction of the image; detectors "
        "use all boxes",
    )
    max_fraction: Fraction = Field(
        0.30, description="largest box area to hide and score, as a fraction of the image"
    )
    shape: Literal["box", "square", "ellipse", "segment"] = "box"
    partial: Partial | None = None
    hide_several: HideSeveral | None = None
    images: bool = Field(
        True, description="whether to read images; false for teachers that only use annotations"
    )
    augment: dict[str, Any] | None = Field(
        default_factory=dict,
        description="options of kd.transforms.augment.Augment; null: no augmentation",
    )
    scales: tuple[Scale, Scale] = Field(
        (1.0, 1.0),
        description="detectors only: range of random scales of training images, relative to size; "
        "larger images are cropped at random, smaller ones padded",
    )
    labelled: Fraction = Field(1.0, description="fraction of train images with labels for students")
    repeat_labelled: Count = Field(
        1, description="occurrences per epoch of each labelled image; unlabelled ones occur once"
    )
    prepared: str | None = Field(
        None, description="folder of prepared copies train/ and val/, written by kd.data.prepare"
    )

    @model_validator(mode="after")
    def _limits_in_order(self) -> ObjectsSection:
        if self.min_fraction >= self.max_fraction:
            raise ValueError(
                f"min_fraction {self.min_fraction} must be less than max_fraction "
                f"{self.max_fraction}"
            )
        if self.scales[0] > self.scales[1]:
            raise ValueError(f"scales {list(self.scales)}: put the smaller factor first")
        return self

    @model_validator(mode="after")
    def _keys_fit_layout(self) -> ObjectsSection:
        if self.classes is not None and (self.layout != "voc" or not self.classes):
            raise ValueError("classes: set one or more names, and only with layout voc")
        if self.layout != "coco" and self.generate is not None:
            raise ValueError(
                f"generate: only for the embedded scenes, not for layout {self.layout}"
            )
        return self


def _task(target: str, text: str) -> Entry:
    return Entry(f"kd.problems.objects.task:{target}", text)


SPEC = ProblemSpec(
    name="objects",
    help="objects with boxes",
    data=ObjectsSection,
    tasks={
        "context": _task("Context", "name a hidden object from the image around it"),
        "context_pixels": _task("ContextPixels", "score every class at every pixel"),
        "context_map": _task("ContextMap", "name the class that covers each pixel"),
        "context_scene": _task("ContextScene", "name all classes of a scene with a hidden object"),
        "scene_tokens": _task(
            "SceneTokens", "name a hidden object from the other objects as tokens"
        ),
        "classification": _task("Classification", "classify objects in scenes"),
        "scene_labels": _task("SceneLabels", "name the classes that are in an image"),
    },
    implementation="kd.problems.objects.problem:PROBLEM",
    pipeline="image-classification",
    example="scenes",
    abilities=frozenset({"context", "folds", "transfer"}),
)
