"""What a task is, and what travels: images (N, 3, H, W), boxes (M, 4) xyxy pixels, labels (M,).

A batch is a dict of tensors; `docs/batch.md` lists its keys. Of its M objects K are `hidden`: the
ones that are asked about, one row of output each. A detector's batch hides none: its outputs' rows
are the images, and all M objects are asked about. Label -1 means withheld.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.errors import UserError
from kd.metrics.kitti_ap import KittiTruth
from kd.nn.regions import coverage, expand_boxes
from kd.problems.detection.metric import BoxTruth, FoundBoxes
from kd.problems.objects.metric import TopN
from kd.problems.saliency.baselines import GazeTruth
from kd.utils.images import VOID

Batch = Mapping[str, Tensor]
Output = Mapping[str, Tensor]
# Height and width of a feature map to the weights (K, h, w) of a mask on it.
Mask = Callable[[tuple[int, int]], Tensor]

RING_MARGIN = 0.5
KNOWN = "known"  # a unit: boxes about which a teacher was asked


class Mean(NamedTuple):
    """A scalar mean and the unit it was taken over, a key of `count_units`.

    Ranks and micro-batches hold unequal numbers of objects; with the unit their means can be put
    together to the mean of the whole batch. `judged` is what a critic learns from afterwards: both
    sides' maps and the images, detached.
    """

    value: Tensor
    unit: str
    judged: tuple[Tensor, ...] = ()

    def detach(self) -> Mean:
        """The same without a graph behind it."""
        return self._replace(value=self.value.detach())


class Classes(NamedTuple):
    """What a metric is told of a data set: the class names, C each of the rest.

    `prior` are the class fractions of the train objects; classes of one group in `confusable`
    (None: no group) look alike; `visible` maps image ids (K,) to how many other objects the image
    of each holds; `where` is what messages begin with; `truth` reads the boxes on the val images,
    as their JSON has them, and `kitti` the same as KITTI's difficulties ask for them; `gaze` is
    where people looked on the val images, and the references of saliency maps.
    """

    names: Sequence[str]
    prior: NDArray[np.float64] | None = None
    confusable: Sequence[str | None] | None = None
    visible: Callable[[NDArray[np.int64]], NDArray[np.int64]] | None = None
    where: str = "evaluation"
    truth: Callable[[], BoxTruth] | None = None
    kitti: Callable[[], KittiTruth] | None = None
    gaze: GazeTruth | None = None


class Collector(Protocol):
    """Takes in what a task decodes, of all ranks in the end."""

    def take(self, decoded: Tensor, batch: Batch) -> None:
        """Take in a batch's answers, as the task decoded them."""
        ...

    def gather(self) -> None:
        """Exchange with the other ranks."""
        ...


class Metric(Collector, Protocol):
    """Says how good the collected answers are."""

    def compute(self) -> dict[str, float]:
        """Every number by name, shares in 0..1."""
        ...

    def per_class(self, names: Sequence[str]) -> Sequence[tuple[str, int, float]]:
        """Name, support and score of each class that occurs, the most frequent first."""
        ...

    def save_predictions(self, path: Path) -> None:
        """Write the answers and what is true as an .npz file."""
        ...


# What losses and terms are means of, see `count_units`: about hidden objects, boxes, pixels.
_OBJECT_UNITS = ("hidden", "images", "labelled", "labelled_images")
_BOX_UNITS = ("boxes", "images", "labelled", "labelled_images")
_PIXEL_UNITS = ("images", "valid_images", "pixels")


class Task(Protocol):
    """One kind of problem. A task is frozen and holds no model."""

    def inputs(self, batch: Batch) -> tuple[Tensor | None, ...]:
        """What the model is called with; None for what it is not told."""
        ...

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Supervised losses, unweighted."""
        ...

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """Masks for imitation, by name."""
        ...

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Log-probabilities for `metric`: of most tasks of the K hidden objects, (K, C)."""
        ...

    def metric(self, classes: Classes) -> Metric:
        """What its answers are scored by."""
        ...


