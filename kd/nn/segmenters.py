"""Segmentation networks by name: any of them can be a student, and a teacher."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from kd.nn.espnet import espnet, espnet_c
from kd.nn.pspnet import pspnet
from kd.nn.published import PUBLISHED

SEGMENTERS: dict[str, Callable[..., nn.Module]] = {
    "espnet": espnet,
    "espnet_c": espnet_c,
    "pspnet": pspnet,
    **PUBLISHED,
}
