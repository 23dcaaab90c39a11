"""Spec of the segmentation problem: its data section and task; does not import torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from kd.config.datasets import AnySplit, Count
from kd.problems.spec import LayoutSection, ProblemSpec
from kd.registry import Entry


class SegmentationSection(LayoutSection):
    """Images with label maps, in a published layout or drawn from COCO-format segments."""

    layouts_of = "segmentation"

    layout: str = Field(
        description="camvid, cityscapes, ade20k, voc2012 or package.module:attribute; coco: maps "
        "drawn from the annotations, smaller objects on top",
        examples=["camvid", "cityscapes", "ade20k", "voc2012", "coco"],
    )
    train: AnySplit = Field(
        "train", description="name of the split; for coco: paths of annotations and images"
    )
    val: AnySplit = "val"
    size: Annotated[int, Field(ge=16)] | None = Field(
        None, description="long side of the images in pixels; null: the size of each file"
    )
    crop: tuple[Count, Count] = Field(description="height and width of training crops, pixels")
    augment: dict[str, Any] | None = Field(
        default_factory=dict,
        description="options of kd.transforms.crops.Crops; null: random crops only",
    )


SPEC = ProblemSpec(
    name="segmentation",
    help="label maps",
    data=SegmentationSection,
    tasks={
        "segmentation": Entry("kd.problems.segmentation.task:Segmentation", "classify each pixel")
    },
    implementation="kd.problems.segmentation.problem:PROBLEM",
    pipeline="image-segmentation",
    example="scenes_maps",
)
