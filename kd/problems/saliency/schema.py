"""Spec of the saliency problem: its data section and task; does not import torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kd.config.datasets import AnySplit, Count, Positive, Whole
from kd.problems.spec import LayoutSection, ProblemSpec
from kd.registry import Entry


class SaliencySection(LayoutSection):
    """Images with people's fixations, in a published layout or simulated."""

    layouts_of = "saliency"
    annotated = "synthetic"

    layout: str = Field(
        description="osie, salicon, mit1003, cat2000 or package.module:attribute; synthetic: "
        "fixations that a gaze model simulates on COCO-format data",
        examples=["osie", "salicon", "mit1003", "cat2000", "synthetic"],
    )
    train: AnySplit = Field(
        "train", description="name of the split; for synthetic: paths of annotations and images"
    )
    val: AnySplit = "val"
    size: tuple[Count, Count] = Field(
        description="height and width that images are scaled to fit, keeping their aspect ratio; "
        "training images are padded to it"
    )
    degree: Positive = Field(
        description="pixels of the files per degree of visual angle; also the standard deviation "
        "of the Gaussian at each fixation"
    )
    maps: Literal["fixations", "published"] = Field(
        "fixations",
        description="densities: computed from the fixations, or read from the published maps",
    )
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2,
        description="fraction of the images, chosen by file name, that are used as val split if "
        "the layout has none",
    )
    split_seed: Whole = Field(0, description="seed that selects these val images")
    augment: dict[str, Any] | None = Field(
        default_factory=dict, description="options of kd.transforms.crops.Flips; null: no flips"
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
    tasks={"saliency": Entry("kd.problems.saliency.task:Saliency", "predict where people look")},
    implementation="kd.problems.saliency.problem:PROBLEM",
    example="scenes_gaze",
)
