"""Context tasks: what class is the object that was hidden?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.data.hide import Shape, class_maps, hide, normalise, regions_of, valid_pixels
from kd.losses.supervised import cross_entropy_labelled, masked_bce
from kd.tasks.base import (
    Batch,
    Classes,
    Mask,
    Mean,
    Metric,
    Output,
    about_objects,
    hidden_labels,
    image_rows,
    ring_mask,
    top_n,
)


@dataclass(frozen=True, kw_only=True)
class ContextInputs:
    """What the context tasks share: the input with one object hidden in each.

    Args:
        num_classes: C.
        shape: Shape of the hidden region; `segment` reads the batch's exact masks.
    """

    num_classes: int
    shape: Shape = "box"

    def regions(self, batch: Batch) -> Tensor:
        """Hidden pixels, bool (K, H, W)."""
        return regions_of(batch, shape=self.shape)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Normalised RGB with the region at 0, and the region: (K, 4, H, W).

        Where a batch is not about objects nothing is hidden: (N, 4, H, W).
        """
        images = normalise(batch["images"])
        if not about_objects(batch):
            return (F.pad(images, (0, 0, 0, 0, 0, 1)),)
        return (hide(images, image_rows(batch), self.regions(batch)),)

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """`ring`: the surroundings of the hidden object."""
        return {"ring": ring_mask(batch)}

    def metric(self, classes: Classes) -> Metric:
        """Top-n accuracy and its company."""
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
        batch: As in docs/design.md.
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
