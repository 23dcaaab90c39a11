"""Detectors by name: any of them can be a student, and a teacher."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kd.nn.detectors.centernet import CenterNet, centernet
from kd.nn.detectors.faster_rcnn import FasterRCNN, fasterrcnn
from kd.nn.detectors.one_stage import OneStage, fcos, retinanet

Detector = FasterRCNN | OneStage | CenterNet

# Of MobileNetV2 without the widening to 1,280 channels, which is there for its classifier.
_MOBILE, _LAST = "mobilenet_v2", "features.17"

DETECTORS: dict[str, Callable[..., Detector]] = {
    "centernet": centernet,
    "centernet_resnet18": partial(centernet, trunk="resnet18"),
    "centernet_resnet50": partial(centernet, trunk="resnet50"),
    "centernet_mobilenet_v2": partial(centernet, trunk=_MOBILE, until=_LAST),
    "fasterrcnn": fasterrcnn,
    "fasterrcnn_resnet18": partial(fasterrcnn, trunk="resnet18"),
    "fasterrcnn_resnet50": partial(fasterrcnn, trunk="resnet50"),
    "fasterrcnn_resnet101": partial(fasterrcnn, trunk="resnet101"),
    "fasterrcnn_mobilenet_v2": partial(fasterrcnn, trunk=_MOBILE, until=_LAST),
    "fcos": fcos,
    "fcos_resnet18": partial(fcos, trunk="resnet18"),
    "fcos_resnet50": partial(fcos, trunk="resnet50"),
    "fcos_mobilenet_v2": partial(fcos, trunk=_MOBILE, until=_LAST),
    "retinanet": retinanet,
    "retinanet_resnet18": partial(retinanet, trunk="resnet18"),
    "retinanet_resnet50": partial(retinanet, trunk="resnet50"),
    "retinanet_mobilenet_v2": partial(retinanet, trunk=_MOBILE, until=_LAST),
}
