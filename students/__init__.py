"""Students by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from students.classifiers import NAMES, build_student

STUDENTS: dict[str, Callable[..., nn.Module]] = {
    name: partial(build_student, name) for name in NAMES
}
