"""kd: knowledge distillation for scene understanding.

    student = kd.load("runs/distill/resnet18/scenes")
    student.predict("photo.jpg", boxes=[[20, 30, 80, 90]])

The public names are imported when they are first used, so that `import kd` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kd.version import __version__ as __version__

if TYPE_CHECKING:
    from kd.deploy.model import TrainedModel as TrainedModel
    from kd.deploy.model import load as load
    from kd.errors import UserError as UserError

_HOME = {
    "load": "kd.deploy.model",
    "TrainedModel": "kd.deploy.model",
    "UserError": "kd.errors",
}
__all__ = ["TrainedModel", "UserError", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
