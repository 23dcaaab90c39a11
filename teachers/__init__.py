"""Context teachers by name; each says in `task` which task fits its input and output."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from teachers.cnn import cnn
from teachers.cooccurrence import cooccurrence, prior
from teachers.scene_transformer import scene_transformer
from teachers.trunk import trunk
from teachers.unet import unet

TEACHERS: dict[str, Callable[..., nn.Module]] = {
    "unet": unet,
    "cnn": cnn,
    "trunk": trunk,
    "scene_transformer": scene_transformer,
    "cooccurrence": cooccurrence,
    "prior": prior,
}
