"""What is kept of a teacher ahead of training: outputs, splits, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from accelerate import Accelerator

from kd.distillation.terms import POSTERIOR
from kd.problems.objects.data import Dataset, ObjectsDataset
from kd.problems.saliency.data import SaliencyDataset
from kd.problems.saliency.task import SALIENCY
from kd.runs.load_teacher import TrainedTeacher
from kd.storage.fields import CachedField
from kd.teacher_cache.equivariance import moved_map_errors
from kd.teacher_cache.teacher_view import teacher_view

Split = Literal["train", "val"]


def own_output(data: Dataset) -> str:
    """What a teacher says of such data, beside its layers."""
    if isinstance(data, ObjectsDataset):
        return POSTERIOR
    return SALIENCY if isinstance(data, SaliencyDataset) else "logits"


def splits_kept(data: Dataset, asked: Split | None) -> Sequence[Split]:
    """The one that is asked for; else train, and of saliency val too, which is looked at."""
    if asked is not None:
        return (asked,)
    return ("train", "val") if isinstance(data, SaliencyDataset) else ("train",)


def said(
    teacher: TrainedTeacher,
    data: Dataset,
    split: Split,
    kept: Mapping[str, CachedField],
    accelerator: Accelerator,
) -> Iterator[str]:
    """Lines about the outputs that are kept of a split; all processes must ask for the first."""
    errors: dict[str, dict[str, float]] = {}
    if isinstance(data, ObjectsDataset) and split == "train":
        errors = moved_map_errors(teacher, data, kept, accelerator)
    images = len(teacher_view(teacher, data, split).image_ids)
    what = "objects" if isinstance(data, ObjectsDataset) else "pictures"
    of = " of val" if split == "val" else ""
    for name, output in kept.items():
        size = output.store.bytes
        yield (
            f"{name}: {len(output.store.ids())} {what}{of}, {size / images:.0f} bytes an image, "
            f"{size / 2**20:.1f} MiB in {output.store.url}\n"
        )
        for move, error in errors.get(name, {}).items():
            yield f"  moved with the picture: {move} is off by {error:.1%}\n"
