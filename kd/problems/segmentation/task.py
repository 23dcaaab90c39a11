"""Semantic segmentation: the class of each pixel."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import UserError
from kd.losses.class_weights import median_frequency
from kd.problems.base import Batch, Classes, Mask, Mean, Metric, Output, Task, full_count, stride_of
from kd.problems.segmentation.metric import MeanIoU
from kd.transforms.hide import normalise
from kd.utils.images import VOID


@dataclass(frozen=True, kw_only=True)
class Segmentation(Task):
    """Cross-entropy of every pixel that has a class; void counts nowhere.

    Logits are on a network's own grid, and brought to that of the label maps bilinearly.

    Args:
        num_classes: C.
        label_smoothing: Share of the target spread over all classes.
        class_weights: Power of the classes' weights, `median_frequency` of their shares of the
            train pixels, scaled so that a pixel weighs 1 on average; 0 = none.
        pixel_shares: Those shares, C of them; needed for the loss where there are weights.
    """

    outputs: ClassVar[Collection[str]] = ("logits", "auxiliary")
    mask_names: ClassVar[Collection[str]] = ("valid", "class_weights")

    num_classes: int
    label_smoothing: float = 0.0
    class_weights: float = 0.0
    pixel_shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: One is out of range.
        """
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if not 0 <= self.class_weights <= 1:
            raise UserError(f"class_weights must be in 0..1, got {self.class_weights}")

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Normalised images, (N, 3, H, W)."""
        return (normalise(batch["images"]),)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`cross_entropy`, and `auxiliary`, the same of an earlier map where a model gives it.

        Raises:
            UserError: As `check_whole_places`.
        """
        check_whole_places(output["logits"], batch["label_maps"])
        names = {"cross_entropy": "logits", "auxiliary": "auxiliary"}
        return {
            name: Mean(self._cross_entropy(output[key], batch["label_maps"]), "pixels")
            for name, key in names.items()
            if key in output
        }

    def _cross_entropy(self, logits: Tensor, truth: Tensor) -> Tensor:
        """The mean over the pixels with a class; 0 with a zero gradient where there is none."""
        total = F.cross_entropy(
            on_grid(logits, (truth.shape[1], truth.shape[2])).float(),
            truth.long(),
            weight=self._weights(logits),
            ignore_index=VOID,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return total / (truth != VOID).sum().clamp(min=1)

    def _weights(self, like: Tensor) -> Tensor | None:
        """Of the classes, (C,), on a device, made once: what they are never changes."""
        if not self.class_weights:
            return None
        assert self.pixel_shares is not None
        return _class_weights(self.pixel_shares, self.class_weights, like.device)

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """For distillation, (N, h, w): `valid`, bool, where there is a class.

        With weights of classes also `class_weights`: what a pixel counts in cross-entropy.
        """

        def labels(grid: tuple[int, int]) -> Tensor:
            maps = batch["label_maps"][:, None].float()
            return F.interpolate(maps, grid, mode="nearest-exact")[:, 0].long()

        def weights(grid: tuple[int, int]) -> Tensor:
            known = self._weights(batch["label_maps"])
            assert known is not None
            return F.pad(known, (0, VOID + 1 - len(known)))[labels(grid)]

        found: dict[str, Mask] = {"valid": lambda grid: labels(grid) != VOID}
        if self.class_weights:
            found["class_weights"] = weights
        return found

    def counts(
        self, batch: Batch, units: Collection[str] = (), masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        """Pixels with a class, images, and those of them with such a pixel."""
        known = batch["label_maps"] != VOID
        return {
            "images": full_count(batch, "images"),
            "valid_images": known.flatten(1).any(dim=1).sum().float(),
            "pixels": known.sum().float(),
        }

    def place_unit(self, mask: str, grid: tuple[int, int], batch: Batch) -> str:
        """Places with a class count as the pixels with one; crops are of one size."""
        return "pixels" if mask == "valid" else "images"

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """The likeliest class of each pixel, int64 of the label maps' shape."""
        truth = batch["label_maps"]
        # In bfloat16 many places between two of the grid would be ties.
        logits = output["logits"].float()
        return on_grid(logits, (truth.shape[1], truth.shape[2])).argmax(dim=1)

    def metric(self, classes: Classes) -> Metric:
        """Mean intersection over union and what goes with it."""
        return MeanIoU(len(classes.names), where=classes.where)


@functools.cache
def _class_weights(shares: tuple[float, ...], power: float, device: torch.device) -> Tensor:
    """The mean over pixels stays one over pixels, so that micro-batches add up."""
    weights = torch.tensor(median_frequency(shares, power=power))
    return (weights / (weights * torch.tensor(shares)).sum()).to(device)


def on_grid(logits: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps (N, C, h, w) brought to a grid bilinearly, (N, C, *grid)."""
    if logits.shape[2:] == torch.Size(grid):
        return logits
    return F.interpolate(logits, grid, mode="bilinear", align_corners=False)


def check_whole_places(logits: Tensor, truth: Tensor) -> None:
    """Refuse crops that end within a place of a network's grid.

    Its last place answers for pixels beyond the crop, too; the map, brought to the crop's size,
    would be squeezed by them, and everything in it lie too high and too far to the left.

    Raises:
        UserError: A side is no multiple of the pixels of a place.
    """
    sides = zip(("high", "wide"), truth.shape[1:], logits.shape[2:], strict=True)
    for name, pixels, places in sides:
        stride = stride_of(pixels, places)
        if stride * places != pixels:
            raise UserError(
                f"data.crop: crops are {pixels} pixels {name}, and this network answers for "
                f"{stride} at a time; make it {stride * places} or {stride * (places - 1)}"
            )
