"""Rescore detections with a context teacher: `logit(score) + strength * (log q - log prior)`.

This is a product of experts (Hinton, 2002), where `q` is the class probability predicted by the
teacher. The strength is chosen by AP on other images, and is 0 unless the gain is clear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kd.context.detections import QueryOptions, context_of
from kd.errors import UserError
from kd.formats.coco_results import Detections, Truth, read_detections, read_truth
from kd.formats.splits import fold_of
from kd.metrics.coco_ap import Floats, Ints, MeanAP, mean_of_known, summary
from kd.runs.load_teacher import TrainedTeacher, check_classes, load_teacher

STRENGTHS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
ALONES = (0.0, 0.25, 0.5, 1.0)
_LEAST_LOG = -30.0  # floor of log-probabilities: a probability of 0 would make scores NaN
_LEAST = 1e-6  # scores are clipped to this distance from 0 and 1, where logits are infinite
_CLASS_SUPPORT = 20  # least number of objects of a class that gets its own setting


@dataclass(frozen=True)
class Setting:
    """Parameters of `combine`; `alone` is None for the plain rule."""

    strength: float = 0.0  # weight `a` of the evidence; 0 returns the detector's scores unchanged
    alone: float | None = None  # weight `b` in 0..1 of the competing rule

    def __str__(self) -> str:
        if not self.strength:
            return "a = 0"
        alone = "" if self.alone is None else f", competing, b = {self.alone:g}"
        return f"a = {self.strength:g}{alone}"


def settings_of(rule: str, strengths: Sequence[float] = STRENGTHS) -> list[Setting]:
    """List settings to try for `plain`, `competing` or `auto` (both); the first has strength 0."""
    alones = {"plain": (None,), "competing": ALONES, "auto": (None, *ALONES)}[rule]
    return [Setting(), *(Setting(a, b) for b in alones for a in strengths)]


@dataclass(frozen=True)
class Evidence:
    """Scores and context evidence of D detections."""

    scores: Floats  # (D,) detector scores in 0..1
    evidence: Floats  # (D,) log q - log prior for the detection's class; 0 if not queried
    label: Ints  # (D,) class labels
    place: Ints  # (D,) query index, shared by overlapping detections; -1 if not queried


def evidence_of(
    scores: Floats,
    label: Ints,
    question: Ints,
    log_probs: npt.NDArray[np.float32],
    log_prior: Floats,
) -> Evidence:
    """Compute evidence from a teacher's predictions `log_probs` (K, C) and prior `log_prior` (C,).

    `question` (D,) is the row of each detection in `log_probs`, or -1 if it was not queried.
    """
    queried = question >= 0
    own = np.zeros(len(scores))
    predicted = log_probs[question[queried], label[queried]].astype(np.float64)
    own[queried] = np.maximum(predicted, _LEAST_LOG) - log_prior[label[queried]]
    return Evidence(scores, own, label, question)


def combine(known: Evidence, setting: Setting) -> Floats:
    """Compute new scores (D,) in 0..1; detections without a query keep their scores.

    The plain rule is `logit(s') = logit(s) + a e`, with e the evidence for the detection's class.
    In the competing rule, evidence for the other classes detected in the same box lowers the score:

        logit(s') = logit(s) + a e - log(w R + (1 - w) Z^(1 - b))

    Here w is the fraction of `1 - s` that the detector assigns to the other classes. R is the mean
    of exp(a e) over the other classes and Z that over all classes of the box, weighted by score.
    With b = 0, evidence common to all classes of a box cancels.
    """
    if not setting.strength:
        return known.scores
    score = known.scores.clip(_LEAST, 1 - _LEAST)
    moved = np.log(score) - np.log1p(-score) + setting.strength * known.evidence
    if setting.alone is not None:
        moved -= _against(known, score, setting.strength, setting.alone)
    new = np.where(known.place >= 0, 1 / (1 + np.exp(-moved)), known.scores)
    return np.asarray(new, dtype=np.float64)


def _against(known: Evidence, score: Floats, strength: float, alone: float) -> Floats:
    """Compute `log(w R + (1 - w) Z^(1 - b))`, (D,), for the competing rule of `combine`."""
    ratio = np.exp(strength * known.evidence)
    place = known.place + 1  # 0 for detections without a query; their result is not used
    key = place * (int(known.label.max(initial=0)) + 1) + known.label
    order = np.lexsort((-score, key))
    first = order[np.unique(key[order], return_index=True)[1]]  # best score per class and box
    mine = first[np.searchsorted(key[first], key)]
    mass = np.bincount(place[first], score[first])[place]
    weighed = np.bincount(place[first], (score * ratio)[first])[place]
    others = (mass - score[mine]).clip(min=0.0)
    for_others = (weighed - (score * ratio)[mine]).clip(min=0.0)
    some = others > 1e-12
    mean = np.where(some, for_others / np.where(some, others, 1.0), 1.0)
    fraction = np.minimum(others / (1 - score), 1.0)
    rest = (weighed / mass) ** (1 - alone)
    # Clipped, because other classes with scores near 0 would make the result infinite.
    return np.asarray(np.log((fraction * mean + (1 - fraction) * rest).clip(min=_LEAST)))


@dataclass(frozen=True)
class Fit:
    """Settings fitted to a set of images.

    Attributes:
        setting: Default for all classes; strength 0 if the gain is not clear.
        classes: Settings of classes that differ from the default, by label.
        gain: AP with `best` minus AP without context, on these images.
        clear: True if the mean gain over folds exceeds its standard error.
        best: The setting with the highest AP, even if its gain is not clear.
    """

    setting: Setting
    classes: dict[int, Setting]
    gain: float
    clear: bool
    best: Setting


class Fitter:
    """Choose settings by average precision, computed for each setting on each fold.

    `folds` (I,) is the fold of each image, from 0. The first of `settings` must have strength 0.
    """

    def __init__(
        self, meter: MeanAP, known: Evidence, settings: Sequence[Setting], folds: Ints
    ) -> None:
        self.settings, self.folds, self.meter = list(settings), folds, meter
        self.count = int(folds.max(initial=0)) + 1
        single = np.array([folds == number for number in range(self.count)])
        rows = np.concatenate([single, ~single, np.ones((1, len(folds)), np.bool_)])
        # (S, rows, C), means over IoU thresholds; rows: each fold, all but each fold, all images
        self._class_ap = np.stack(
            [
                meter.average(meter.match(combine(known, setting), areas=1), rows)[:, 0].mean(1)
                for setting in self.settings
            ]
        )

    def fit(self, *, without: int | None = None, per_class: bool = False) -> Fit:
        """Choose the setting with the highest AP on all images, or on all except fold `without`."""
        folds = [number for number in range(self.count) if number != without]
        row = 2 * self.count if without is None else self.count + without
        mean = np.nan_to_num(mean_of_known(self._class_ap))  # (S, rows)
        best = int(np.argmax(mean[:, row]))
        gain = float(mean[best, row] - mean[0, row])
        clear = is_clear(mean[best, folds] - mean[0, folds])
        chosen = best if clear else 0
        images = np.isin(self.folds, folds)
        classes = self._classes(row, folds, chosen, images) if per_class else {}
        return Fit(self.settings[chosen], classes, gain, clear, self.settings[best])

    def _classes(
        self, row: int, folds: list[int], common: int, images: npt.NDArray[np.bool_]
    ) -> dict[int, Setting]:
        """Choose settings for classes with enough objects and a clear gain over the default."""
        found = {}
        for label in range(self.meter.classes):
            if self.meter.support[label, 0, images].sum() < _CLASS_SUPPORT:
                continue
            ap = self._class_ap[:, :, label]
            best = int(np.argmax(ap[:, row]))
            if best != common and is_clear(ap[best, folds] - ap[common, folds]):
                found[label] = self.settings[best]
        return found


def is_clear(gains: Floats) -> bool:
    """Return True if the mean gain over folds exceeds its standard error; NaN gains are ignored."""
    gains = gains[~np.isnan(gains)]
    if len(gains) < 2:
        return False
    return bool(gains.mean() > gains.std(ddof=1) / np.sqrt(len(gains)))


def rescored(known: Evidence, fits: Sequence[Fit], fold: Ints) -> Floats:
    """Rescore D detections, each with the fit of its image's fold, `fold` (D,)."""
    new = known.scores.copy()
    for number, fit in enumerate(fits):
        mine = fold == number
        if fit.setting.strength:
            new[mine] = combine(known, fit.setting)[mine]
        for label, setting in fit.classes.items():
            some = mine & (known.label == label)
            new[some] = combine(known, setting)[some]
    return new


def fold_gains(meter: MeanAP, before: Floats, after: Floats, folds: Ints) -> Floats:
    """Compute the AP gain of scores `after` over `before` on each fold's images."""
    rows = np.array([folds == number for number in range(int(folds.max()) + 1)])
    both = [meter.average(meter.match(scores, areas=1), rows) for scores in (before, after)]
    aps = [summary(average)["AP"] for average in both]
    return np.asarray(aps[1] - aps[0])


@dataclass(frozen=True)
class Split:
    """Detections, ground truth and context evidence for a set of images."""

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
        """Read the files and query the teacher; `shuffled` permutes its predictions (a control)."""
        truth = read_truth(annotations)
        found = read_detections(detections, truth, probabilities=True)
        loaded = load_teacher(teacher, len(truth.class_names))
        check_classes(loaded, truth.class_names, str(annotations))
        log_probs, question = context_of(
            loaded, truth, found, images, cache, device=device, options=options
        )
        if shuffled:  # a cycle through a random order, so that no query keeps its prediction
            order = np.random.default_rng(0).permutation(len(log_probs))
            log_probs = log_probs[np.roll(order, 1)[np.argsort(order)]]
        known = evidence_of(
            found.scores, found.boxes.label, question, log_probs, log_prior_of(loaded)
        )
        meter = MeanAP(truth.boxes, found.boxes, len(truth.image_ids), len(truth.class_names))
        return cls(truth, found, known, meter)

    def folds(self, count: int) -> Ints:
        """Assign images to folds by image id, (I,)."""
        return fold_of(self.truth.image_ids, count)


def log_prior_of(teacher: TrainedTeacher) -> Floats:
    """Read the log class prior (C,) of the teacher's training from its run folder.

    For a teacher trained with `balance`, this is the normalized log of prior^(1 - balance).
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
    """New scores and the fits that produced them.

    Attributes:
        scores: (D,) in 0..1.
        fits: One fit per fold, or a single fit from another split.
        future: Fit to all of these images, for use on new images.
        gains: AP gain on each held-out fold; empty if the fit comes from another split.
        taken: True if rescoring clearly improved AP; otherwise `scores` are the original ones.
    """

    scores: Floats
    fits: tuple[Fit, ...]
    future: Fit
    gains: Floats
    taken: bool

    def notes(self, names: Sequence[str]) -> list[str]:
        """Describe the fitted parameters and gains in lines below a table."""
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
        """Convert fits and gains to JSON values."""
        return {
            "fits": [_plain(fit, names) for fit in self.fits],
            "on_all_images": _plain(self.future, names),
            "fold_gains": self.gains.tolist(),
            "taken": self.taken,
        }


def cross_fitted(
    split: Split, settings: Sequence[Setting], count: int, per_class: bool
) -> Rescored:
    """Rescore each image with parameters fitted on the other folds.

    Scores are unchanged unless AP over all images rises and the gain over held-out folds is clear.
    """
    folds = split.folds(count)
    if len(np.unique(folds)) < count:
        raise UserError(f"{split.truth.path}: too few images for {count} folds; try --folds 2")
    fitter = Fitter(split.meter, split.known, settings, folds)
    fits = tuple(fitter.fit(without=number, per_class=per_class) for number in range(count))
    scores = rescored(split.known, fits, folds[split.found.boxes.image])
    gains = fold_gains(split.meter, split.known.scores, scores, folds)
    every = np.zeros(len(folds), np.int64)
    better = fold_gains(split.meter, split.known.scores, scores, every)[0] > 0
    taken = bool(better and is_clear(gains))
    new = scores if taken else split.known.scores
    return Rescored(new, fits, fitter.fit(per_class=per_class), gains, taken)


def fitted_elsewhere(
    split: Split, other: Split, settings: Sequence[Setting], count: int, per_class: bool
) -> Rescored:
    """Rescore a split with parameters fitted on another split (same classes, different images)."""
    shared = np.intersect1d(split.truth.image_ids, other.truth.image_ids)
    if len(shared):
        raise UserError(
            f"{other.truth.path}: image {shared[0]} is also in {split.truth.path}; parameters must "
            "be fitted on images that are not rescored"
        )
    if split.truth.class_names != other.truth.class_names:
        raise UserError(f"{other.truth.path}: its classes are not those of {split.truth.path}")
    fitter = Fitter(other.meter, other.known, settings, other.folds(count))
    fit = fitter.fit(per_class=per_class)
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
