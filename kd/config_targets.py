"""What a recipe says of teachers: which they are, and how their outputs are had and kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kd.config_data import Count, NotNegative, Positive, Probability, Section, Whole


class SoftTargets(Section):
    """Where a term's targets come from."""

    kind: Literal["stored", "live"] = Field(
        "stored", description="stored: posteriors computed once; live: the teacher in each step"
    )
    out_of_fold: bool = Field(
        True, description="posteriors of train images from folds that did not train on them"
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="of stored numbers")
    int8: bool = Field(
        False, description="compute posteriors in 8-bit integers, on a CPU: several times as fast"
    )
    top_k: Whole = Field(0, description="likeliest classes stored of posteriors; 0 = all")
    cache: str | None = Field(
        None, description="folder or URL of stored outputs; null: in the teacher's run folder"
    )
    mirrored: bool = Field(
        False, description="also store layers and logits of mirrored pictures, for flips"
    )
    moved_error: NotNegative = Field(
        0.1, description="largest relative error of stored maps that are moved with the picture"
    )
    stride: Count = Field(
        8, description="pixels a place of stored maps that crops of label-map data get"
    )
    score_stride: Count | None = Field(
        None, description="the same of score maps, which may be finer than layers; null: stride"
    )
    size: Count | None = Field(
        None,
        description="long side at which a teacher of label maps sees pictures whose outputs "
        "are stored: larger ones are told in more detail; null: that of its training",
    )
    balance: Probability = Field(
        0.0, description="share of the posteriors' mean taken out, so that rare classes count more"
    )

    def stride_of(self, *, layer: bool) -> int:
        """Pixels a place that crops get of a layer, or of a score map."""
        return self.stride if layer or self.score_stride is None else self.score_stride


class TeacherReference(Section):
    """A trained teacher: a run folder, or a file model.safetensors in one."""

    run: str | None = None
    name: str = Field("unet", description="looked for in runs/teacher/NAME/DATA when run is null")
    weight: Positive = Field(1.0, description="in mean.posterior, where there are several")
    kind: Literal["stored", "live"] | None = Field(
        None, description="of this teacher alone; null: soft_targets.kind"
    )
