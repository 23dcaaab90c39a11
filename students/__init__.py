"""Students by name: classifiers of an object in its scene, and networks for segmentation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from kd.nn.pspnet import pspnet
from kd.nn.published import PUBLISHED
from students.classifiers import NAMES, build_student
from students.espnet import espnet, espnet_c

CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    name: partial(build_student, name) for name in NAMES
}
SEGMENTERS: dict[str, Callable[..., nn.Module]] = {
    "espnet": espnet,
    "espnet_c": espnet_c,
    "pspnet": pspnet,
    **PUBLISHED,
}
STUDENTS: dict[str, Callable[..., nn.Module]] = CLASSIFIERS | SEGMENTERS
