"""Base class of data sections, and the types that sections are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Scale = Annotated[float, Field(gt=0, le=10)]


class Section(BaseModel):
    """A part of a recipe: immutable, strictly typed, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Split(Section):
    """One split of a dataset, as paths below the dataset's root."""

    annotations: str = Field(description="COCO instances JSON")
    images: str = Field(description="folder of its images")


# Tags of alternatives in pydantic's error locations; no file has such keys.
NAME, PATHS = "<name>", "<paths>"


def _kind_of_split(value: Any) -> str:
    return PATHS if isinstance(value, Mapping | Split) else NAME


AnySplit = Annotated[
    Annotated[str, Tag(NAME)] | Annotated[Split, Tag(PATHS)], Discriminator(_kind_of_split)
]


class Generate(Section):
    """Settings of the synthetic scenes; they are written if the folder is missing."""

    train: Count = 4000
    val: Count = 1000
    size: Annotated[int, Field(ge=32)] = 64
    seed: Whole = 0


class DatasetSection(Section):
    """Keys that every dataset has; each problem adds its own."""

    name: str = Field("unnamed", description="part of run folders")
    root: str | None = Field(None, description="folder of the splits' paths")
    workers: Whole = Field(1, description="loader processes; 0 = none")
