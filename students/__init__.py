"""Registry of students, each for one kind of problem; importing it does not import torch."""

from __future__ import annotations

from kd.nn.networks import DETECTORS, SEGMENTERS
from kd.registry import Entry

_TRUNKS = (
    *("alexnet", "convnext_tiny", "convnext_small", "densenet121", "densenet169"),
    *("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_v2_s", "googlenet"),
    *("inception_v3", "mnasnet0_5", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_small"),
    *("mobilenet_v3_large", "regnet_x_400mf", "regnet_x_800mf", "regnet_y_400mf"),
    *("regnet_y_800mf", "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d"),
    *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "squeezenet1_0", "squeezenet1_1", "swin_t"),
    *("swin_v2_t", "vgg11_bn", "vgg16_bn", "vit_b_16", "vit_b_32", "wide_resnet50_2"),
)


def _classifier(name: str, trunk: str) -> Entry:
    text = f"classifies objects in their scenes; trunk: {trunk}"
    return Entry("students.classifiers:build_student", text, "objects", args=(name,))


STUDENTS: dict[str, Entry] = {
    **{name: _classifier(name, f"torchvision's {name}") for name in _TRUNKS},
    "timm/NAME": _classifier("timm/NAME", "timm's NAME"),
    "torchvision/NAME": _classifier("torchvision/NAME", "torchvision's NAME"),
    "transferred": _classifier("transferred", "the trunk of a context teacher's run"),
    **SEGMENTERS,
    **DETECTORS,
    "saliency": Entry("students.saliency:saliency", "saliency maps on any trunk", "saliency"),
}
