"""Students by name: classifiers of an object in its scene, segmentation, detectors, saliency."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from kd.nn.detectors import DETECTORS
from kd.nn.segmentation import SEGMENTERS
from students.classifiers import NAMES, build_student
from students.saliency import saliency

CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    name: partial(build_student, name) for name in NAMES
}
# These have no classes.
SALIENCY_STUDENTS: dict[str, Callable[..., nn.Module]] = {"saliency": saliency}
STUDENTS: dict[str, Callable[..., nn.Module]] = (
    CLASSIFIERS | SEGMENTERS | DETECTORS | SALIENCY_STUDENTS
)
