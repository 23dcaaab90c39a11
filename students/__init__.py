"""Students by name: classifiers of an object in its scene, and networks for segmentation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from kd.nn.pspnet import pspnet
from kd.nn.published import torchvision_net
from students.classifiers import NAMES, build_student
from students.espnet import espnet, espnet_c

CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    name: partial(build_student, name) for name in NAMES
}
SEGMENTERS: dict[str, Callable[..., nn.Module]] = {
    "espnet": espnet,
    "espnet_c": espnet_c,
    "pspnet": pspnet,
    "deeplabv3_mobilenet_v3_large": partial(torchvision_net, name="deeplabv3_mobilenet_v3_large"),
    "deeplabv3_resnet50": partial(torchvision_net, name="deeplabv3_resnet50"),
    "deeplabv3_resnet101": partial(torchvision_net, name="deeplabv3_resnet101"),
    "fcn_resnet50": partial(torchvision_net, name="fcn_resnet50"),
    "fcn_resnet101": partial(torchvision_net, name="fcn_resnet101"),
    "lraspp_mobilenet_v3_large": partial(torchvision_net, name="lraspp_mobilenet_v3_large"),
}
STUDENTS: dict[str, Callable[..., nn.Module]] = CLASSIFIERS | SEGMENTERS
