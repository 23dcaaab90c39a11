"""Context teachers by name; each maps (K, 4, H, W) to logits and says in `task` which task fits."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from teachers.cnn import cnn
from teachers.resnet_multilabel import resnet_multilabel
from teachers.resnet_pixel import resnet_pixel
from teachers.trunk import trunk
from teachers.unet import unet
from teachers.unet_ffc import unet_ffc

TEACHERS: dict[str, Callable[..., nn.Module]] = {
    "unet": unet,
    "unet_ffc": unet_ffc,
    "cnn": cnn,
    "trunk": trunk,
    "resnet_pixel": resnet_pixel,
    "resnet_multilabel": resnet_multilabel,
}
