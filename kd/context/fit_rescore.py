"""A split of detections with their context, and parameters fitted on it or for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd.context.detections import Asking, context_of
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
    """Detections, what is true, and what the context says."""

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
        kept_in: Path,
        *,
        asking: Asking,
        device: torch.device,
        shuffled: bool = False,
    ) -> Split:
        """Read the files and ask the teacher.

        Raises:
            UserError: What is wrong with them.
        """
        truth = read_truth(annotations)
        found = read_detections(detections, truth, probabilities=True)
        loaded = load_teacher(teacher, len(truth.class_names))
        check_classes(loaded, truth.class_names, str(annotations))
        context = context_of(loaded, truth, found, images, kept_in, device=device, asking=asking)
        answers = context.log_probs
        if shuffled:  # a cycle through a random order leaves nobody with its own
            order = np.random.default_rng(0).permutation(len(answers))
            answers = answers.copy()
            answers[order] = context.log_probs[np.roll(order, 1)]
        known = evidence_of(
            found.scores, found.boxes.label, context.question, answers, log_prior_of(loaded)
        )
        meter = MeanAP(truth.boxes, found.boxes, len(truth.image_ids), len(truth.class_names))
        return cls(truth, found, known, meter)

    def folds(self, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(I,) fold of each image, a function of its id."""
        return fold_of(self.truth.image_ids, count)


def log_prior_of(teacher: TrainedTeacher) -> Floats:
    """What a teacher answers where it knows nothing: its train classes' shares, (C,).

    One that was trained to answer free of part of the prior is free of it there, too.

    Raises:
        UserError: The run does not say.
    """
    path = teacher.folder / "predictions.npz"
    try:
        with np.load(path) as stored:
            prior = np.asarray(stored["prior"], dtype=np.float64)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: the class shares that the teacher was trained on are needed ({error}); name "
            "a finished run's folder"
        ) from error
    log_prior = (1 - float(getattr(teacher.task, "balance", 0.0))) * np.log(prior)
    return np.asarray(log_prior - np.log(np.exp(log_prior).sum()))


@dataclass(frozen=True)
class Rescored:
    """New scores and where they come from.

    Attributes:
        scores: (D,) in 0..1.
        fits: The parameters used, one a fold, or one.
        future: What the same images say about others.
        gains: AP gained on each fold's images by parameters of the others; empty where there is no
            cross-validation.
        taken: Whether that was clear; if not, `scores` are the detector's.
    """

    scores: Floats
    fits: tuple[Fit, ...]
    future: Fit
    gains: Floats
    taken: bool

    def notes(self, names: Sequence[str]) -> list[str]:
        """What a table says below."""
        said = [_say(fit, names) for fit in self.fits]
        lines = [f"fitted, fold {number}: {text}" for number, text in enumerate(said)]
        if len(set(said)) == 1:
            lines = [f"fitted{f', all {len(said)} folds' if len(said) > 1 else ''}: {said[0]}"]
        if len(self.gains):
            gains = ", ".join(f"{100 * gain:+z.2f}" for gain in self.gains)
            lines.append(f"AP gained on each fold by the others' parameters: {gains}")
            if not self.taken:
                lines.append("not a clear gain: all scores are left as they were")
            lines.append(f"on all images, for others: {_say(self.future, names)}")
        return lines

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """Plain values."""
        return {
            "fits": [_plain(fit, names) for fit in self.fits],
            "on_all_images": _plain(self.future, names),
            "fold_gains": self.gains.tolist(),
            "taken": self.taken,
        }


def cross_fitted(
    split: Split, settings: Sequence[Setting], count: int, per_class: bool
) -> Rescored:
    """Each image rescored by parameters of the other folds' images.

    The one thing that all images decide together is whether it is done at all: unless the gain on
    held-out folds is clear (its mean over its standard error), and AP higher, nothing changes.

    Raises:
        UserError: Fewer images than folds.
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
    return Rescored(
        scores if taken else split.known.scores,
        fits,
        fitter.everywhere(per_class=per_class),
        gains,
        taken,
    )


def fitted_elsewhere(
    split: Split, other: Split, settings: Sequence[Setting], count: int, per_class: bool
) -> Rescored:
    """A split rescored by parameters of another one.

    Raises:
        UserError: They share images, or differ in classes.
    """
    shared = np.intersect1d(split.truth.image_ids, other.truth.image_ids)
    if len(shared):
        raise UserError(
            f"{other.truth.path}: image {shared[0]} is in {split.truth.path}, too; parameters must "
            "be fitted on images that are not rescored"
        )
    if split.truth.class_names != other.truth.class_names:
        raise UserError(f"{other.truth.path}: its classes are not those of {split.truth.path}")
    fitter = Fitter(other.meter, other.known, settings, other.folds(count))
    fit = fitter.everywhere(per_class=per_class)
    here = np.zeros(len(split.known.scores), np.int64)
    scores = rescored(split.known, (fit,), here)
    return Rescored(scores, (fit,), fit, np.empty(0), True)


def _say(fit: Fit, names: Sequence[str]) -> str:
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
