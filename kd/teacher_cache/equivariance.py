"""Measure how well a teacher's maps follow a flip, shift or scaling of the image.

The error depends on teacher and images: convolutions, for example, follow shifts but not flips. It
is checked before cached maps are moved together with augmented images.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict

import torch
from accelerate import Accelerator

from kd.data.loader import collate, to_device
from kd.distillation.registry import POSTERIOR
from kd.distillation.targets import LiveTeacher
from kd.distillation.terms import layers_among
from kd.errors import UserError
from kd.problems.base import Dataset
from kd.runs.load_teacher import TrainedTeacher
from kd.storage.fields import PREFIX, CachedField
from kd.transforms.augment import build_augment

_log = logging.getLogger("kd")
MOVES = ("flip", "shift", "rotate", "crop")
_COLOURS = ("rgb_shift", "shuffle", "grey", "blur", "jitter")
_IMAGES = 8


def moved_map_errors(
    teacher: TrainedTeacher,
    data: Dataset,
    cached: Mapping[str, CachedField],
    accelerator: Accelerator,
) -> dict[str, dict[str, float]]:
    """Measure the error of cached maps, by output, under each geometric augmentation in use.

    The error is the norm of the difference to the teacher's output for the moved image, relative to
    that output's norm, on a few train images. Posteriors are skipped.
    """
    maps = {name: one for name, one in cached.items() if name != POSTERIOR}
    errors: dict[str, dict[str, float]] = {name: {} for name in maps}
    if not maps or not data.problem.moves_cached_maps:
        return errors
    augment = build_augment(getattr(data.section, "augment", None))
    if augment is None:
        return errors
    view = data.problem.teacher_view(teacher, data, "train")
    moves = [move for move in MOVES if getattr(augment, move) > 0]
    still = {**asdict(augment), **dict.fromkeys((*MOVES, *_COLOURS), 0.0)}
    with LiveTeacher(teacher.model, teacher.task, layers_among(list(maps), teacher.task)) as live:
        for move in moves:
            samples = view.moved(list(maps.values()), {**still, move: 1.0})
            batch = collate([samples[0, place] for place in range(min(_IMAGES, len(samples)))])
            with torch.no_grad():
                given = live(to_device(batch, accelerator.device, channels_last=False))
            for name, one in maps.items():
                there = given[name].cpu()
                if "indices" in one.store.fields:  # stored as log-probabilities
                    there = there.log_softmax(dim=1)
                away = batch[f"{PREFIX}{one.name}"].float() - there
                errors[name][move] = float(away.norm() / there.norm().clamp(min=1e-12))
    return errors


def check_moved_maps(
    teacher: TrainedTeacher,
    data: Dataset,
    cached: Mapping[str, CachedField],
    accelerator: Accelerator,
    *,
    limit: float,
) -> None:
    """Raise a `UserError` if the error of cached maps under an augmentation exceeds `limit`."""
    for name, errors in moved_map_errors(teacher, data, cached, accelerator).items():
        text = ", ".join(f"{move} {error:.1%}" for move, error in errors.items())
        if any(error > limit for error in errors.values()):
            moves = ", ".join(move for move, error in errors.items() if error > limit)
            raise UserError(
                f"losses: stored maps of {name!r} do not follow the image: moved with it they "
                f"differ from the teacher's maps of the moved image by {text} (limit {limit:.0%},"
                f" soft_targets.equivariance_error); set data.augment to 0 for {moves}, use "
                "soft_targets.mirrored=true for flips, or soft_targets.kind=live"
            )
        if text:
            _log.info("stored maps of %s, moved with the image, differ by %s", name, text)
