"""Segmentation by pyramid pooling on any torchvision trunk.

PSPNet (Zhao et al., 2017, https://arxiv.org/abs/1612.01105) as structured distillation has it
(Liu et al., 2019, https://arxiv.org/abs/1903.04197): the width of the head is a quarter of the
trunk's channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from kd.errors import UserError
from kd.nn.trunk import build_trunk
from kd.nn.trunk_base import Trunk
from kd.nn.weights import imagenet_weights, load_network, load_trunk_weights
from kd.registry import look_up


def block(inputs: int, outputs: int, side: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU; the grid stays."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class PyramidPooling(nn.Module):
    """Means over grids of a few sizes beside the map itself, joined.

    With a grid of one place, a batch of training needs two pictures: batch norm cannot learn from
    one value.

    Args:
        channels: Of the map.
        width: Of the result.
        bins: Sides of the grids.
        dropout: Of whole channels of the result.
    """

    def __init__(self, channels: int, width: int, *, bins: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), *block(channels, width)) for side in bins
        )
        self.join = block(channels + len(bins) * width, width, 3)
        self.drop = nn.Dropout2d(dropout)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, channels, h, w) to (N, width, h, w)."""
        size = maps.shape[2:]
        pooled = [
            F.interpolate(stage(maps), size, mode="bilinear", align_corners=False)
            for stage in self.stages
        ]
        joined: Tensor = self.drop(self.join(torch.cat([maps, *pooled], dim=1)))
        return joined


class PSPNet(nn.Module):
    """A trunk, pyramid pooling, a classifier; another classifier on an earlier map in training.

    Attributes:
        stride: Pixels a place of the logits.
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
        """Normalised images (N, 3, H, W) to logits.

        Returns:
            `logits` (N, C, H/stride, W/stride); in training `auxiliary` too, on its step's grid.
        """
        if not self.training or self.auxiliary is None:
            return {"logits": self.classifier(self.pyramid(self.trunk(images)))}
        earlier, maps = self.trunk.forward_at(images, (self.tap, self.last))
        logits = self.classifier(self.pyramid(maps))
        return {"logits": logits, "auxiliary": self.auxiliary(earlier)}


def pspnet(
    num_classes: int,
    *,
    trunk: str = "resnet18",
    weights: str | None = None,
    stride: int = 8,
    width: float = 1.0,
    until: str | None = None,
    head: int | None = None,
    bins: Sequence[int] = (1, 2, 3, 6),
    dropout: float = 0.1,
    auxiliary: bool = True,
    file: str | None = None,
) -> PSPNet:
    """Pyramid pooling on any torchvision trunk.

    Args:
        num_classes: C.
        trunk: Name of the torchvision classifier: resnet101 (70 M parameters), resnet18 (13 M),
            mobilenet_v2, ...
        weights: Of the trunk: "imagenet", a file, or random ones.
        stride: Pixels a place of the trunk's output; later steps are dilated.
        width: Share of the trunk's channels, for a smaller one from random weights.
        until: Path of the trunk's last step that is kept; of mobilenet_v2 "features.17" leaves out
            the widening to 1,280 channels, which is there for its classifier.
        head: Channels of the pyramid's and the auxiliary head's maps; a quarter of the trunk's by
            default.
        bins: Sides of the pooled grids.
        dropout: Of whole channels, before both classifiers.
        auxiliary: Whether a second classifier learns on an earlier map.
        file: Weights of the whole network, see `kd.nn.weights.load_network`; those of the trunk
            alone are then left aside.

    Raises:
        UserError: An option out of range, a trunk that cannot be built, or a file that does not
            fit.
    """
    if not bins or min(bins) < 1:
        raise UserError(f"pspnet: bins must be 1 or more each, got {list(bins)}")
    if not 0 <= dropout < 1:
        raise UserError(f"pspnet: dropout must be in [0, 1), got {dropout}")
    if head is not None and head < 1:
        raise UserError(f"pspnet: head must be 1 or more, got {head}")
    seen = build_trunk(
        trunk, weights=weights if file is None else None, stride=stride, dilate=True, width=width,
        until=until,
    )  # fmt: skip
    network = PSPNet(seen, num_classes, bins=bins, dropout=dropout, auxiliary=auxiliary, head=head)
    load_network(network, file, what=f"pspnet on {trunk}")
    return network


NAMES = tuple(models.list_models(module=models.segmentation))
# LR-ASPP's classifier works on the finer one of its two maps; the others' on the trunk's last.
STRIDES = {"deeplabv3_mobilenet_v3_large": 16}


class PublishedNet(nn.Module):
    """One of torchvision's networks without its last step, which up-samples to the picture's size.

    Children keep torchvision's names, so that files of its weights load.

    Attributes:
        stride: Pixels a place of the logits.
    """

    def __init__(self, network: nn.Module, *, stride: int) -> None:
        super().__init__()
        parts = dict(network.named_children())
        self.stride = stride
        self.backbone, self.classifier = parts["backbone"], parts["classifier"]
        self.aux_classifier = parts.get("aux_classifier")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (N, 3, H, W) to logits.

        Returns:
            `logits` (N, C, H/stride, W/stride); in training `auxiliary` (N, C, h, w) too, where it
            was asked for. Its grid is that of its step: finer on the MobileNet, else the same.
        """
        maps = self.backbone(images)
        # LR-ASPP's classifier takes both of its maps.
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
    """A segmentation network of torchvision's.

    In training, DeepLab needs two pictures a batch: its pyramid has a grid of one place.

    Args:
        num_classes: C.
        name: deeplabv3_*, fcn_* or lraspp_*, see `NAMES`.
        weights: Of the backbone: "imagenet" for torchvision's own, downloaded into torch's hub
            cache; a file of them; or random ones.
        auxiliary: Whether a second classifier learns on an earlier map; LR-ASPP has none.
        file: Weights of the whole network, see `kd.nn.weights.load_network`; those of the backbone
            alone are then left aside.

    Raises:
        UserError: Unknown name, no auxiliary classifier to be had, or weights that cannot be had or
            do not fit.
    """
    look_up(dict.fromkeys(NAMES), name, what="torchvision segmentation network")
    options: dict[str, Any] = {"aux_loss": auxiliary}
    if name.startswith("lraspp"):
        if auxiliary:
            raise UserError(f"{name} has no auxiliary classifier; leave out auxiliary")
        options = {}
    network = PublishedNet(
        models.get_model(
            name, weights=None, weights_backbone=None, num_classes=num_classes, **options
        ),
        stride=STRIDES.get(name, 8),
    )
    if file is not None:
        load_network(network, file, what=name)
    elif weights is not None:
        _load_backbone(network, name.partition("_")[2], weights)
    return network


def _load_backbone(network: PublishedNet, trunk: str, weights: str) -> None:
    """Weights of the torchvision classifier `trunk` into the backbone."""
    given: Path | dict[str, Any] = Path(weights)
    source = weights
    if weights == "imagenet":
        given = imagenet_weights(trunk)
        source = f"torchvision's weights of {trunk}"
    load_trunk_weights(network.backbone, given, source=source, what=f"the backbone {trunk}")
