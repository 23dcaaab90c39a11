"""Classifiers of objects in their scenes, with an appearance head and a context head on any trunk.

The heads form a product of experts: `log p(class | object, scene)` is the log-probability of the
appearance head plus `strength` times the context head's log ratio of posterior to prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError, at_least
from kd.nn.multi_stride_trunk import LevelledTrunk, levelled
from kd.nn.regions import (
    Surroundings,
    crop_regions,
    image_extents,
    log_prior,
    roi_features,
    standardised,
)
from kd.nn.trunk import build_trunk
from kd.nn.trunk_base import Trunk


class ContextHead(nn.Module):
    """Head that predicts the class of an object from features around it, not inside its box."""

    def __init__(
        self, around: Surroundings, log_prior: Tensor, *, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.around = around
        layers: list[nn.Module] = [nn.Dropout(dropout)]
        if hidden:
            layers += [nn.Linear(around.width, hidden), nn.ReLU(), nn.Dropout(dropout)]
        last = nn.Linear(hidden or around.width, len(log_prior))
        # The initial output is the prior, which leaves the appearance head's output unchanged.
        nn.init.normal_(last.weight, std=1e-3)
        with torch.no_grad():
            last.bias.copy_(log_prior)
        self.layers = nn.Sequential(*layers, last)

    def forward(
        self, maps: Sequence[Tensor], boxes: Tensor, image_of: Tensor, extents: Tensor
    ) -> Tensor:
        """Compute class logits (M, C) of objects; for the arguments see `Surroundings.forward`."""
        logits: Tensor = self.layers(self.around(maps, boxes, image_of, extents))
        return logits


class SceneClassifier(nn.Module):
    """A student classifier; `context` is None without a context head.

    The layer path of the scene's features is `trunk.trunk`, or with more than one level that of a
    step, such as `trunk.trunk.layer3`. With `view: crop` the trunk runs first on the crops and then
    on the scene.
    """

    log_prior: Tensor

    def __init__(
        self,
        trunk: LevelledTrunk,
        log_prior: Tensor,
        around: Surroundings | None,
        *,
        strength: float,
        learn_strength: bool,
        crop_size: int | None,
        margin: float,
        region_size: int,
        dropout: float,
        hidden: int,
        upscale: int,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.crop_size, self.margin, self.region_size = crop_size, margin, region_size
        self.upscale = upscale
        seen = trunk.level_channels[-1] * (1 if crop_size else region_size) ** 2
        self.seen = nn.BatchNorm1d(seen, affine=False)
        self.appearance = nn.Sequential(nn.Dropout(dropout), nn.Linear(seen, len(log_prior)))
        self.register_buffer("log_prior", log_prior)
        value = torch.tensor(float(strength))
        if learn_strength:
            self.strength = nn.Parameter(value)
        else:
            self.register_buffer("strength", value)
        # The context head is built last, so that with the same seed all other weights are the same
        # as without a context head.
        self.context = None
        if around is not None:
            self.context = ContextHead(around, log_prior, hidden=hidden, dropout=dropout)

    def forward(self, images: Tensor, rois: Tensor) -> dict[str, Tensor]:
        """Classify objects in their scenes.

        Args:
            images: Normalised images, (N, 3, H, W).
            rois: (M, 5) as (image, x1, y1, x2, y2), pixels of the images.

        Returns:
            `logits` (M, C), `appearance` (M, C) and, with a context head, `context` (M, C).
        """
        if self.upscale > 1:
            images = F.interpolate(images, scale_factor=self.upscale, mode="bilinear")
            rois = torch.cat([rois[:, :1], rois[:, 1:] * self.upscale], dim=1)
        seen = self._crops(images, rois) if self.crop_size else None
        maps: list[Tensor] = []
        if seen is None or self.context is not None:
            maps = self.trunk(images)  # (N, C, h, w) each
        if seen is None:
            stride = self.trunk.level_strides[-1]
            seen = roi_features(maps[-1], rois, stride, output_size=self.region_size).flatten(1)
        appearance = self.appearance(standardised(self.seen, seen) / seen.shape[1] ** 0.5)
        if self.context is None:
            return {"logits": _log_softmax(appearance), "appearance": appearance}
        extents = image_extents(images)
        context = self.context(maps, rois[:, 1:], rois[:, 0].long(), extents)
        moved = _log_softmax(context) - self.log_prior
        logits = _log_softmax(appearance) + self.strength * moved
        return {"logits": logits, "appearance": appearance, "context": context}

    def _crops(self, images: Tensor, rois: Tensor) -> Tensor:
        """Compute the mean features of each object's crop, (M, C)."""
        assert self.crop_size is not None
        if self.training and not rois.shape[0]:  # the batch norm of an empty batch is NaN
            return images.new_zeros(0, self.trunk.level_channels[-1])
        crops = crop_regions(images, rois, self.crop_size, margin=self.margin)
        pooled: Tensor = self.trunk(crops)[-1].mean(dim=(2, 3))
        return pooled


