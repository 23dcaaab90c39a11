"""Summarize what `kd.cache` stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from accelerate import Accelerator

from kd.problems.base import Dataset, Split
from kd.runs.load_teacher import TrainedTeacher
from kd.storage.fields import CachedField
from kd.teacher_cache.equivariance import moved_map_errors


def cache_summary(
    teacher: TrainedTeacher,
    data: Dataset,
    split: Split,
    cached: Mapping[str, CachedField],
    accelerator: Accelerator,
) -> Iterator[str]:
    """Yield lines about the cached outputs of a split; all processes must call this function."""
    errors = moved_map_errors(teacher, data, cached, accelerator) if split == "train" else {}
    view = data.problem.teacher_view(teacher, data, split)
    images, of = len(view.image_ids), " of val" if split == "val" else ""
    for name, output in cached.items():
        size = output.store.bytes
        yield (
            f"{name}: {len(output.store.ids())} {view.unit}{of}, {size / images:.0f} bytes an "
            f"image, {size / 2**20:.1f} MiB in {output.store.url}\n"
        )
        for move, error in errors.get(name, {}).items():
            yield f"  under {move} the moved maps differ by {error:.1%}\n"
