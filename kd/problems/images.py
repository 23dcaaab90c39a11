"""Base classes of problems with per-pixel targets: segmentation and saliency."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from kd.data.images import ImageSamples
from kd.data.loader import Samples, collate
from kd.data.open_files import AnnotatedSection, layout_holds, root_of
from kd.errors import UserError
from kd.metrics.records import Array, Records, gathered, save_records
from kd.problems import problem_of_data
from kd.problems.base import (
    Batch,
    Problem,
    Sampling,
    Split,
    SplitDataset,
    Task,
    Teacher,
    TeacherView,
)
from kd.problems.results import Predictor, Results, spread
from kd.registry import is_foreign, load_target
from kd.storage.fields import CachedField
from kd.utils.images import read_image

READ_FIRST = 128 << 20  # splits up to this size, bytes, are fully checked on opening (5 seconds)
COUNTED = 1000  # largest number of train images that dataset statistics are computed on
HASHED_FILES = 4096  # approximate number of evenly spaced files of a split to hash


class ImageSplit(Protocol):
    """A split of images with per-pixel targets; `images` are the paths of the image files."""

    @property
    def images(self) -> tuple[Path, ...]: ...


D = TypeVar("D", bound=Any)
S = TypeVar("S", bound=ImageSplit)
R = TypeVar("R")


@dataclass(frozen=True)
class ImageDataset(SplitDataset[S]):
    """Train and val split of a dataset of images with per-pixel targets."""

    @property
    def problem(self) -> Problem[Any]:
        return problem_of_data(self.section)

    @abstractmethod
    def training(self, seed: int, cached: Sequence[CachedField] = ()) -> ImageSamples:
        """Training samples of the train split, with the given cached teacher outputs."""

    @abstractmethod
    def whole(
        self, split: Split, *, size: Any, only: NDArray[np.int64] | None = None
    ) -> ImageSamples:
        """Whole images of a split, optionally only those at the positions `only`."""

    @property
    def counted(self) -> range:
        """Positions of up to `COUNTED` evenly spaced train images, for dataset statistics."""
        images = len(self.train.images)
        return range(0, images, -(-images // COUNTED))


def is_small(split: ImageSplit) -> bool:
    """Return True if a split's image files have at most `READ_FIRST` bytes in total."""
    return sum(path.stat().st_size for path in split.images) <= READ_FIRST


def open_layout(
    section: AnnotatedSection, layout: str, open_split: Callable[..., S], *options: Any
) -> tuple[S, S]:
    """Open both splits of a dataset in a published layout or a custom `package.module:attribute`.

    `open_split` is called as (layout, root, split, *options), a custom function as (root, split,
    *options).
    """
    root = root_of(section, holds=layout_holds(layout, str(section.train)))
    own: Callable[..., S] = (
        load_target(layout, what="layout") if is_foreign(layout) else partial(open_split, layout)
    )
    return own(root, str(section.train), *options), own(root, str(section.val), *options)


class ImageProblem(Problem[D]):
    """Base class of problems whose datasets are `ImageDataset` objects.

    Attributes:
        resizes_maps: Resize score maps to one shape for caching. If False, outputs can be cached
            only if all images have the same size.
    """

    resizes_maps: ClassVar[bool] = False

    def training(self, data: D, sampling: Sampling, task: Task | None = None) -> ImageSamples:
        samples: ImageSamples = data.training(sampling.seed, sampling.cached)
        return samples

    def evaluation(self, data: D, split: Split = "val") -> ImageSamples:
        samples: ImageSamples = data.whole(split, size=data.section.size)
        return samples

    def teacher_view(
        self, teacher: Teacher, data: D, split: Split, *, size: int | None = None
    ) -> TeacherView:
        """Whole images as teacher input; the default size is that of the teacher's training."""
        own = getattr(teacher.section, "size", None) if size is None else size
        return ImagesView(data, split, own, resizes_maps=self.resizes_maps)


