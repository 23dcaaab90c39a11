"""The saliency task: predict the density of fixations over the pixels of an image."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import UserError
from kd.losses.saliency import EPS, saliency_kld
from kd.problems.base import Batch, Classes, Evaluator, Mask, Mean, Output, Task, full_count
from kd.problems.saliency.data import SaliencyDataset
from kd.problems.saliency.metric import SaliencyMaps
from kd.problems.segmentation.task import on_grid
from kd.transforms.hide import normalise

SALIENCY = "saliency"  # name of the output map of logits
SECOND_MAP = "teacher_saliency"  # a student's second output map, which imitates the teacher's


@dataclass(frozen=True, kw_only=True)
class Saliency(Task):
    """Predict the density of fixations, trained with the KL divergence from the true density.

    Args:
        published: Compute the density as in the published method: sigmoids divided by their sum,
            instead of a softmax over pixels.
    """

    outputs: ClassVar[Collection[str]] = (SALIENCY, SECOND_MAP)
    mask_names: ClassVar[Collection[str]] = ("valid",)

    published: bool = False

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Normalised images (N, 3, H, W); the padding is 0, which is the mean colour."""
        images = normalise(batch["images"])
        frame = (images.shape[2], images.shape[3])
        return (images * within(batch, frame)[:, None],)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`kld`: KL divergence from the true density, inside the images, averaged over images."""
        density = batch["density"]
        grid = (density.shape[2], density.shape[3])
        logits = on_grid(output[SALIENCY], grid).float()
        value = saliency_kld(logits, density, within(batch, grid), published=self.published)
        return {"kld": Mean(value, "images")}

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """`valid`, (N, h, w) bool: cells inside the images, not in the padding."""
        return {"valid": lambda grid: within(batch, grid)}

    def counts(
        self, batch: Batch, units: Collection[str] = (), masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        """Count images and their pixels, without padding."""
        images = full_count(batch, "images")
        pixels = batch["sizes"].prod(1).sum().float()
        return {"images": images, "valid_images": images, "pixels": pixels}

    def place_unit(self, mask: str, grid: tuple[int, int], batch: Batch) -> str:
        return "pixels" if mask == "valid" else "images"

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Densities at the size of the image files, (N, 1, H, W) float32.

        Expects evaluation samples: no padding, and files of equal size within a batch.
        """
        height, width = batch["own_sizes"][0].tolist()
        # Converted, because probabilities of large maps are too small for half precision.
        logits = on_grid(output[SALIENCY].float(), (height, width))
        return density_of(logits, published=self.published)

    def metric(self, classes: Classes) -> Evaluator:
        if classes.truth is None:
            raise UserError(
                f"{classes.where}: the dataset has no fixations to evaluate predictions on"
            )
        data: SaliencyDataset = classes.truth()
        return SaliencyMaps(data.truth, where=classes.where, references=lambda: data.references)


def within(batch: Batch, grid: tuple[int, int]) -> Tensor:
    """Mask the cells of a grid over the padded frame that are inside the image, (N, h, w) bool."""
    frame, sizes = batch["images"].shape[2:], batch["sizes"]
    inside = []
    for axis in (0, 1):
        middles = torch.arange(grid[axis], device=sizes.device) + 0.5
        inside.append(middles * (frame[axis] / grid[axis]) < sizes[:, axis, None])  # (N, places)
    return inside[0][:, :, None] & inside[1][:, None, :]


def density_of(logits: Tensor, *, published: bool = False) -> Tensor:
    """Normalise maps of logits (N, 1, H, W) to densities; see `Saliency` for `published`."""
    if published:
        values = logits.sigmoid()
        return values / (EPS + values.sum(dim=(2, 3), keepdim=True))
    flat: Tensor = F.softmax(logits.flatten(1), dim=1)
    return flat.view_as(logits)
