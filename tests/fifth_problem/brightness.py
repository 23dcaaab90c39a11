"""Mean brightness of an image: the schema of a problem of one's own. No torch here."""

from __future__ import annotations

from pydantic import Field

from kd.config.datasets import DatasetSection
from kd.problems.spec import ProblemSpec
from kd.registry import Entry


class BrightnessSection(DatasetSection):
    """Random images that are made in memory; the target is the mean of each."""

    images: int = Field(16, ge=2, description="of each split")
    size: int = Field(16, ge=8, description="pixels of a side")


SPEC = ProblemSpec(
    name="brightness",
    help="images with a number",
    data=BrightnessSection,
    tasks={"brightness": Entry("brightness_problem:Brightness", "the mean of an image")},
    implementation="brightness_problem:PROBLEM",
)
