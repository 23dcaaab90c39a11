"""Segmentation networks: PSPNet on any trunk, torchvision's networks, and multi-scale averages.

PSPNet (Zhao et al., 2017, https://arxiv.org/abs/1612.01105) is built as in structured distillation
(Liu et al., 2019, https://arxiv.org/abs/1903.04197): its head has a quarter of the trunk's
channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from kd.errors import UserError
from kd.nn.trunk import NetworkOptions
from kd.nn.trunk_base import Trunk, resized
from kd.nn.weights import load_network, load_trunk_weights
from kd.registry import look_up, with_options


def block(inputs: int, outputs: int, side: int = 1) -> nn.Sequential:
    """Build a block of a convolution with stride 1, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class GridMean(nn.AdaptiveAvgPool2d):
    """Average pooling to a grid that, in exported graphs, stays valid for images of any size."""

    def __init__(self, side: int) -> None:
        super().__init__(side)
        self.side = side

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, C, h, w) to (N, C, side, side)."""
        if not torch.compiler.is_exporting():
            return super().forward(maps)
        down, across = (_cell_means(self.side, maps, dim) for dim in (2, 3))
        return torch.einsum("nchw,ih,jw->ncij", maps, down, across)


def _cell_means(side: int, maps: Tensor, dim: int) -> Tensor:
    """Compute the weights (side, L) of adaptive average pooling over a dimension of length L."""
    length = maps.shape[dim]
    cell, place = (torch.arange(count, device=maps.device) for count in (side, length))
    first = cell * length // side
    last = -(-(cell + 1) * length // side)  # rounded up
    inside = (place >= first[:, None]) & (place < last[:, None])
    return inside.to(maps.dtype) / (last - first)[:, None].to(maps.dtype)


class PyramidPooling(nn.Module):
    """Average pooling to several coarse grids, concatenated with the input and reduced.

    `bins` are the numbers of cells along each side of these grids. With a grid of one cell,
    training needs at least two images per batch because of batch norm.
    """

    def __init__(self, channels: int, width: int, *, bins: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(GridMean(side), *block(channels, width)) for side in bins
        )
        self.join = block(channels + len(bins) * width, width, 3)
        self.drop = nn.Dropout2d(dropout)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, channels, h, w) to (N, width, h, w)."""
        size = maps.shape[2:]
        pooled = [resized(stage(maps), size) for stage in self.stages]
        joined: Tensor = self.drop(self.join(torch.cat([maps, *pooled], dim=1)))
        return joined


