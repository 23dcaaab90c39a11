"""torchvision's segmentation networks by name, on their own grids.

DeepLab v3 (Chen et al., 2017, https://arxiv.org/abs/1706.05587), LR-ASPP (Howard et al., 2019,
https://arxiv.org/abs/1905.02244), FCN (Long et al., 2015, https://arxiv.org/abs/1411.4038).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision import models

from kd.catalog import look_up
from kd.errors import UserError
from kd.nn.imagenet import imagenet_weights
from kd.nn.weights import load_network, load_trunk_weights

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


# Every one of them by its own name.
PUBLISHED = {name: partial(torchvision_net, name=name) for name in NAMES}
