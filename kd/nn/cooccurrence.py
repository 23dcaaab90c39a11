"""Naive Bayes posterior of an object's class from co-occurring objects, position and size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Evidence = Literal["company", "place", "size"]
ROWS, COLUMNS = 6, 3  # the grid of image cells into which the centres of boxes are binned
AREA_FRACTIONS = (
    0.0025,
    0.005,
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
)  # boundaries of the bins for box area / image area
SHAPES = (0.5, 0.8, 1.25, 2.0)  # boundaries of the bins for box width / box height
FIT_IMAGES = 5_000  # images used to fit the five exponents; more would not change them much


class Objects(NamedTuple):
    """The M objects of N images, concatenated."""

    classes: Tensor  # (M,) int64; -1 means that the class is unknown
    visible: Tensor  # (M,) bool, whether the object's class is evidence for other objects
    boxes: Tensor  # (M, 4) xyxy as fractions of the image's width and height
    aspects: Tensor  # (M,) width / height of the image that contains the object
    image_of: Tensor  # (M,) int64, index of the image that contains the object; ascending

    def of_images(self, start: int, end: int) -> Objects:
        """The objects of images `start` to `end - 1`, renumbered from 0."""
        bounds = torch.tensor([start, end], device=self.image_of.device)
        first, last = torch.searchsorted(self.image_of, bounds).tolist()
        taken = Objects(*(part[first:last] for part in self))
        return taken._replace(image_of=taken.image_of - start)


@runtime_checkable
class Fitted(Protocol):
    """A teacher that is fitted by counting, before or instead of gradient descent."""

    def fit(self, objects: Objects) -> None:
        """Fit the teacher to the counts of all objects in the training images."""
        ...


class NaiveBayes(nn.Module):
    """Naive Bayes classifier of a hidden object, with an exponent for each kind of evidence.

    `log p(c | rest) = log p(c) + a n^-k sum_j lift(c_j|c) + b lift(place|c) + d lift(size|c)`,
    where `lift(x|c) = log p(x|c) - log p(x)`. The probabilities are counts over the training
    objects, smoothed towards `p(x)`. Since the n other objects are not independent given c, the
    exponents a, k, b, d and the strength of the smoothing are fitted by maximum likelihood on the
    training objects; the likelihood of each object is computed from counts that leave out the image
    that contains it. On such shrinkage see Hand and Yu, 2001, "Idiot's Bayes". Plain naive Bayes is
    a = b = d = 1 and k = 0.

    Args:
        num_classes: Number of classes, C.
        evidence: Kinds of evidence to use: `company` (classes of the other objects), `place`
            (position of the box) and `size` (area and aspect ratio of the box). If empty, the
            output is the class prior.
        fitted: Whether to fit the exponents and the smoothing, instead of plain naive Bayes.
    """

    seen: Tensor
    pairs: Tensor
    cells: Tensor
    forms: Tensor
    exponents: Tensor

    def __init__(
        self, num_classes: int, *, evidence: Sequence[Evidence], fitted: bool = True
    ) -> None:
        super().__init__()
        self.num_classes, self.evidence, self.fitted = num_classes, frozenset(evidence), fitted
        counts = {
            "seen": (num_classes,),
            "pairs": (num_classes, num_classes),
            "cells": (num_classes, ROWS * COLUMNS),
            "forms": (num_classes, (len(AREA_FRACTIONS) + 1) * (len(SHAPES) + 1)),
        }
        for name, shape in counts.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        # a, k, b, d, and the logarithm of the pseudo-counts
        start = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        self.register_buffer("exponents", start)

    @torch.no_grad()
    def fit(self, objects: Objects) -> None:
        """Count the objects of the training images and fit the exponents.

        All objects must have a known class.
        """
        for counts in (self.seen, self.pairs, self.cells, self.forms):
            counts.zero_()
        images = int(objects.image_of.max()) + 1 if len(objects.classes) else 0
        classes, one = objects.classes, torch.ones((), dtype=torch.float64)
        self.seen += torch.bincount(classes, minlength=self.num_classes)
        self.cells.index_put_((classes, cell_of(objects)), one, accumulate=True)
        self.forms.index_put_((classes, form_of(objects)), one, accumulate=True)
        # In parts, because a dense table (images, C) of the whole dataset would be too large.
        for start in range(0, images, 4096):
            there = self._counts(objects.of_images(start, start + 4096))
            self.pairs += there.T @ there
        self.pairs -= torch.diag(self.seen)  # no object co-occurs with itself
        if self.fitted and self.evidence and images > 1:
            self._fit_exponents(objects.of_images(0, FIT_IMAGES))

    def forward(self, objects: Objects, hidden: Tensor) -> Tensor:
        """Compute class log-probabilities of hidden objects given the other, visible objects.

        In training mode the counts leave out the image that contains the hidden object.

        Args:
            objects: Objects of N images. The class of a hidden object is not used for its own
                prediction, but is evidence for the other objects if it is marked as visible.
            hidden: (K,) indices of the hidden objects.

        Returns:
            (K, C) float32.
        """
        scores = self._scores(objects, self.exponents, without_own=self.training)
        return scores[hidden].log_softmax(dim=1).float()

    def _fit_exponents(self, objects: Objects) -> None:
        with torch.enable_grad():
            free = self.exponents.clone().requires_grad_()
            solver = torch.optim.LBFGS([free], max_iter=60, line_search_fn="strong_wolfe")

            def loss() -> float:
                solver.zero_grad()
                scores = self._scores(objects, free, without_own=True)
                # A weak penalty keeps the exponents of unused evidence at their initial values.
                pull = 1e-4 * (free - self.exponents).square().sum()
                value = F.cross_entropy(scores, objects.classes) + pull
                value.backward()
                return float(value.detach())

            solver.step(loss)
        self.exponents.copy_(free.detach())

    def _scores(self, objects: Objects, exponents: Tensor, *, without_own: bool) -> Tensor:
        """Unnormalised log-probabilities (M, C) of all objects.

        If `without_own`, the counts for an object leave out the image that contains it.
        """
        own = self._counts(objects) if without_own else None
        known = objects.visible & (objects.classes >= 0)
        classes = objects.classes.clamp(min=0)
        marginal = (self.seen + 1.0) / (self.seen + 1.0).sum()
        seen = self.seen if own is None else (self.seen - own[objects.image_of]).clamp(min=0.0)
        scores = (seen + 1.0).log().expand(len(classes), -1)
        others, crowd, place, size = exponents[:4]
        pseudo = exponents[4].exp()
        if "company" in self.evidence:
            lifts = self._class_lifts(objects, own, marginal, pseudo) * known[:, None]
            sums = lifts.new_zeros(int(objects.image_of.max()) + 1 if len(known) else 0,
                                   self.num_classes)  # fmt: skip
            sums = sums.index_add(0, objects.image_of, lifts)
            count = torch.bincount(objects.image_of, weights=known.double(), minlength=len(sums))
            number = (count[objects.image_of] - known.double()).clamp(min=1.0)
            around = sums[objects.image_of] - lifts
            scores = scores + others * number.pow(-crowd)[:, None] * around
        for name, table, where, weight in (
            ("place", self.cells, cell_of(objects), place),
            ("size", self.forms, form_of(objects), size),
        ):
            if name in self.evidence:
                scores = scores + weight * _lifts(table, where, pseudo, classes, own is not None)
        return scores

    def _class_lifts(
        self, objects: Objects, own: Tensor | None, marginal: Tensor, pseudo: Tensor
    ) -> Tensor:
        """Log lift (M, C) that object m gives to class c of another object in the same image."""
        classes = objects.classes.clamp(min=0)
        together = self.pairs[:, classes].T  # (M, C)
        totals = self.pairs.sum(dim=1).expand(len(classes), -1)
        if own is not None:
            mine = own[objects.image_of]  # (M, C) objects of each class on the image
            same = mine.gather(1, classes[:, None])
            itself = F.one_hot(classes, self.num_classes)
            together = (together - (mine - itself) * same).clamp(min=0.0)
            totals = (totals - mine * (mine.sum(dim=1, keepdim=True) - 1.0)).clamp(min=0.0)
        expected = marginal[classes][:, None]
        smoothed = (together + pseudo * expected) / (totals + pseudo)
        return smoothed.log() - expected.log()

    def _counts(self, objects: Objects) -> Tensor:
        """Number of objects of each class in each image, (N, C)."""
        known = objects.classes >= 0
        rows = int(objects.image_of.max()) + 1 if len(objects.image_of) else 0
        there = torch.zeros(
            rows, self.num_classes, dtype=torch.float64, device=objects.classes.device
        )
        where = (objects.image_of[known], objects.classes[known])
        one = torch.ones((), dtype=torch.float64, device=there.device)
        return there.index_put_(where, one, accumulate=True)


def _lifts(table: Tensor, where: Tensor, pseudo: Tensor, classes: Tensor, own: bool) -> Tensor:
    """Log lift log p(bin | class) - log p(bin) of each object's bin, (M, C).

    `table` (C, bins) holds the counts and `where` (M,) the bin of each object. With `own` the
    counts for an object leave out that object.
    """
    marginal = (table.sum(dim=0) + 1.0) / (table.sum(dim=0) + 1.0).sum()
    counts, totals = table[:, where].T, table.sum(dim=1).expand(len(where), -1)
    if own:
        itself = F.one_hot(classes, len(table))
        # An augmented box may lie in another bin than the original box that was counted.
        counts, totals = (counts - itself).clamp(min=0.0), totals - itself
    expected = marginal[where][:, None]
    return ((counts + pseudo * expected) / (totals + pseudo)).log() - expected.log()


def cell_of(objects: Objects) -> Tensor:
    """Index (M,) of the image cell, of `ROWS` x `COLUMNS`, that contains the centre of each box."""
    centres = (objects.boxes[:, :2] + objects.boxes[:, 2:]) / 2
    column = (centres[:, 0] * COLUMNS).long().clamp(0, COLUMNS - 1)
    row = (centres[:, 1] * ROWS).long().clamp(0, ROWS - 1)
    return row * COLUMNS + column


def form_of(objects: Objects) -> Tensor:
    """Index (M,) of the joint bin of each box's area and aspect ratio."""
    sides = (objects.boxes[:, 2:] - objects.boxes[:, :2]).clamp(min=1e-6)
    ratio = sides[:, 0] / sides[:, 1] * objects.aspects
    area = torch.bucketize(sides.prod(dim=1), sides.new_tensor(AREA_FRACTIONS))
    return area * (len(SHAPES) + 1) + torch.bucketize(ratio, sides.new_tensor(SHAPES))
