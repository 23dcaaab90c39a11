"""Semantic segmentation: data section and task, without importing torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from kd.config.datasets import AnySplit, Count, DatasetSection, Generate, check_splits
from kd.formats import check_layout
from kd.problems.spec import ProblemSpec
from kd.registry import Entry


class SegmentationSection(DatasetSection):
    """Images with the class of each pixel, in the published layout."""

    layout: str = Field(
        description="camvid, cityscapes, ade20k, voc2012 or package.module:attribute; coco: maps "
        "drawn from the annotations, smaller objects on top",
        examples=["camvid", "cityscapes", "ade20k", "voc2012", "coco"],
    )
    train: AnySplit = Field("train", description="name of the split; for coco: its two paths")
    val: AnySplit = "val"
    generate: Generate | None = Field(None, description="only for the embedded scenes")
    size: Annotated[int, Field(ge=16)] | None = Field(
        None, description="pixels of the long side; null: as the files are"
    )
    crop: tuple[Count, Count] = Field(description="height and width of training crops, pixels")
    augment: dict[str, Any] | None = Field(
        default_factory=dict, description="options of kd.transforms.crops.Crops; null = crops alone"
    )

    @field_validator("layout")
    @classmethod
    def _layout_is_known(cls, name: str) -> str:
        return check_layout(name, "segmentation", annotated="coco")

    @model_validator(mode="after")
    def _splits_fit_layout(self) -> SegmentationSection:
        check_splits(self, self.layout, drawn="coco")
        return self


SPEC = ProblemSpec(
    name="segmentation",
    help="label maps",
    data=SegmentationSection,
    tasks={
        "segmentation": Entry("kd.problems.segmentation.task:Segmentation", "classify each pixel")
    },
    implementation="kd.problems.segmentation.problem:PROBLEM",
    example="scenes_maps",
)
