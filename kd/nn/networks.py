"""Registry of segmentation networks and detectors, which can be students or teachers."""

from __future__ import annotations

from kd.registry import Entry

_PUBLISHED = {
    "deeplabv3_mobilenet_v3_large": "DeepLabV3 on MobileNetV3-Large",
    "deeplabv3_resnet50": "DeepLabV3 on ResNet-50",
    "deeplabv3_resnet101": "DeepLabV3 on ResNet-101",
    "fcn_resnet50": "FCN on ResNet-50",
    "fcn_resnet101": "FCN on ResNet-101",
    "lraspp_mobilenet_v3_large": "LR-ASPP on MobileNetV3-Large",
}


def _segmenter(target: str, text: str, **options: object) -> Entry:
    return Entry(f"kd.nn.{target}", text, "segmentation", options=options)


SEGMENTERS = {
    "espnet": _segmenter("espnet:ESPNet", "ESPNet with its decoder"),
    "espnet_c": _segmenter("espnet:ESPNetC", "ESPNet's encoder alone"),
    "pspnet": _segmenter("segmentation:pspnet", "pyramid pooling on any trunk"),
    **{
        name: _segmenter("segmentation:torchvision_net", f"torchvision's {text}", name=name)
        for name, text in _PUBLISHED.items()
    },
}

# "features.17" leaves out the widening to 1,280 channels, which only the classifier needs.
_MOBILE: dict[str, object] = {"trunk": "mobilenet_v2", "until": "features.17"}


def _detector(target: str, text: str, **options: object) -> Entry:
    return Entry(f"kd.nn.detectors.{target}", text, "detection", options=options)


def _family(name: str, target: str, text: str) -> dict[str, Entry]:
    """Build the registry entries of a detector: for any trunk, and by name for common trunks."""
    return {
        name: _detector(target, f"{text} on any trunk"),
        f"{name}_resnet18": _detector(target, f"{text} on ResNet-18", trunk="resnet18"),
        f"{name}_resnet50": _detector(target, f"{text} on ResNet-50", trunk="resnet50"),
        f"{name}_mobilenet_v2": _detector(target, f"{text} on MobileNetV2", **_MOBILE),
    }


DETECTORS = {
    **_family("centernet", "centernet:centernet", "CenterNet"),
    **_family("fasterrcnn", "faster_rcnn:fasterrcnn", "Faster R-CNN"),
    "fasterrcnn_resnet101": _detector(
        "faster_rcnn:fasterrcnn", "Faster R-CNN on ResNet-101", trunk="resnet101"
    ),
    **_family("fcos", "one_stage:fcos", "FCOS"),
    **_family("retinanet", "one_stage:retinanet", "RetinaNet"),
}
