"""Students by name: classifiers of an object in its scene, segmentation networks, detectors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from kd.nn.detectors import DETECTORS
from kd.nn.segmenters import SEGMENTERS
from students.classifiers import NAMES, build_student

CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    name: partial(build_student, name) for name in NAMES
}
STUDENTS: dict[str, Callable[..., nn.Module]] = CLASSIFIERS | SEGMENTERS | DETECTORS
