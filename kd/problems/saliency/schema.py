"""Saliency: data section and task, without importing torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kd.config.datasets import AnySplit, Count, Positive, Whole
from kd.problems.spec import LayoutSection, ProblemSpec
from kd.registry import Entry


class SaliencySection(LayoutSection):
    """Images with people's fixations, in the published layout."""

    layouts_of = "saliency"
    annotated = "synthetic"

    layout: str = Field(
        description="osie, salicon, mit1003, cat2000 or package.module:attribute; synthetic: a "
        "gaze model looks at the objects of COCO-format data",
        examples=["osie", "salicon", "mit1003", "cat2000", "synthetic"],
    )
    train: AnySplit = Field(
        "train", description="name of the split; for synthetic: annotations and images"
    )
    val: AnySplit = "val"
    size: tuple[Count, Count] = Field(
        description="height and width that images are scaled to fit, keeping their aspect ratio; "
        "training images are padded to it"
    )
    degree: Positive = Field(
        description="pixels of the files per degree of visual angle: the standard deviation of the "
        "Gaussian at each fixation"
    )
    maps: Literal["fixations", "published"] = Field(
        "fixations", description="densities: computed from the fixations, or the published maps"
    )
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="fraction of the images, chosen by name if a layout has no val split"
    )
    split_seed: Whole = Field(0, description="seed of that choice")
    augment: dict[str, Any] | None = Field(
        default_factory=dict, description="options of kd.transforms.crops.Flips; null = none"
    )

    @model_validator(mode="after")
    def _maps_fit_layout(self) -> SaliencySection:
        if self.layout == "synthetic" and self.maps == "published":
            raise ValueError("maps: layout synthetic has no published maps")
        return self


SPEC = ProblemSpec(
    name="saliency",
    help="fixations of people",
    data=SaliencySection,
    tasks={"saliency": Entry("kd.problems.saliency.task:Saliency", "map where people look")},
    implementation="kd.problems.saliency.problem:PROBLEM",
    example="scenes_gaze",
)
