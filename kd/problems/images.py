"""Parts shared by problems whose images have targets for pixels: label maps and fixations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch.distributed as dist
from accelerate import Accelerator
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from kd.data.images import ImageSamples
from kd.data.loader import collate
from kd.data.open_files import AnnotatedSection, layout_holds, root_of
from kd.metrics.records import Array, Records, gathered, save_records
from kd.problems import problem_of_data
from kd.problems.base import Problem, Sampling, Split, Task
from kd.problems.results import Predictor, Results, spread
from kd.registry import is_foreign, load_target
from kd.storage.fields import CachedField
from kd.utils.images import read_image

READ_FIRST = 128 << 20  # bytes of a split's images that are all checked at once, about 5 seconds
COUNTED = 1000  # train images that statistics of a dataset are computed on, at most


class ImageSplit(Protocol):
    """A split of images with targets."""

    @property
    def images(self) -> tuple[Path, ...]:
        """Image files."""
        ...


D = TypeVar("D", bound=Any)
S = TypeVar("S", bound=ImageSplit)
R = TypeVar("R")


@dataclass(frozen=True)
class ImageDataset(ABC, Generic[D, S]):
    """Both splits of a dataset of images with targets for their pixels."""

    section: D
    train: S
    val: S

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """C names."""

    @abstractmethod
    def training(self, seed: int, cached: Sequence[CachedField] = ()) -> ImageSamples:
        """Training samples of the train split, with cached outputs of teachers."""

    @abstractmethod
    def whole(
        self, split: Split, *, size: Any, only: NDArray[np.int64] | None = None
    ) -> ImageSamples:
        """Whole images of a split, all or those at some positions."""

    @property
    def problem(self) -> Problem[Any]:
        """The problem with this kind of data section."""
        return problem_of_data(self.section)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def labelled(self, seed: int) -> None:
        """All train images are labelled."""

    def split(self, name: Split) -> S:
        """One of the two splits."""
        return self.train if name == "train" else self.val

    @property
    def counted(self) -> range:
        """Train images that statistics are computed on: of a large split some, spread evenly."""
        images = len(self.train.images)
        return range(0, images, -(-images // COUNTED))


def is_small(split: ImageSplit) -> bool:
    """Whether all of a split is read in seconds; time goes with the bytes of its files."""
    return sum(path.stat().st_size for path in split.images) <= READ_FIRST


def open_layout(
    section: AnnotatedSection, layout: str, open_split: Callable[..., S], *options: Any
) -> tuple[S, S]:
    """Open both splits of a dataset in a published layout, or one of the user's own.

    Args:
        section: The dataset's.
        layout: The section's.
        open_split: Opens a split of a published layout: (layout, root, split, *options).
        options: Passed on.
    """
    root = root_of(section, holds=layout_holds(layout, str(section.train)))
    own: Callable[..., S] = (
        load_target(layout, what="layout") if is_foreign(layout) else partial(open_split, layout)
    )
    return own(root, str(section.train), *options), own(root, str(section.val), *options)


class ImageProblem(Problem[D]):
    """A problem whose datasets are `ImageDataset`."""

    def training(self, data: D, sampling: Sampling, task: Task | None = None) -> ImageSamples:
        """Training samples of all images."""
        samples: ImageSamples = data.training(sampling.seed, sampling.cached)
        return samples

    def evaluation(self, data: D, split: Split = "val") -> ImageSamples:
        """Whole images."""
        samples: ImageSamples = data.whole(split, size=data.section.size)
        return samples


class PerImage(ABC, Generic[R]):
    """A metric that keeps one result per image, however often a sampler repeats it.

    Args:
        where: Start of messages: a run, a dataset.
    """

    compressed: ClassVar[bool] = False

    def __init__(self, *, where: str = "evaluation") -> None:
        self._where = where
        self._images: dict[int, R] = {}

    @abstractmethod
    def records(self) -> Mapping[str, Array]:
        """Arrays of `predictions.npz`."""

    def gather(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge the results of all ranks; alone, does nothing."""
        parts = gathered(self._images, group)
        # Of an image that several ranks hold, the first rank's result is used.
        self._images = {number: one for part in parts[::-1] for number, one in part.items()}

    def save_predictions(self, path: Path) -> None:
        """Write `records`."""
        save_records(self.records(), path, compressed=self.compressed)


class ImageResults(Results):
    """Results whose figures show ground truth and predictions over the image."""

    drawn_from: ClassVar[Literal["models", "records"] | None] = "models"

    def draw(
        self, data: Any, predictors: Mapping[str, Predictor], runs: Mapping[str, Records], *,
        count: int, accelerator: Accelerator,
    ) -> Iterator[Figure]:  # fmt: skip
        """Draw val images spread over the split, with ground truth and predictions."""
        for place in spread(count, len(data.val.images)):
            predicted = {}
            for name, one in predictors.items():
                # One image per dataset: opening the whole split reads the size of every file.
                samples = data.whole("val", size=one.size, only=np.array([place]))
                predicted[name] = one(collate([samples[0, 0]]), accelerator)
            image = read_image(data.val.images[place], None)
            yield self.overlay(data, place, image, predicted)

    @abstractmethod
    def overlay(
        self, data: Any, place: int, image: Tensor, predicted: Mapping[str, Tensor]
    ) -> Figure:
        """Draw one val image, (3, H, W) uint8, with ground truth and predictions by name."""
