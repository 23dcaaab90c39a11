"""What a teacher is shown when its outputs are stored: objects hidden one by one, or pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kd.data.images import ImageSamples
from kd.data.loader import Samples
from kd.distillation.terms import TEACHER_OUTPUTS
from kd.errors import UserError
from kd.formats.coco import CocoIndex
from kd.problems.objects.data import Dataset, ObjectsDataset, make_dataset, of_objects
from kd.problems.objects.samples import ObjectSamples
from kd.problems.saliency.data import SaliencyDataset
from kd.problems.segmentation.data import SegmentationDataset
from kd.runs.load_teacher import TrainedTeacher, as_shown

PICTURES_LOOKED_AT = 4096
Split = Literal["train", "val"]


class TeacherView(Protocol):
    """A split as a teacher sees it; records are its objects, or its pictures."""

    @property
    def data(self) -> Dataset:
        """The data set."""
        ...

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """Of the images that are shown, (I,)."""
        ...

    @property
    def records_an_image(self) -> float:
        """On average."""
        ...

    @property
    def about(self) -> dict[str, str]:
        """What the stored numbers follow from beside the teacher."""
        ...

    @property
    def grid(self) -> tuple[int, int] | None:
        """That score maps are brought to before they are stored; None: they have one shape."""
        ...

    def samples(self, only: NDArray[np.int64] | None = None) -> Samples:
        """All images, or those with these ids."""
        ...


@dataclass(frozen=True)
class ObjectsView:
    """Every usable object of a split, hidden in turn; a record for each."""

    data: ObjectsDataset
    split: Split

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """Of the images with a usable object."""
        return np.asarray(self._index.image_ids[self._whole.images], dtype=np.int64)

    @property
    def records_an_image(self) -> float:
        """Objects an image."""
        return len(self._index.labels) / len(self._index)

    @property
    def about(self) -> dict[str, str]:
        """Annotations, pictures, and how these are shown."""
        section, dataset = self.data.section, self._whole
        return {
            "data": self._index.fingerprint,
            "split": self.split,
            "pictures": _pictures_hash(
                len(dataset.images), lambda n: dataset.picture(int(dataset.images[n]))[0]
            ),
            "transform": f"size {section.size}, {section.shape}, rescaled and padded",
        }

    @property
    def grid(self) -> None:
        """Frames are squares."""
        return None

    def samples(self, only: NDArray[np.int64] | None = None) -> Samples:
        """Scenes with all their objects hidden in turn."""
        if only is None:
            return self._whole
        return make_dataset(self.data, self.split, train=False, only=only)

    @property
    def _index(self) -> CocoIndex:
        return self.data.train if self.split == "train" else self.data.val

    @cached_property
    def _whole(self) -> ObjectSamples:
        """Which objects count is found once; of a large data set that takes a while."""
        return make_dataset(self.data, self.split, train=False)


@dataclass(frozen=True)
class ImagesView:
    """Every picture of a split, whole; a record for each, by its place in the split.

    Args:
        data: The data set.
        split: Which of it.
        size: Long side that the teacher sees, pixels, or of gaze what pictures are scaled into;
            None: that of the files.
    """

    data: SegmentationDataset | SaliencyDataset
    split: Split
    size: int | tuple[int, int] | None

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """Places in the split."""
        return np.arange(len(self._images), dtype=np.int64)

    @property
    def records_an_image(self) -> float:
        """One."""
        return 1.0

    @property
    def about(self) -> dict[str, str]:
        """Pictures, and how they are shown."""
        return {
            "data": self.data.section.name,
            "split": self.split,
            "pictures": _pictures_hash(len(self._images), self._images.__getitem__),
            "transform": f"size {self.size}, whole, sides in multiples of 8",
        }

    def samples(self, only: NDArray[np.int64] | None = None) -> Samples:
        """Whole pictures.

        Raises:
            UserError: They are not of one size, so that their maps would not be.
        """
        pictures = self._whole(only)
        if not pictures.alike and self.grid is None:
            raise UserError(
                f"{self.data.section.name}: pictures of different sizes have maps of different "
                "sizes, which are not stored: soft_targets.kind=live"
            )
        return pictures

    @cached_property
    def grid(self) -> tuple[int, int] | None:
        """Of gaze what pictures are scaled into, where these are of different sizes.

        A stored map covers the whole of its picture, whatever the sides of either.
        """
        if isinstance(self.data, SegmentationDataset):
            return None
        whole = self._whole(None)
        return None if whole.alike else whole.frame

    def _whole(self, only: NDArray[np.int64] | None) -> ImageSamples:
        if isinstance(self.data, SaliencyDataset):
            return self.data.whole(self.split, size=self.size, only=only)
        assert not isinstance(self.size, tuple)
        return self.data.whole(self.split, size=self.size, only=only)

    @property
    def _images(self) -> tuple[Path, ...]:
        return (self.data.train if self.split == "train" else self.data.val).images


def teacher_view(
    teacher: TrainedTeacher, data: Dataset, split: Split, *, size: int | None = None
) -> TeacherView:
    """A split as a teacher saw its own data in training, or pictures at another size.

    Raises:
        UserError: Another size of pictures whose objects are hidden.
    """
    if isinstance(data, SegmentationDataset):
        own = teacher.recipe.data.size
        return ImagesView(data, split, size or (max(own) if isinstance(own, tuple) else own))
    if isinstance(data, SaliencyDataset):
        return ImagesView(data, split, size or teacher.recipe.data.size)
    if size is not None:
        raise UserError(
            f"a size of {size} pixels is for label maps and gaze; objects are hidden at the size "
            "that the teacher was trained at: leave soft_targets.size out"
        )
    # Which objects count is the student's choice.
    return ObjectsView(as_shown(teacher, of_objects(data), min_share=0.0, max_share=1.0), split)


def in_one_shape(given: Mapping[str, Tensor], grid: tuple[int, int] | None) -> Mapping[str, Tensor]:
    """Score maps of pictures of different sizes on one grid, so that they can be stored.

    Args:
        given: What a teacher says; layers are left out where there is a grid.
        grid: Of the result; None leaves all as it is.
    """
    if grid is None:
        return given
    return {
        name: F.interpolate(maps, grid, mode="bilinear", align_corners=False, antialias=True)
        for name, maps in given.items()
        if name in TEACHER_OUTPUTS
    }


def _pictures_hash(count: int, path_of: Callable[[int], Path]) -> str:
    """Of the names and sizes of the picture files: of some of very many."""
    some = (path_of(number) for number in range(0, count, max(1, count // PICTURES_LOOKED_AT)))
    text = "\n".join(f"{path.name} {path.stat().st_size}" for path in some)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def mirror(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mirror pictures left and right, each within its own size, with their boxes and masks.

    Args:
        batch: As in docs/batch.md.

    Returns:
        The same batch with other `images` and, where there are some, `boxes` and `segments`.
    """
    images, widths = batch["images"], batch["sizes"][:, 1]
    columns = torch.arange(images.shape[-1], device=images.device)
    # (N, W): the padding beside the picture stays where it is.
    source = torch.where(columns < widths[:, None], widths[:, None] - 1 - columns, columns)
    seen = source[:, None, None].expand_as(images)
    mirrored = {**batch, "images": images.gather(3, seen)}
    if "boxes" not in batch:
        return mirrored
    edge = widths[batch["image_of"]].to(batch["boxes"].dtype)
    x1, y1, x2, y2 = batch["boxes"].unbind(dim=1)
    mirrored["boxes"] = torch.stack([edge - x2, y1, edge - x1, y2], dim=1)
    if "segments" in batch:
        rows = source[batch["image_of"][batch["hidden"]]]
        mirrored["segments"] = batch["segments"].gather(
            2, rows[:, None].expand_as(batch["segments"])
        )
    return mirrored
