"""Combine a detector's scores with the context of the scene, by a fitted strength.

`logit(score) + strength * (log q - log prior)` is one more expert in a product (Hinton, 2002). The
strength is fitted on AP over other images than those rescored, and is 0 where the gain is not
clear: within a class it reorders detections that the detector ranked by far more data than the
context teacher has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kd.metrics.coco_ap import Floats, Ints, MeanAP, mean_of_known, summary

STRENGTHS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
ALONES = (0.0, 0.25, 0.5, 1.0)
_LEAST_LOG = -30.0  # a class of probability 0 must not make a score NaN
_LEAST = 1e-6  # distance of scores from 0 and 1, where a logit would be infinite
_CLASS_SUPPORT = 20  # objects from which a class may have its own setting


@dataclass(frozen=True)
class Setting:
    """The parameters of `combine`.

    Attributes:
        strength: Weight of the evidence, `a`; 0 leaves scores as they are, bit for bit.
        alone: None for the plain rule; for the competing one `b`, 0..1, the weight of evidence
            that all classes of a box share.
    """

    strength: float = 0.0
    alone: float | None = None

    def __str__(self) -> str:
        if not self.strength:
            return "a = 0"
        alone = "" if self.alone is None else f", competing, b = {self.alone:g}"
        return f"a = {self.strength:g}{alone}"


def settings_of(rule: str, strengths: Sequence[float] = STRENGTHS) -> list[Setting]:
    """Settings to try for `plain`, `competing` or `auto` (both); the first is no context."""
    alones = {"plain": (None,), "competing": ALONES, "auto": (None, *ALONES)}[rule]
    return [Setting(), *(Setting(a, b) for b in alones for a in strengths)]


@dataclass(frozen=True)
class Evidence:
    """Scores and the evidence of the context for D detections.

    Attributes:
        scores: (D,) in 0..1.
        evidence: (D,) log q - log prior of a detection's own class; 0 without a query.
        label: (D,) int64.
        place: (D,) int64, equal for detections that share a box; -1 without a query.
    """

    scores: Floats
    evidence: Floats
    label: Ints
    place: Ints


def evidence_of(
    scores: Floats,
    label: Ints,
    question: Ints,
    log_probs: npt.NDArray[np.float32],
    log_prior: Floats,
) -> Evidence:
    """Compute the evidence of a teacher's predictions.

    Args:
        scores: (D,).
        label: (D,) int64.
        question: (D,) int64, row of `log_probs`; -1: none.
        log_probs: (K, C).
        log_prior: (C,), the teacher's prediction without evidence.
    """
    queried = question >= 0
    own = np.zeros(len(scores))
    predicted = log_probs[question[queried], label[queried]].astype(np.float64)
    own[queried] = np.maximum(predicted, _LEAST_LOG) - log_prior[label[queried]]
    return Evidence(scores, own, label, question)


def combine(known: Evidence, setting: Setting) -> Floats:
    """Compute new scores (D,) in 0..1; detections without a query keep theirs.

    Plain: `logit(s') = logit(s) + a e`, with e the evidence for the detection's own class.
    Competing: evidence for a class counts against the other classes detected in the same box,

        logit(s') = logit(s) + a e - log(w R + (1 - w) Z^(1 - b))

    where w is the fraction of `1 - s` that the detector gave to those others, R the mean of
    exp(a e) over them, and Z that over all classes of the box, each weighted by score. With b = 1
    and a single class this is the plain rule; with b = 0 evidence common to a box cancels, so that
    it ranks the classes of a box but not the boxes.
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
    """`log(w R + (1 - w) Z^(1 - b))` of each detection."""
    ratio = np.exp(strength * known.evidence)
    place = known.place + 1  # detections without a query are all in 0, and ignored
    key = place * (int(known.label.max(initial=0)) + 1) + known.label
    order = np.lexsort((-score, key))
    first = order[np.unique(key[order], return_index=True)[1]]  # a class's best one in its box
    mine = first[np.searchsorted(key[first], key)]
    mass = np.bincount(place[first], score[first])[place]
    weighed = np.bincount(place[first], (score * ratio)[first])[place]
    others = (mass - score[mine]).clip(min=0.0)
    for_others = (weighed - (score * ratio)[mine]).clip(min=0.0)
    some = others > 1e-12
    mean = np.where(some, for_others / np.where(some, others, 1.0), 1.0)
    fraction = np.minimum(others / (1 - score), 1.0)
    rest = (weighed / mass) ** (1 - alone)
    # Clipped: others of hardly any score must not make this one infinite.
    return np.asarray(np.log((fraction * mean + (1 - fraction) * rest).clip(min=_LEAST)))


@dataclass(frozen=True)
class Fit:
    """Settings fitted on some images.

    Attributes:
        setting: For all classes.
        classes: For single classes by label, where different.
        gain: AP on these images, minus that without context.
        clear: Whether the mean of the folds' gains exceeds its standard error; if not, `setting`
            is no context.
        best: The best setting, clear or not.
    """

    setting: Setting
    classes: dict[int, Setting]
    gain: float
    clear: bool
    best: Setting


class Fitter:
    """Average precision of every setting on every fold of the images.

    Args:
        meter: Of the detections.
        known: Their evidence.
        settings: To try; the first is no context.
        folds: (I,) fold of each image, from 0.
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

    def without(self, fold: int, *, per_class: bool = False) -> Fit:
        """Fit on all folds but one."""
        others = [number for number in range(self.count) if number != fold]
        return self._fit(self.count + fold, others, per_class)

    def everywhere(self, *, per_class: bool = False) -> Fit:
        """Fit on all images."""
        return self._fit(2 * self.count, list(range(self.count)), per_class)

    def _fit(self, row: int, folds: list[int], per_class: bool) -> Fit:
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
        """Settings of classes with enough objects and a clear gain over the common one."""
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
    """Whether the mean of the folds' gains exceeds its standard error; NaN gains are ignored."""
    gains = gains[~np.isnan(gains)]
    if len(gains) < 2:
        return False
    return bool(gains.mean() > gains.std(ddof=1) / np.sqrt(len(gains)))


def rescored(known: Evidence, fits: Sequence[Fit], fold: Ints) -> Floats:
    """Rescore each detection by the fit of its image's fold, (D,): scores (D,)."""
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
    """Gain in AP on the images of each fold."""
    rows = np.array([folds == number for number in range(int(folds.max()) + 1)])
    both = [meter.average(meter.match(scores, areas=1), rows) for scores in (before, after)]
    aps = [summary(average)["AP"] for average in both]
    return np.asarray(aps[1] - aps[0])
