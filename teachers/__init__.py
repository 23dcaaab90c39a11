"""Teachers by name: of the context of objects, for segmentation, detectors, and for saliency.

A context teacher says in `task` which task fits its input and output.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from kd.nn.detectors import DETECTORS
from kd.nn.segmentation import SEGMENTERS
from teachers.cnn import cnn
from teachers.cooccurrence import cooccurrence, prior
from teachers.msinet import msinet
from teachers.resnet_multilabel import resnet_multilabel
from teachers.resnet_pixel import resnet_pixel
from teachers.scene_transformer import scene_transformer
from teachers.trunk import trunk
from teachers.unet import unet
from teachers.unet_ffc import unet_ffc

CONTEXT_TEACHERS: dict[str, Callable[..., nn.Module]] = {
    "unet": unet,
    "unet_ffc": unet_ffc,
    "cnn": cnn,
    "trunk": trunk,
    "scene_transformer": scene_transformer,
    "cooccurrence": cooccurrence,
    "prior": prior,
    "resnet_pixel": resnet_pixel,
    "resnet_multilabel": resnet_multilabel,
}
# These have no classes.
SALIENCY_TEACHERS: dict[str, Callable[..., nn.Module]] = {"msinet": msinet}
TEACHERS: dict[str, Callable[..., nn.Module]] = (
    CONTEXT_TEACHERS | SEGMENTERS | DETECTORS | SALIENCY_TEACHERS
)
