"""CenterNet's losses: where objects are, how large, and where in their cells.

Zhou et al., 2019, https://arxiv.org/abs/1904.07850.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import UserError
from kd.losses._checks import floating, one_device, wide_type
from kd.losses.center_targets import CenterTargets

# What the published total multiplies the three losses by.
WEIGHTS = {"heatmap": 1.0, "size": 0.1, "offset": 1.0}


def centernet_losses(output: Mapping[str, Tensor], targets: CenterTargets) -> dict[str, Tensor]:
    """The three losses, unweighted; `WEIGHTS` are the published weights.

    `heatmap`: a focal loss (alpha 2, beta 4), the sum over all places divided by the number of
    peaks. With p the probability and y the target it is `-(1 - p)^2 log p` at a peak and
    `-(1 - y)^4 p^2 log(1 - p)` elsewhere; taken from the logits, so that no probability has to be
    kept off 0 and 1. A batch without an object is divided by 1: all of it is background.

    `size`, `offset`: the mean distance of the two numbers from their targets over the objects, in
    cells, 0 with a zero gradient where there is none. As the authors' code has it: the paper adds
    the two numbers up, which is twice that.

    Args:
        output: `heatmap` (N, C, h, w), logits; `size` and `offset` (N, 2, h, w).
        targets: Of the same grid.

    Raises:
        UserError: Shapes, types or devices that do not fit.
    """
    _check_maps(output, targets)
    return {
        "heatmap": _focal(output["heatmap"], targets),
        "size": _at_peaks(output["size"], targets.size, targets),
        "offset": _at_peaks(output["offset"], targets.offset, targets),
    }


def _focal(logits: Tensor, targets: CenterTargets) -> Tensor:
    logits = logits.to(wide_type(logits))
    if targets.counted is not None:
        # Their gradient must be 0 even where they are not finite.
        logits = logits.masked_fill(~targets.counted, 0.0)
    peak = targets.heatmap == 1
    # Away from what is right: 1 - p at a peak, p elsewhere; -log(1 - that) is its softplus.
    wrong = torch.where(peak, -logits, logits)
    blame = torch.where(peak, 1.0, (1 - targets.heatmap) ** 4)
    if targets.counted is not None:
        blame = blame.masked_fill(~targets.counted, 0.0)
    total = (blame * wrong.sigmoid().square() * F.softplus(wrong)).sum()
    return total / peak.sum().clamp(min=1)


def _at_peaks(maps: Tensor, truth: Tensor, targets: CenterTargets) -> Tensor:
    found = maps.flatten(2)[targets.image_of, :, targets.cell].to(wide_type(maps))  # (M, 2)
    # Filled before the distance is taken: the derivative of that is no number at NaN.
    gap = (found - truth).masked_fill(~targets.valid[:, None], 0.0)
    return gap.abs().sum() / (2 * targets.valid.sum()).clamp(min=1)


def _check_maps(output: Mapping[str, Tensor], targets: CenterTargets) -> None:
    what = "centernet_losses"
    images, _, *grid = targets.heatmap.shape
    expected = {
        "heatmap": tuple(targets.heatmap.shape),
        "size": (images, 2, *grid),
        "offset": (images, 2, *grid),
    }
    for name, shape in expected.items():
        if tuple(output[name].shape) != shape:
            raise UserError(f"{what}: {name} must be {shape}, got {tuple(output[name].shape)}")
    maps = {name: output[name] for name in expected}
    floating(what, **maps)
    one_device(what, **maps, targets=targets.heatmap)
