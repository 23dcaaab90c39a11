"""Registry of teachers, each for one kind of problem; importing it does not import torch.

Every context teacher has an attribute `task`, the name of the task that fits its input and output.
"""

from __future__ import annotations

from kd.nn.networks import DETECTORS, SEGMENTERS
from kd.registry import Entry


def _context(target: str, text: str, **options: object) -> Entry:
    return Entry(f"teachers.{target}", text, "objects", options=options)


TEACHERS: dict[str, Entry] = {
    "unet": _context("unet:unet", "U-Net with the region as a fourth channel"),
    "unet_ffc": _context("unet_ffc:unet_ffc", "U-Net of fast Fourier convolutions"),
    "cnn": _context("cnn:cnn", "convolutional classifier of the hidden object"),
    "trunk": _context("trunk:trunk", "features of any trunk, pooled inside and around the region"),
    "timm/NAME": _context("trunk:trunk", "the same on timm's model NAME", name="timm/NAME"),
    "torchvision/NAME": _context(
        "trunk:trunk", "the same on torchvision's classifier NAME", name="torchvision/NAME"
    ),
    "scene_transformer": _context(
        "scene_transformer:scene_transformer", "transformer over a scene's objects and pixels"
    ),
    "cooccurrence": _context("cooccurrence:cooccurrence", "counts of co-occurring objects"),
    "prior": _context("cooccurrence:prior", "class frequencies only, a baseline"),
    "resnet_pixel": _context(
        "resnet_pixel:resnet_pixel", "ResNet-18 on grey images, pixel by pixel"
    ),
    "resnet_multilabel": _context(
        "resnet_multilabel:resnet_multilabel", "ResNet-18 on grey images, scene by scene"
    ),
    **SEGMENTERS,
    **DETECTORS,
    "msinet": Entry("teachers.msinet:msinet", "MSI-Net, saliency maps on VGG-16", "saliency"),
}
