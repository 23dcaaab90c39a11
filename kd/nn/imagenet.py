"""torchvision's weights of a classifier: from torch's hub cache, or downloaded into it."""

from __future__ import annotations

import http.client
import pickle
from pathlib import Path
from typing import Any

import torch
from torchvision import models

from kd.errors import UserError

# No way there, an answer cut off, another hash than the name says, a file that is no weights.
_FAILURES = (OSError, http.client.HTTPException, RuntimeError, pickle.UnpicklingError, EOFError)


def imagenet_weights(name: str) -> dict[str, Any]:
    """The state dict of a torchvision classifier's default weights.

    Args:
        name: Of `torchvision.models.list_models`.

    Raises:
        UserError: They can neither be downloaded nor read.
    """
    published = models.get_model_weights(name)["DEFAULT"]
    try:
        state: dict[str, Any] = published.get_state_dict(progress=False, check_hash=True)
    except _FAILURES as error:
        url = str(published.url)
        file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        there = "is damaged: remove it" if file.is_file() else f"cannot be had from {url}"
        raise UserError(
            f"weights: imagenet: torchvision's weights of {name}: {file} {there} ({reason}). "
            "Without a connection put the file there from another machine, or say in the model's "
            "options weights: FILE, any file of such weights, or weights: null, random ones"
        ) from error
    return state