class PSPNet(nn.Module):
    """Trunk, pyramid pooling, classifier and optional auxiliary classifier on an earlier map.

    `stride` is the number of pixels per cell of the logits.
    """

    def __init__(
        self,
        trunk: Trunk,
        num_classes: int,
        *,
        bins: Sequence[int],
        dropout: float,
        auxiliary: bool,
        head: int | None = None,
    ) -> None:
        super().__init__()
        self.trunk, self.stride = trunk, trunk.stride
        width = head or max(1, trunk.channels // 4)
        self.pyramid = PyramidPooling(trunk.channels, width, bins=bins, dropout=dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.auxiliary: nn.Module | None = None
        self.tap = ""
        if auxiliary:
            self.tap, before = trunk.middle()
            self.last = trunk.last_step(trunk.stride)
            self.auxiliary = nn.Sequential(
                block(before, width, 3), nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1)
            )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalised images (N, 3, H, W) to `logits` (N, C, H/stride, W/stride).

        In training with an auxiliary classifier, also return its logits `auxiliary` (N, C, h, w),
        on the grid of the earlier map.
        """
        if not self.training or self.auxiliary is None:
            return {"logits": self.classifier(self.pyramid(self.trunk(images)))}
        earlier, maps = self.trunk.forward_at(images, (self.tap, self.last))
        logits = self.classifier(self.pyramid(maps))
        return {"logits": logits, "auxiliary": self.auxiliary(earlier)}


@dataclass(frozen=True, kw_only=True)
class PSPNetOptions(NetworkOptions):
    """Options of `pspnet`.

    Attributes:
        stride: Pixels per cell of the trunk's output. The convolutions of later steps are dilated
            instead of strided.
        head: Channels of the maps in pyramid pooling and in the auxiliary classifier; by default a
            quarter of the trunk's channels.
        bins: Number of cells along each side of the pooled grids.
        dropout: Probability of dropping a channel before each classifier.
        auxiliary: Whether to train an auxiliary classifier on an earlier map.
    """

    stride: int = 8
    head: int | None = None
    bins: Sequence[int] = (1, 2, 3, 6)
    dropout: float = 0.1
    auxiliary: bool = True


@with_options(PSPNetOptions)
def pspnet(num_classes: int, options: PSPNetOptions) -> PSPNet:
    """Build PSPNet on any trunk: 70 M parameters on resnet101, 13 M on resnet18."""
    bins, dropout, head = options.bins, options.dropout, options.head
    if not bins or min(bins) < 1:
        raise UserError(f"pspnet: bins must be 1 or more each, got {list(bins)}")
    if not 0 <= dropout < 1:
        raise UserError(f"pspnet: dropout must be in [0, 1), got {dropout}")
    if head is not None and head < 1:
        raise UserError(f"pspnet: head must be 1 or more, got {head}")
    trunk = options.build(stride=options.stride, dilate=True)
    network = PSPNet(
        trunk, num_classes, bins=bins, dropout=dropout, auxiliary=options.auxiliary, head=head
    )
    load_network(network, options.file, what=f"pspnet on {options.trunk}")
    return network


NAMES = tuple(models.list_models(module=models.segmentation))
# Strides of the logits, for networks where it is not 8.
STRIDES = {"deeplabv3_mobilenet_v3_large": 16}


class PublishedNet(nn.Module):
    """A torchvision segmentation network without the final up-sampling to the image's size.

    The children are named as in torchvision, so that its weight files can be loaded. `stride` is
    the number of pixels per cell of the logits.
    """

    def __init__(self, network: nn.Module, *, stride: int) -> None:
        super().__init__()
        parts = dict(network.named_children())
        self.stride = stride
        self.backbone, self.classifier = parts["backbone"], parts["classifier"]
        self.aux_classifier = parts.get("aux_classifier")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalised images (N, 3, H, W) to `logits` (N, C, H/stride, W/stride).

        In training with an auxiliary classifier, also return its logits `auxiliary` (N, C, h, w).
        Their grid is the same, except for MobileNet, where it is finer.
        """
        maps = self.backbone(images)
        # LR-ASPP's classifier takes the dict of both maps, which has no "out".
        output = {"logits": self.classifier(maps.get("out", maps))}
        if self.training and self.aux_classifier is not None:
            output["auxiliary"] = self.aux_classifier(maps["aux"])
        return output


def torchvision_net(
    num_classes: int,
    *,
    name: str = "deeplabv3_mobilenet_v3_large",
    weights: str | None = None,
    auxiliary: bool = False,
    file: str | None = None,
) -> PublishedNet:
    """Build a torchvision segmentation network; DeepLab trains on 2 or more images per batch.

    Args:
        num_classes: Number of classes, C.
        name: deeplabv3_*, fcn_* or lraspp_*, see `NAMES`.
        weights: Weights of the backbone: "imagenet" to download torchvision's, a file with weights
            of the same backbone, or None for random weights.
        auxiliary: Whether to train an auxiliary classifier on an earlier map; not for LR-ASPP.
        file: File with weights of the whole network, see `kd.nn.weights.load_network`. `weights` is
            then ignored.

    Raises:
        UserError: The name is unknown, an auxiliary classifier is requested for LR-ASPP, or the
            weights cannot be downloaded or do not fit.
    """
    look_up(dict.fromkeys(NAMES), name, what="torchvision segmentation network")
    options: dict[str, Any] = {"aux_loss": auxiliary}
    if name.startswith("lraspp"):
        if auxiliary:
            raise UserError(f"{name} has no auxiliary classifier; leave out auxiliary")
        options = {}
    inner = models.get_model(
        name, weights=None, weights_backbone=None, num_classes=num_classes, **options
    )
    network = PublishedNet(inner, stride=STRIDES.get(name, 8))
    if file is not None:
        load_network(network, file, what=name)
    elif weights is not None:
        trunk = name.partition("_")[2]
        load_trunk_weights(network.backbone, weights, trunk, what=f"the backbone {trunk}")
    return network


MULTIPLE = 16  # height and width of rescaled images are rounded to multiples of this, pixels


class MultiScale(nn.Module):
    """Average a network's class probabilities over rescaled and mirrored copies of the images.

    Args:
        model: Network that maps images (N, 3, H, W) to logits (N, C, h, w), or to a dict with
            `logits`.
        scales: Different factors for height and width. Rescaled sides are rounded to multiples of
            16 pixels.
        mirror: Whether to evaluate each scale on the mirrored images, too.
    """

    def __init__(
        self, model: nn.Module, scales: Sequence[float] = (1.0,), *, mirror: bool = False
    ) -> None:
        super().__init__()
        if not scales or len(set(scales)) != len(scales):
            raise UserError(f"scales must be one or more different numbers, got {list(scales)}")
        if wrong := [scale for scale in scales if not 0 < scale < float("inf")]:
            raise UserError(f"scales must be above 0, got {wrong[0]}")
        self.model, self.mirror = model, mirror
        # The scale nearest to 1 comes first, because it determines the grid of the output.
        self.scales = tuple(sorted(scales, key=lambda scale: abs(scale - 1)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images (N, 3, H, W) to `logits` (N, C, h, w), the log of the mean probabilities.

        The grid is the one that the network's output has at scale 1.
        """
        total: Tensor | None = None
        grid: tuple[int, int] | None = None
        for scale in self.scales:
            seen = resized(images, _sides(images, scale))
            logits = self._logits(seen)
            grid = grid or _grid(images, seen, logits)
            both = [logits]
            if self.mirror:
                both.append(self._logits(seen.flip(-1)).flip(-1))
            for one in both:
                probabilities = resized(one, grid).float().softmax(dim=1)
                total = probabilities if total is None else total + probabilities
        assert total is not None
        mean = total / (len(self.scales) * (1 + self.mirror))
        return {"logits": mean.clamp(min=torch.finfo(mean.dtype).tiny).log()}

    def _logits(self, images: Tensor) -> Tensor:
        output: Tensor | Mapping[str, Tensor] = self.model(images)
        return output if isinstance(output, Tensor) else output["logits"]


def _sides(images: Tensor, scale: float) -> tuple[int, int]:
    """Compute height and width of rescaled images; at scale 1 they are not rounded."""
    height, width = images.shape[-2:]
    if scale == 1:
        return height, width
    sides = (max(MULTIPLE, round(scale * side / MULTIPLE) * MULTIPLE) for side in (height, width))
    return next(sides), next(sides)


def _grid(images: Tensor, seen: Tensor, logits: Tensor) -> tuple[int, int]:
    """Infer the logits' height and width at scale 1 from those of the rescaled images `seen`."""
    own, scaled, out = (part.shape[-2:] for part in (images, seen, logits))
    height, width = (max(1, round(own[side] * out[side] / scaled[side])) for side in (0, 1))
    return height, width
