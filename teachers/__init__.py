"""Context teachers by name; each maps (K, 4, H, W) to logits and says in `task` which task fits."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from teachers.cnn import cnn
from teachers.trunk import trunk
from teachers.unet import unet

TEACHERS: dict[str, Callable[..., nn.Module]] = {
    "unet": unet,
    "cnn": cnn,
    "trunk": trunk,
}