class ImagesView:
    """Whole images of a split as teacher input; record ids are image positions in the split.

    `size` is as for `ImageDataset.whole`, `resizes_maps` as for `ImageProblem`.
    """

    unit = "images"
    records_per_image = 1.0

    def __init__(
        self, data: ImageDataset[Any], split: Split, size: int | tuple[int, int] | None, *,
        resizes_maps: bool,
    ) -> None:  # fmt: skip
        self.data, self.split, self.size = data, split, size
        self.grid: tuple[int, int] | None = None
        if resizes_maps and not (whole := data.whole(split, size=size)).alike:
            self.grid = whole.frame

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """Positions of the images in the split, (I,)."""
        return np.arange(len(self.data.split(self.split).images), dtype=np.int64)

    @property
    def provenance(self) -> dict[str, str]:
        """Identify the input: dataset name, split, hash of the image files, and image size."""
        files = self.data.split(self.split).images
        return {
            "data": self.data.section.name,
            "split": self.split,
            "images": files_hash(len(files), files.__getitem__),
            "transform": f"size {self.size}, whole, sides in multiples of 8",
        }

    def samples(self, images: NDArray[np.int64] | None = None) -> Samples:
        """Whole images; raise a UserError if they differ in size and there is no common `grid`."""
        samples = self.data.whole(self.split, size=self.size, only=images)
        if not samples.alike and self.grid is None:
            raise UserError(
                f"{self.data.section.name}: the images have different sizes, and outputs of "
                "different sizes cannot be cached; set soft_targets.kind=live"
            )
        return samples

    def records(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The image ids, (N,), and their batch indices; there is one record per image."""
        return batch["image_ids"], torch.arange(len(batch["image_ids"]))

    def mirrored(self, batch: Batch) -> dict[str, Tensor]:
        return {**batch, "images": mirror_images(batch)[0]}

    def moved(self, cached: Sequence[CachedField], augment: dict[str, Any]) -> Samples:
        """Raise a UserError: cached maps of whole images cannot be augmented and compared."""
        raise UserError(
            f"{self.data.section.name}: cached maps of transformed images can only be compared "
            "for teachers of hidden objects"
        )


def files_hash(count: int, file_of: Callable[[int], Path]) -> str:
    """Hash the names and sizes of about `HASHED_FILES` evenly spaced files out of `count`."""
    some = (file_of(number) for number in range(0, count, max(1, count // HASHED_FILES)))
    text = "\n".join(f"{path.name} {path.stat().st_size}" for path in some)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def mirror_images(batch: Batch) -> tuple[Tensor, Tensor]:
    """Mirror images (N, 3, H, W) left to right, leaving the padding in place.

    Also returns the source column of each column, (N, W).
    """
    images, widths = batch["images"], batch["sizes"][:, 1]
    columns = torch.arange(images.shape[-1], device=images.device)
    source = torch.where(columns < widths[:, None], widths[:, None] - 1 - columns, columns)
    return images.gather(3, source[:, None, None].expand_as(images)), source


class PerImage(ABC, Generic[R]):
    """Base class of metrics with one result per image; repeated images are scored once."""

    compressed: ClassVar[bool] = False

    def __init__(self, *, where: str = "evaluation") -> None:
        self._where = where
        self._images: dict[int, R] = {}

    @abstractmethod
    def records(self) -> Mapping[str, Array]:
        """Arrays of `predictions.npz`."""

    def gather(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge the results of all ranks; every rank must call this method."""
        parts = gathered(self._images, group)
        # If several ranks have the same image, the first rank's result counts.
        self._images = {number: one for part in parts[::-1] for number, one in part.items()}

    def save_predictions(self, path: Path) -> None:
        """Write the records as an .npz file, atomically."""
        save_records(self.records(), path, compressed=self.compressed)


class ImageResults(Results):
    """Results whose figures show ground truth and predictions over images."""

    drawn_from: ClassVar[Literal["models", "records"] | None] = "models"

    def draw(
        self, data: Any, predictors: Mapping[str, Predictor], runs: Mapping[str, Records], *,
        count: int, accelerator: Accelerator,
    ) -> Iterator[Figure]:  # fmt: skip
        for place in spread(count, len(data.val.images)):
            predicted = {}
            for name, one in predictors.items():
                # Samples of one image, because those of a whole split read the size of every file.
                samples = data.whole("val", size=one.size, only=np.array([place]))
                predicted[name] = one(collate([samples[0, 0]]), accelerator)
            image = read_image(data.val.images[place], None)
            yield self.overlay(data, place, image, predicted)

    @abstractmethod
    def overlay(
        self, data: Any, place: int, image: Tensor, predicted: Mapping[str, Tensor]
    ) -> Figure:
        """Draw ground truth and predictions over val image number `place`, (3, H, W) uint8."""
