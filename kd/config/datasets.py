"""The part of a recipe that says where a data set lies and how it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Scale = Annotated[float, Field(gt=0, le=10)]


class Section(BaseModel):
    """A part of a recipe: frozen, strict, closed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Split(Section):
    """One split of a data set, as paths below the data set's root."""

    annotations: str = Field(description="COCO instances JSON")
    images: str = Field(description="folder of its images")


def _kind_of_split(value: Any) -> str:
    return PATHS if isinstance(value, Mapping | Split) else NAME


# Alternatives as the schema's places name them; no file has such keys.
OBJECTS, LABEL_MAPS, GAZE = "<objects>", "<label maps>", "<gaze>"
NAME, PATHS = "<name>", "<paths>"
AnySplit = Annotated[
    Annotated[str, Tag(NAME)] | Annotated[Split, Tag(PATHS)], Discriminator(_kind_of_split)
]


class Partial(Section):
    """Partial masking: hide a share of the object first, all of it later."""

    start: Share = Field(0.3, description="share of the region hidden at the first step")
    until: Share = Field(0.5, description="share of training after which all of it is hidden")


class Withhold(Section):
    """Hide several objects of a scene at once, for teachers that read scenes as tokens."""

    start: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the objects withheld from the others' answers in the first epoch"
    )
    end: Annotated[float, Field(ge=0, lt=1)] = Field(0.5, description="the same in the last epoch")


class Generate(Section):
    """Settings of the embedded scenes; the folder is made when it is not there."""

    train: Count = 4000
    val: Count = 1000
    size: Annotated[int, Field(ge=32)] = 64
    seed: Whole = 0


class DataSet(Section):
    """What every data set has."""

    name: str = Field("unnamed", description="used in run folders")
    root: str | None = Field(None, description="folder that the splits' paths start from")
    workers: Whole = Field(1, description="processes that load samples; 0 = this one")


class Data(DataSet):
    """Annotated objects: where they lie, and how they are hidden or, for detectors, shown."""

    made_from: Literal["voc", "kitti"] | None = Field(
        None, description="layout of boxes that COCO JSONs are made from once; null: they are there"
    )
    classes: tuple[str, ...] | None = Field(
        None,
        description="with made_from voc: names of one's own classes, in order; null: VOC's 20",
    )
    train: AnySplit = Field(
        description="its two paths; with made_from a name: VOC2007/trainval of voc, "
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
    max_share: Share = Field(0.30, description="largest such box")
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
    labelled: Share = Field(1.0, description="share of train images whose labels a student sees")
    repeat_labelled: Count = Field(
        1, description="times that a labelled image comes in a student's epoch; unlabelled: once"
    )
    prepared: str | None = Field(
        None, description="folder with train/ and val/, each made by kd.data.prepare"
    )

    @model_validator(mode="after")
    def _limits_in_order(self) -> Data:
        if self.min_share >= self.max_share:
            raise ValueError(f"min_share {self.min_share} is not below max_share {self.max_share}")
        if self.scales[0] > self.scales[1]:
            raise ValueError(f"scales {list(self.scales)} are not in order, the smaller one first")
        return self

    @model_validator(mode="after")
    def _splits_fit_their_source(self) -> Data:
        for name in ("train", "val"):
            named = isinstance(getattr(self, name), str)
            if named and self.made_from is None:
                raise ValueError(
                    f"{name}: expected a mapping with annotations, images; a name goes with "
                    "made_from, a layout that is no COCO JSON"
                )
            if not named and self.made_from is not None:
                raise ValueError(f"{name}: made_from {self.made_from} takes a split's name")
        if self.classes is not None and (self.made_from != "voc" or not self.classes):
            raise ValueError("classes: names, one or more, for made_from voc; others bring theirs")
        if self.made_from is not None and self.generate is not None:
            raise ValueError("generate: is for the embedded scenes; made_from is not")
        return self


class LabelMaps(DataSet):
    """Pictures with the class of each pixel, in the layout that they are published in."""

    layout: Literal["camvid", "cityscapes", "ade20k", "voc2012", "coco"] = Field(
        description="coco: maps are drawn from the annotations, smaller objects on top"
    )
    train: AnySplit = Field("train", description="name of the split; of coco: its two paths")
    val: AnySplit = "val"
    generate: Generate | None = Field(None, description="only for the embedded scenes")
    size: Annotated[int, Field(ge=16)] | None = Field(
        None, description="pixels of the long side that models see; null: as the files are"
    )
    crop: tuple[Count, Count] = Field(description="height and width of what is trained on, pixels")
    augment: dict[str, Any] | None = Field(
        default_factory=dict, description="options of kd.transforms.crops.Crops; null = crops alone"
    )

    @model_validator(mode="after")
    def _splits_fit_layout(self) -> LabelMaps:
        _check_splits(self, drawn="coco")
        return self


GazeLayout = Literal["osie", "salicon", "mit1003", "cat2000", "synthetic"]


class Gaze(DataSet):
    """Pictures with people's fixations, in the layout that they are published in."""

    layout: GazeLayout = Field(
        description="synthetic: a gaze model looks at the objects of COCO-format data"
    )
    train: AnySplit = Field("train", description="name of the split; of synthetic: its two paths")
    val: AnySplit = "val"
    generate: Generate | None = Field(None, description="only for the embedded scenes")
    size: tuple[Count, Count] = Field(
        description="height and width that pictures are scaled into, their aspect kept; training "
        "pictures are padded to it"
    )
    degree: Positive = Field(
        description="pixels of the files that a degree of visual angle has: the standard deviation "
        "of the Gaussian around each fixation"
    )
    maps: Literal["fixations", "published"] = Field(
        "fixations", description="densities: drawn around the fixations, or the published maps"
    )
    val_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="of the pictures, drawn by name where a layout has no val split"
    )
    split_seed: Whole = Field(0, description="of that draw")
    augment: dict[str, Any] | None = Field(
        default_factory=dict, description="options of kd.transforms.crops.Flips; null = none"
    )

    @model_validator(mode="after")
    def _splits_fit_layout(self) -> Gaze:
        _check_splits(self, drawn="synthetic")
        if self.layout == "synthetic" and self.maps == "published":
            raise ValueError("maps: layout synthetic has none that are published")
        return self


def _check_splits(section: LabelMaps | Gaze, *, drawn: str) -> None:
    """Splits of a published layout are names; of a COCO-format data set they are paths."""
    for name in ("train", "val"):
        paths = isinstance(getattr(section, name), Split)
        if paths is not (section.layout == drawn):
            wanted = "its annotations and images" if section.layout == drawn else "a split's name"
            raise ValueError(f"{name}: layout {section.layout} takes {wanted}")


def kind_of_data(values: Any) -> str:
    """Which of the sections values are for: a layout is one of fixations, or of label maps."""
    known = vars(values) if isinstance(values, BaseModel) else values
    if not isinstance(known, Mapping):
        return OBJECTS
    if known.get("layout") in get_args(GazeLayout) or "degree" in known:
        return GAZE
    return LABEL_MAPS if "layout" in known else OBJECTS


AnyData = Annotated[
    Annotated[Data, Tag(OBJECTS)]
    | Annotated[LabelMaps, Tag(LABEL_MAPS)]
    | Annotated[Gaze, Tag(GAZE)],
    Discriminator(kind_of_data),
]
