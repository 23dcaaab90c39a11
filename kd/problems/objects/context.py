"""Context tasks: what class is the object that was hidden?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import UserError
from kd.losses.class_weights import median_frequency, positive_weights
from kd.losses.supervised import (
    cross_entropy_labelled,
    masked_bce,
    masked_cross_entropy,
    multilabel_bce,
)
from kd.metrics.multilabel import present_classes
from kd.problems.base import Batch, Classes, Mask, Mean, Metric, Output, Rows, Task
from kd.problems.objects.batch import (
    hidden_labels,
    image_rows,
    object_counts,
    object_rows,
    ring_mask,
    top_n,
)
from kd.transforms.hide import Shape, class_maps, hide, normalise, regions_of, valid_pixels


@dataclass(frozen=True, kw_only=True)
class ContextInputs(Task):
    """What the context tasks share: the input with one object hidden in each.

    Args:
        num_classes: C.
        shape: Shape of the hidden region; `segment` reads the batch's exact masks.
    """

    outputs: ClassVar[Collection[str]] = ("logits", "dense")
    mask_names: ClassVar[Collection[str]] = ("ring",)

    num_classes: int
    shape: Shape = "box"

    def outputs_per_region(self, size: int) -> int:
        """Numbers that a model gives for one hidden region of square images of this side."""
        return self.num_classes

    def regions(self, batch: Batch) -> Tensor:
        """Hidden pixels, bool (K, H, W)."""
        return regions_of(batch, shape=self.shape)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Normalised RGB with the region at 0, and the region: (K, 4, H, W).

        Of a batch of whole images nothing is hidden: (N, 4, H, W).
        """
        images = normalise(batch["images"])
        if "hidden" not in batch:
            return (F.pad(images, (0, 0, 0, 0, 0, 1)),)
        return (hide(images, image_rows(batch), self.regions(batch)),)

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """`ring`: the surroundings of the hidden object."""
        return {"ring": ring_mask(batch)}

    def rows(self, batch: Batch) -> Rows:
        """A row for each object that the batch is about."""
        return object_rows(batch)

    def counts(
        self, batch: Batch, units: Collection[str] = (), masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        """Objects and images, with labels and without."""
        return object_counts(batch, units)

    def metric(self, classes: Classes) -> Metric:
        """Top-n accuracy and what goes with it."""
        return top_n(classes)


@dataclass(frozen=True, kw_only=True)
class Context(ContextInputs):
    """One answer for the hidden object: logits (K, C), cross-entropy.

    For BlindNet's CNN and any trunk. A model that also gives `dense` pixel logits learns from the
    visible objects too: to know the company, first see who is there.

    Args:
        label_smoothing: Share of the target spread over all classes.
        balance: Share of the class prior that the answers are freed of, so that rare classes count
            more: the loss sees the logits with it put back (Menon et al., 2021, logit adjustment,
            https://arxiv.org/abs/2007.07314).
        prior: Class shares of the train objects, C of them; needed for the loss where there is a
            balance.
    """

    label_smoothing: float = 0.0
    balance: float = 0.0
    prior: tuple[float, ...] | None = None

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`cross_entropy` over the hidden objects with a label."""
        logits = output["logits"]
        if self.balance:
            assert self.prior is not None
            logits = logits + self.balance * logits.new_tensor(self.prior).log()
        loss = cross_entropy_labelled(
            logits, hidden_labels(batch), label_smoothing=self.label_smoothing
        )
        losses = {"cross_entropy": Mean(loss, "labelled")}
        if "dense" in output:
            losses["visible"] = self._visible(output["dense"], batch)
        return losses

    def _visible(self, logits: Tensor, batch: Batch) -> Mean:
        """Pixel logits (K, C, h, w) against the boxes that are not hidden, on their own grid."""
        grid = (logits.shape[2], logits.shape[3])
        hidden = F.adaptive_max_pool2d(self.regions(batch).float()[:, None], grid)[:, 0] > 0
        valid = picture_pixels(batch, grid)
        told = hidden_labels(batch) >= 0
        rows = image_rows(batch)
        loss = masked_bce(
            logits,
            label_maps(batch, self.num_classes, grid)[rows],
            hidden,
            valid=valid[rows] & told[:, None, None],
            hidden_weight=0.0,
        )
        return Mean(loss * (len(told) / told.sum().clamp(min=1)), "labelled")

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Log-probabilities (K, C)."""
        return output["logits"].float().log_softmax(dim=1)


def label_maps(batch: Batch, num_classes: int, grid: tuple[int, int]) -> Tensor:
    """The classes of all boxes with labels on a grid over the picture, bool (N, C, h, w)."""
    known = batch["labels"] >= 0
    height, width = batch["images"].shape[-2:]
    scale = batch["boxes"].new_tensor([grid[1] / width, grid[0] / height]).repeat(2)
    return class_maps(
        batch["boxes"][known] * scale,
        batch["labels"][known],
        batch["image_of"][known],
        len(batch["images"]),
        num_classes,
        grid,
    )


def picture_pixels(batch: Batch, grid: tuple[int, int] | None = None) -> Tensor:
    """Pixels of the picture rather than of its padding, bool (N, H, W), or places with any of them.

    Args:
        batch: As in docs/batch.md.
        grid: Places in place of pixels, (N, h, w).
    """
    height, width = batch["images"].shape[-2:]
    pixels = valid_pixels(batch["sizes"], (height, width))
    return (
        pixels if grid is None else F.adaptive_max_pool2d(pixels.float()[:, None], grid)[:, 0] > 0
    )


@dataclass(frozen=True, kw_only=True)
class ContextPixels(ContextInputs):
    """An answer for each pixel: logits (K, C, H, W), all boxes are targets, hidden or not.

    The score of a class is the sum of its sigmoids over the hidden region (BlindNet); scores
    divided by their sum serve as the posterior.

    Args:
        hidden_weight: Weight of the hidden region against the rest.
    """

    hidden_weight: float = 5.0

    def outputs_per_region(self, size: int) -> int:
        """A score of each class at each pixel."""
        return self.num_classes * size**2

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`masked_bce` over the picture's pixels, padding and inputs without labels left out."""
        rows = image_rows(batch)
        told = hidden_labels(batch) >= 0
        height, width = batch["images"].shape[-2:]
        maps = label_maps(batch, self.num_classes, (height, width))
        loss = masked_bce(
            output["logits"],
            maps[rows],
            self.regions(batch),
            valid=picture_pixels(batch)[rows] & told[:, None, None],
            hidden_weight=self.hidden_weight,
        )
        # An input without labels added 0 to the mean over all; the mean over the others is wanted.
        return {"masked_bce": Mean(loss * (len(told) / told.sum().clamp(min=1)), "labelled")}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Log of the region scores divided by their sum, (K, C)."""
        regions = self.regions(batch).float()
        scores = torch.einsum("kchw,khw->kc", output["logits"].float().sigmoid(), regions)
        scores = scores.clamp(min=1e-6)
        return (scores / scores.sum(dim=1, keepdim=True)).log()


@dataclass(frozen=True, kw_only=True)
class ContextMap(ContextInputs):
    """Which class covers each pixel: logits (K, 1 + C, H, W), background first, cross-entropy.

    BlindNet's pixel-wise ResNet-18. Targets are the batch's `class_maps` (`kd.formats.class_maps`),
    hidden object included. The posterior of the hidden object: the softmax with background left
    out, summed over the hidden region and divided by its sum.

    Args:
        hidden_weight: Weight of the hidden region's mean against that of the rest.
        class_weights: Power of the classes' weights, `median_frequency` of their shares of the
            train pixels, background among them; 0 = none.
        pixel_shares: Those shares, 1 + C of them; needed for the loss where there are weights.
    """

    hidden_weight: float = 5.0
    class_weights: float = 0.0
    pixel_shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the power.

        Raises:
            UserError: It is out of range.
        """
        if not 0 <= self.class_weights <= 1:
            raise UserError(f"class_weights must be in 0..1, got {self.class_weights}")

    def outputs_per_region(self, size: int) -> int:
        """A score of each class, and of the background, at each pixel."""
        return (1 + self.num_classes) * size**2

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`pixel_cross_entropy` over the picture's pixels; padding and withheld labels left out."""
        rows = image_rows(batch)
        told = hidden_labels(batch) >= 0
        logits, weights = output["logits"], None
        if self.class_weights:
            assert self.pixel_shares is not None
            numbers = median_frequency(self.pixel_shares, power=self.class_weights)
            weights = logits.new_tensor(numbers, dtype=torch.float32)
        loss = masked_cross_entropy(
            logits,
            batch["class_maps"][rows].long(),
            self.regions(batch),
            valid=picture_pixels(batch)[rows] & told[:, None, None],
            class_weights=weights,
            hidden_weight=self.hidden_weight,
        )
        # As for `ContextPixels`: inputs without labels added 0.
        scale = len(told) / told.sum().clamp(min=1)
        return {"pixel_cross_entropy": Mean(loss * scale, "labelled")}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Log-probabilities (K, C)."""
        regions = self.regions(batch).float()
        shares = output["logits"].float().softmax(dim=1)[:, 1:]
        scores = torch.einsum("kchw,khw->kc", shares, regions).clamp(min=1e-6)
        return (scores / scores.sum(dim=1, keepdim=True)).log()


@dataclass(frozen=True, kw_only=True)
class ContextScene(ContextInputs):
    """Which classes the scene holds, the hidden object's among them: logits (K, C), BCE.

    BlindNet's multi-label ResNet-18. It answers a coarser question than the other teachers: a
    class that is seen elsewhere in the picture is in the scene for sure, whatever is hidden. The
    posterior of the hidden object is read as the classes' probabilities divided by their sum; it is
    right about the classes that are not in sight and says too much of those that are.

    Args:
        class_weights: Power of the weight of a class's presence, `positive_weights` of its share of
            the train pictures; 0 = none.
        image_shares: Those shares, C of them; needed for the loss where there are weights.
    """

    class_weights: float = 0.0
    image_shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the power.

        Raises:
            UserError: It is out of range.
        """
        if not 0 <= self.class_weights <= 1:
            raise UserError(f"class_weights must be in 0..1, got {self.class_weights}")

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`multilabel_bce` of the inputs whose labels are known."""
        logits, weights = output["logits"], None
        if self.class_weights:
            assert self.image_shares is not None
            numbers = positive_weights(self.image_shares, power=self.class_weights)
            weights = logits.new_tensor(numbers, dtype=torch.float32)
        shown, _ = present_classes(batch, self.num_classes)
        targets = shown[image_rows(batch)]
        known = hidden_labels(batch) >= 0
        loss = multilabel_bce(logits, targets, known=known, pos_weight=weights)
        return {"multilabel_bce": Mean(loss, "labelled")}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Log of the probabilities divided by their sum, (K, C)."""
        scores = output["logits"].float().sigmoid().clamp(min=1e-6)
        return (scores / scores.sum(dim=1, keepdim=True)).log()