def build_student(
    name: str,
    trunk: Trunk | None = None,
    *,
    num_classes: int,
    prior: Sequence[float] | Tensor | None = None,
    weights: str | None = None,
    context: bool = True,
    strength: float = 1.0,
    learn_strength: bool = False,
    view: Literal["region", "crop"] = "region",
    crop_size: int = 96,
    margin: float = 0.25,
    region_size: int = 2,
    levels: int = 1,
    ring_margin: float = 1.0,
    min_ring: float = 0.0,
    dropout: float = 0.0,
    hidden: int = 0,
    frozen: str | None = None,
    batch_norm_frozen: bool = False,
    remember: bool = False,
    stride: int | None = None,
    upscale: int = 1,
) -> SceneClassifier:
    """Build a classifier of objects on any trunk.

    Args:
        name: Name of the trunk, see `kd.nn.trunk.build_trunk`.
        trunk: Trunk of a teacher, from which the student starts; `name`, `weights` and `stride` are
            then ignored.
        num_classes: Number of classes, C.
        prior: Probability of each class, for the product of experts; uniform by default.
        weights: Weights of the trunk: "imagenet", a file, the folder of a run whose model contains
            this trunk, or null for random weights.
        context: Whether to add a context head.
        strength: Weight of the context head in the product of experts.
        learn_strength: Whether to train `strength`.
        view: Input of the appearance head: a `region` of the scene's features, in one pass of the
            trunk, or the features of a `crop` of the image, in a second pass.
        crop_size: Side to which a crop is resized, pixels.
        margin: Width added on all four sides of a crop, as a fraction of the box's longer side.
        region_size: Side of the grid to which a region is pooled.
        levels: Number of strides of the trunk that are inputs of the context head, counted from the
            coarsest.
        ring_margin: Thickness of the ring that is pooled for the context head, as a fraction of the
            box's width and height.
        min_ring: Smallest thickness of the ring, pixels.
        dropout: Dropout probability before each layer of the heads.
        hidden: Width of a hidden layer in the context head; 0 for a linear head.
        frozen: "all", or the path of the last step of the trunk to freeze.
        batch_norm_frozen: Whether to freeze all batch norms of the trunk.
        remember: Whether to cache the outputs of a frozen trunk in memory, for images without
            augmentation.
        stride: Largest stride of the trunk's output, see `kd.nn.trunk.build_trunk`.
        upscale: Factor by which images are enlarged first, for finer feature maps of small images.

    Raises:
        UserError: An option is out of range, or the trunk cannot be built.
    """
    at_least(
        f"student {name}", crop_size=(crop_size, 16), region_size=(region_size, 1),
        hidden=(hidden, 0), upscale=(upscale, 1), margin=(margin, 0), min_ring=(min_ring, 0),
    )  # fmt: skip
    if view not in ("region", "crop"):
        raise UserError(f"student {name}: view must be 'region' or 'crop', got {view!r}")
    if not 0 <= dropout < 1 or ring_margin <= 0:
        raise UserError(
            f"student {name}: dropout must be in [0, 1) and ring_margin above 0, got {dropout} "
            f"and {ring_margin}"
        )
    known = log_prior(f"student {name}", num_classes, prior)
    features = levelled(
        build_trunk(name, weights=weights, stride=stride) if trunk is None else trunk,
        levels=levels, frozen=frozen, batch_norm_frozen=batch_norm_frozen, remember=remember,
    )  # fmt: skip
    around = Surroundings(
        features.level_channels, features.level_strides, margins=(ring_margin,), min_ring=min_ring
    )
    return SceneClassifier(
        features, known, around if context else None, strength=strength,
        learn_strength=learn_strength, crop_size=crop_size if view == "crop" else None,
        margin=margin, region_size=region_size, dropout=dropout, hidden=hidden, upscale=upscale,
    )  # fmt: skip


def _log_softmax(logits: Tensor) -> Tensor:
    """Compute the log-softmax in float32, or float64 for such logits, also under autocast."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return F.log_softmax(logits, dim=1, dtype=dtype)
