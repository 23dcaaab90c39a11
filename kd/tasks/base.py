"""What a task is, and what travels: images (N, 3, H, W), boxes (M, 4) xyxy pixels, labels (M,).

A batch is a dict of tensors; `docs/design.md` lists its keys. Of its M objects K are `hidden`: the
ones that are asked about, one row of output each. Label -1 means withheld.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kd.nn.regions import ring_weights

Batch = Mapping[str, Tensor]
Output = Mapping[str, Tensor]
# Height and width of a feature map to the weights (K, h, w) of a mask on it.
Mask = Callable[[tuple[int, int]], Tensor]

RING_MARGIN = 0.5
_COUNTING_STRIDE = 8


class Mean(NamedTuple):
    """A scalar mean and the unit it was taken over, a key of `count_units`.

    Ranks and micro-batches hold unequal numbers of objects; with the unit their means can be put
    together to the mean of the whole batch.
    """

    value: Tensor
    unit: str


class Task(Protocol):
    """One kind of problem. A task is frozen and holds no model."""

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the model is called with."""
        ...

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Supervised losses, unweighted."""
        ...

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """Masks for imitation, by name."""
        ...

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Log-probabilities of the K hidden objects, (K, C)."""
        ...


def image_rows(batch: Batch) -> Tensor:
    """The image that each hidden object is on, (K,)."""
    return batch["image_of"][batch["hidden"]]


def hidden_boxes(batch: Batch) -> Tensor:
    """Boxes of the hidden objects, (K, 4)."""
    return batch["boxes"][batch["hidden"]]


def hidden_labels(batch: Batch) -> Tensor:
    """Labels of the hidden objects, (K,); -1 where withheld."""
    return batch["labels"][batch["hidden"]]


def ring_mask(batch: Batch) -> Mask:
    """The surroundings of each hidden object: a ring of half its size around its box."""

    def on_grid(grid: tuple[int, int]) -> Tensor:
        stride = -(-batch["images"].shape[-2] // grid[0])
        return ring_weights(hidden_boxes(batch), grid, stride, margin=RING_MARGIN)

    return on_grid


def count_units(batch: Batch, units: set[str]) -> dict[str, Tensor]:
    """How much of each unit a batch holds; from the batch alone, before any model runs.

    `ring` is the area of all rings in feature places; its scale cancels in the engine, which only
    compares counts of one unit.
    """
    counts: dict[str, Tensor] = {}
    device = batch["images"].device
    for unit in sorted(units):
        if unit == "hidden":
            count = torch.tensor(float(len(batch["hidden"])), device=device)
        elif unit == "labelled":
            count = (hidden_labels(batch) >= 0).sum().float()
        elif unit == "ring":
            height, width = batch["images"].shape[-2:]
            grid = (-(-height // _COUNTING_STRIDE), -(-width // _COUNTING_STRIDE))
            boxes = hidden_boxes(batch)
            count = ring_weights(boxes, grid, _COUNTING_STRIDE, margin=RING_MARGIN).sum()
        else:
            raise KeyError(unit)
        counts[unit] = count
    return counts
