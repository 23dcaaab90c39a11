"""What is kept of a teacher ahead of training: outputs, splits, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from accelerate import Accelerator

from kd.distillation.terms import POSTERIOR
from kd.problems.objects.data import OpenData, Opened
from kd.problems.saliency.data import OpenGaze
from kd.problems.saliency.task import SALIENCY
from kd.runs.load_teacher import TrainedTeacher
from kd.storage.fields import StoredField
from kd.teacher_cache.equivariance import moved_map_errors
from kd.teacher_cache.teacher_view import shown_to

Split = Literal["train", "val"]


def own_output(data: Opened) -> str:
    """What a teacher says of such data, beside its layers."""
    if isinstance(data, OpenData):
        return POSTERIOR
    return SALIENCY if isinstance(data, OpenGaze) else "logits"


def splits_kept(data: Opened, asked: Split | None) -> Sequence[Split]:
    """The one that is asked for; else train, and of saliency val too, which is looked at."""
    if asked is not None:
        return (asked,)
    return ("train", "val") if isinstance(data, OpenGaze) else ("train",)


def said(
    teacher: TrainedTeacher,
    data: Opened,
    split: Split,
    kept: Mapping[str, StoredField],
    accelerator: Accelerator,
) -> Iterator[str]:
    """Lines about the outputs that are kept of a split; all processes must ask for the first."""
    errors: dict[str, dict[str, float]] = {}
    if isinstance(data, OpenData) and split == "train":
        errors = moved_map_errors(teacher, data, kept, accelerator)
    images = len(shown_to(teacher, data, split).image_ids)
    what = "objects" if isinstance(data, OpenData) else "pictures"
    of = " of val" if split == "val" else ""
    for name, output in kept.items():
        size = output.store.bytes
        yield (
            f"{name}: {len(output.store.ids())} {what}{of}, {size / images:.0f} bytes an image, "
            f"{size / 2**20:.1f} MiB in {output.store.url}\n"
        )
        for move, error in errors.get(name, {}).items():
            yield f"  moved with the picture: {move} is off by {error:.1%}\n"
