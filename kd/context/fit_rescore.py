"""Detections with their context, and rescoring parameters fitted to them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd.context.detections import QueryOptions, context_of
from kd.context.rescore import (
    Evidence,
    Fit,
    Fitter,
    Setting,
    evidence_of,
    fold_gains,
    is_clear,
    rescored,
)
from kd.errors import UserError
from kd.formats.coco_results import Detections, Truth, read_detections, read_truth
from kd.formats.splits import fold_of
from kd.metrics.coco_ap import Floats, MeanAP
from kd.runs.load_teacher import TrainedTeacher, check_classes, load_teacher

_log = logging.getLogger("kd")


@dataclass(frozen=True)
class Split:
    """Detections on some images, their ground truth and the evidence of their context."""

    truth: Truth
    found: Detections
    known: Evidence
    meter: MeanAP

    @classmethod
    def open(
        cls,
        teacher: Path,
        detections: Path,
        annotations: Path,
        images: Path,
        cache: Path,
        *,
        options: QueryOptions,
        device: torch.device,
        shuffled: bool = False,
    ) -> Split:
        """Read the files and query the teacher; `shuffled` swaps its predictions (the control)."""
        truth = read_truth(annotations)
        found = read_detections(detections, truth, probabilities=True)
        loaded = load_teacher(teacher, len(truth.class_names))
        check_classes(loaded, truth.class_names, str(annotations))
        context = context_of(loaded, truth, found, images, cache, device=device, options=options)
        log_probs = context.log_probs
        if shuffled:  # a cycle through a random order: none keeps its own
            order = np.random.default_rng(0).permutation(len(log_probs))
            log_probs = log_probs.copy()
            log_probs[order] = context.log_probs[np.roll(order, 1)]
        known = evidence_of(
            found.scores, found.boxes.label, context.question, log_probs, log_prior_of(loaded)
        )
        meter = MeanAP(truth.boxes, found.boxes, len(truth.image_ids), len(truth.class_names))
        return cls(truth, found, known, meter)

    def folds(self, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Fold of each image, (I,), a function of its id."""
        return fold_of(self.truth.image_ids, count)


def log_prior_of(teacher: TrainedTeacher) -> Floats:
    """Log-probabilities of a teacher without evidence, (C,): the prior of its train objects.

    Teachers trained with part of the prior removed (`balance`) lack that part here, too.
    """
    path = teacher.folder / "predictions.npz"
    try:
        with np.load(path) as stored:
            prior = np.asarray(stored["prior"], dtype=np.float64)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: the class prior of the teacher's training is needed ({error}); name a "
            "finished run's folder"
        ) from error
    log_prior = (1 - float(getattr(teacher.task, "balance", 0.0))) * np.log(prior)
    return np.asarray(log_prior - np.log(np.exp(log_prior).sum()))


@dataclass(frozen=True)
class Rescored:
    """New scores and how they were found.

    Attributes:
        scores: (D,) in 0..1.
        fits: The parameters used: one fit for each fold, or a single one.
        future: Fitted on all of these images, for use on others.
        gains: Gain in AP on each fold by parameters of the others; empty without cross-validation.
        taken: Whether the gain was clear; if not, `scores` are the detector's.
    """

    scores: Floats
    fits: tuple[Fit, ...]
    future: Fit
    gains: Floats
    taken: bool

    def notes(self, names: Sequence[str]) -> list[str]:
        """Notes below a table."""
        fits = [_describe(fit, names) for fit in self.fits]
        lines = [f"fitted, fold {number}: {text}" for number, text in enumerate(fits)]
        if len(set(fits)) == 1:
            lines = [f"fitted{f', all {len(fits)} folds' if len(fits) > 1 else ''}: {fits[0]}"]
        if len(self.gains):
            gains = ", ".join(f"{100 * gain:+z.2f}" for gain in self.gains)
            lines.append(f"AP gained on each fold by the others' parameters: {gains}")
            if not self.taken:
                lines.append("not a clear gain: all scores are left as they were")
            lines.append(f"on all images, for others: {_describe(self.future, names)}")
        return lines

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "fits": [_plain(fit, names) for fit in self.fits],
            "on_all_images": _plain(self.future, names),
            "fold_gains": self.gains.tolist(),
            "taken": self.taken,
        }


def cross_fitted(
    split: Split, settings: Sequence[Setting], count: int, per_class: bool
) -> Rescored:
    """Rescore each image by parameters fitted on the other folds.

    Scores stay as they are unless AP over all images rises and the gain on held-out folds is clear:
    its mean exceeds its standard error.
    """
    folds = split.folds(count)
    if len(np.unique(folds)) < count:
        raise UserError(f"{split.truth.path}: too few images for {count} folds; try --folds 2")
    fitter = Fitter(split.meter, split.known, settings, folds)
    fits = tuple(fitter.without(number, per_class=per_class) for number in range(count))
    scores = rescored(split.known, fits, folds[split.found.boxes.image])
    gains = fold_gains(split.meter, split.known.scores, scores, folds)
    every = np.zeros(len(folds), np.int64)
    better = fold_gains(split.meter, split.known.scores, scores, every)[0] > 0
    taken = bool(better and is_clear(gains))
    new = scores if taken else split.known.scores
    return Rescored(new, fits, fitter.everywhere(per_class=per_class), gains, taken)


def fitted_elsewhere(
    split: Split, other: Split, settings: Sequence[Setting], count: int, per_class: bool
) -> Rescored:
    """Rescore a split by parameters fitted on another one, of other images and equal classes."""
    shared = np.intersect1d(split.truth.image_ids, other.truth.image_ids)
    if len(shared):
        raise UserError(
            f"{other.truth.path}: image {shared[0]} is also in {split.truth.path}; parameters must "
            "be fitted on images that are not rescored"
        )
    if split.truth.class_names != other.truth.class_names:
        raise UserError(f"{other.truth.path}: its classes are not those of {split.truth.path}")
    fitter = Fitter(other.meter, other.known, settings, other.folds(count))
    fit = fitter.everywhere(per_class=per_class)
    here = np.zeros(len(split.known.scores), np.int64)
    scores = rescored(split.known, (fit,), here)
    return Rescored(scores, (fit,), fit, np.empty(0), True)


def _describe(fit: Fit, names: Sequence[str]) -> str:
    classes = "".join(f"; {names[c]}: {setting}" for c, setting in fit.classes.items())
    unclear = "" if fit.clear else f" ({fit.best} gained {100 * fit.gain:.2f}, not clearly)"
    if not fit.best.strength:
        unclear = " (nothing tried gained AP)"
    return f"{fit.setting}{unclear}{classes}"


def _plain(fit: Fit, names: Sequence[str]) -> dict[str, Any]:
    return {
        "a": fit.setting.strength,
        "b": fit.setting.alone,
        "gain": fit.gain,
        "clear": fit.clear,
        "classes": {names[c]: [s.strength, s.alone] for c, s in fit.classes.items()},
    }
