"""The semantic segmentation task."""

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
from kd.problems.base import (
    Batch,
    Classes,
    Evaluator,
    Mask,
    Mean,
    Output,
    Task,
    full_count,
    stride_of,
)
from kd.problems.segmentation.metric import MeanIoU
from kd.transforms.hide import normalise
from kd.utils.images import VOID


@dataclass(frozen=True, kw_only=True)
class Segmentation(Task):
    """Semantic segmentation, trained with cross-entropy over labelled pixels.

    Logits are upsampled bilinearly to the size of the label maps.

    Args:
        num_classes: C.
        label_smoothing: Fraction of the target that is spread over all classes.
        class_weights: Exponent of the median-frequency class weights; 0: no weights.
        pixel_fractions: Each class's fraction of the train pixels, (C,); needed for class weights.
    """

    outputs: ClassVar[Collection[str]] = ("logits", "auxiliary")
    class_scores: ClassVar[Collection[str]] = outputs
    mask_names: ClassVar[Collection[str]] = ("valid", "class_weights")

    num_classes: int
    label_smoothing: float = 0.0
    class_weights: float = 0.0
    pixel_fractions: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if not 0 <= self.class_weights <= 1:
            raise UserError(f"class_weights must be in 0..1, got {self.class_weights}")

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return (normalise(batch["images"]),)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`cross_entropy` of the logits, and `auxiliary` if the network has an auxiliary output."""
        check_whole_places(output["logits"], batch["label_maps"])
        names = {"cross_entropy": "logits", "auxiliary": "auxiliary"}
        return {
            name: Mean(self._cross_entropy(output[key], batch["label_maps"]), "pixels")
            for name, key in names.items()
            if key in output
        }

    def _cross_entropy(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Cross-entropy averaged over labelled pixels; 0 if there are none."""
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
        if not self.class_weights:
            return None
        assert self.pixel_fractions is not None
        return _class_weights(self.pixel_fractions, self.class_weights, like.device)

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """Distillation masks, (N, h, w): `valid`, bool, is True for labelled pixels.

        With class weights there is also `class_weights`, float: the weight of each pixel's class.
        """

        def labels(grid: tuple[int, int]) -> Tensor:
            maps = batch["label_maps"][:, None].float()
            return F.interpolate(maps, grid, mode="nearest-exact")[:, 0].long()

        def weights(grid: tuple[int, int]) -> Tensor:
            by_class = self._weights(batch["label_maps"])
            assert by_class is not None
            return F.pad(by_class, (0, VOID + 1 - len(by_class)))[labels(grid)]

        found: dict[str, Mask] = {"valid": lambda grid: labels(grid) != VOID}
        if self.class_weights:
            found["class_weights"] = weights
        return found

    def counts(
        self, batch: Batch, units: Collection[str] = (), masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        """Count images, images with a labelled pixel (`valid_images`), and labelled pixels."""
        labelled = batch["label_maps"] != VOID
        return {
            "images": full_count(batch, "images"),
            "valid_images": labelled.flatten(1).any(dim=1).sum().float(),
            "pixels": labelled.sum().float(),
        }

    def place_unit(self, mask: str, grid: tuple[int, int], batch: Batch) -> str:
        """The unit `pixels` for the mask `valid`, otherwise `images` (crops have equal size)."""
        return "pixels" if mask == "valid" else "images"

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """The most likely class of each pixel at the size of the image files, (N, H, W) int64.

        Expects evaluation samples, with files of equal size within a batch.
        """
        height, width = batch["own_sizes"][0].tolist()
        # Converted to float32, because many pixels would be ties in bfloat16.
        return on_grid(output["logits"].float(), (height, width)).argmax(dim=1)

    def metric(self, classes: Classes) -> Evaluator:
        return MeanIoU(len(classes.names), where=classes.where)


@functools.cache
def _class_weights(fractions: tuple[float, ...], power: float, device: torch.device) -> Tensor:
    """Median-frequency class weights (C,), scaled to a mean of 1 over the train pixels."""
    weights = torch.tensor(median_frequency(fractions, power=power))
    return (weights / (weights * torch.tensor(fractions)).sum()).to(device)


def on_grid(logits: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize maps (N, C, h, w) bilinearly to (N, C, *grid)."""
    if logits.shape[2:] == torch.Size(grid):
        return logits
    return F.interpolate(logits, grid, mode="bilinear", align_corners=False)


def check_whole_places(logits: Tensor, truth: Tensor) -> None:
    """Raise a UserError if crop sides are not multiples of the network's stride.

    Otherwise the last grid cell would extend beyond the crop, and upsampling would shift the map.
    """
    sides = zip(("high", "wide"), truth.shape[1:], logits.shape[2:], strict=True)
    for name, pixels, places in sides:
        stride = stride_of(pixels, places)
        if stride * places != pixels:
            raise UserError(
                f"data.crop: crops are {pixels} pixels {name}, and the stride of this "
                f"network is {stride}; make it {stride * places} or {stride * (places - 1)}"
            )