@runtime_checkable
class OnLevels(Protocol):
    """A task whose masks are on the levels of a pyramid, each level's places a unit of its own."""

    def counts(
        self, batch: Batch, names: Collection[str], masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        """Places of each mask on each level, as `NAME/STRIDE`; `masks` are the batch's, if made."""
        ...


def top_n(classes: Classes) -> TopN:
    """The metric of tasks that name the hidden objects."""
    return TopN(
        len(classes.names),
        prior=classes.prior,
        confusable=classes.confusable,
        visible=classes.visible,
        where=classes.where,
    )


def found_boxes(classes: Classes) -> FoundBoxes:
    """The metric of tasks that find objects.

    Raises:
        UserError: The data set has no boxes.
    """
    if classes.truth is None:
        raise UserError(f"{classes.where}: has no boxes of objects that could be found")
    return FoundBoxes(
        classes.truth(),
        classes.names,
        confusable=classes.confusable,
        kitti=None if classes.kitti is None else classes.kitti(),
        where=classes.where,
    )


def named(output: Tensor | Output) -> dict[str, Tensor]:
    """A model's raw output by name; a lone tensor is its `logits`."""
    return {"logits": output} if isinstance(output, Tensor) else dict(output)


def about_objects(batch: Batch) -> bool:
    """Whether a batch's rows are its hidden objects; otherwise they are its images."""
    return "hidden" in batch


def about_boxes(batch: Batch) -> bool:
    """Whether a batch is a detector's: its rows are images, with boxes on them and none hidden."""
    return "boxes" in batch and not about_objects(batch)


def about_gaze(batch: Batch) -> bool:
    """Whether a batch's rows are whole pictures that somebody looked at."""
    return "label_maps" not in batch and "labels" not in batch


def asked(batch: Batch) -> Tensor:
    """The objects asked about, (K,) indices into all M: the hidden ones, or every one."""
    if about_objects(batch):
        return batch["hidden"]
    return torch.arange(len(batch["boxes"]), device=batch["boxes"].device)


def image_rows(batch: Batch) -> Tensor:
    """The image that each object asked about is on, (K,)."""
    return batch["image_of"][asked(batch)]


def hidden_boxes(batch: Batch) -> Tensor:
    """Boxes of the objects asked about, (K, 4)."""
    return batch["boxes"][asked(batch)]


def hidden_labels(batch: Batch) -> Tensor:
    """Labels of the objects asked about, (K,); -1 where withheld."""
    return batch["labels"][asked(batch)]


def remembered(masks: Mapping[str, Mask]) -> dict[str, Mask]:
    """Masks of a batch that are computed once for each grid, whoever asks for them how often."""
    return {name: functools.cache(mask) for name, mask in masks.items()}


def psi_mask(psi: float) -> str:
    """What an imitation mask of a psi of its own is called."""
    return f"imitation_{psi:g}"


def ring_mask(batch: Batch) -> Mask:
    """The surroundings of each hidden object: a ring of half its size, where there is picture."""

    def on_grid(grid: tuple[int, int]) -> Tensor:
        stride = stride_of(batch["images"].shape[-2], grid[0])
        boxes = hidden_boxes(batch)
        ring = coverage(outer_boxes(batch), grid, stride) - coverage(boxes, grid, stride)
        return ring.clamp(min=0.0)

    return on_grid


def outer_boxes(batch: Batch) -> Tensor:
    """Outer edges of the rings, (K, 4), within the picture: padding is no surroundings."""
    outer = expand_boxes(hidden_boxes(batch), RING_MARGIN)
    sizes = batch["sizes"][image_rows(batch)].to(outer.dtype)
    return outer.clamp(min=0.0).minimum(sizes[:, [1, 0, 1, 0]])


def stride_of(pixels: int, places: int) -> int:
    """Pixels per place: the power of two that rounds up to so many places, if there is one.

    Else one that rounds down to them, as VGG and DenseNet do.
    """
    strides = [1 << power for power in range(pixels.bit_length() + 1)]
    up = [stride for stride in strides if -(-pixels // stride) == places]
    down = [stride for stride in strides if pixels // stride == places]
    return next(iter(up + down), -(-pixels // places))


def count_units(batch: Batch, masks: Collection[str] = ()) -> dict[str, Tensor]:
    """How much of each unit a batch holds; from the batch alone, before any model runs.

    `masks` are names of further units. Of a detector's batch `labelled` are the boxes with labels,
    `labelled_images` the pictures whose labels are known, also those without a box. `ring` is the
    area of all rings in pixels; its scale cancels in the engine, which only compares counts of one
    unit.
    """
    counts: dict[str, Tensor] = {}
    device = batch["images"].device
    for unit in (*_units(batch), *sorted(masks)):
        rows = "images" if unit == "valid_images" and about_gaze(batch) else unit
        if rows in ("images", "hidden", "boxes"):
            # Filled there: a copy to a GPU would wait for all that it still has to do.
            count = torch.full((), float(len(batch[rows])), device=device)
        elif unit == "pixels":  # of whole pictures all but padding
            known = batch["sizes"].prod(1) if about_gaze(batch) else batch["label_maps"] != VOID
            count = known.sum().float()
        elif unit == "valid_images":
            count = (batch["label_maps"] != VOID).flatten(1).any(dim=1).sum().float()
        elif unit == "labelled":
            count = (hidden_labels(batch) >= 0).sum().float()
        elif unit == "labelled_images" and about_boxes(batch):
            count = batch["labelled"].sum().float()
        elif unit == "labelled_images":
            told = (batch["labels"] >= 0).float()
            images = told.new_zeros(len(batch["images"]))
            count = (images.index_add(0, batch["image_of"], told) > 0).sum().float()
        elif unit == "ring":
            count = _areas(outer_boxes(batch)).sum() - _areas(hidden_boxes(batch)).sum()
        else:
            raise KeyError(unit)
        counts[unit] = count
    return counts


def _units(batch: Batch) -> tuple[str, ...]:
    """What every batch of this kind has."""
    if about_objects(batch):
        return _OBJECT_UNITS
    return _BOX_UNITS if about_boxes(batch) else _PIXEL_UNITS


def _areas(boxes: Tensor) -> Tensor:
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0.0)
    return sides[:, 0] * sides[:, 1]
