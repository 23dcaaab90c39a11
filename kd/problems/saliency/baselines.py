"""References of saliency maps: the centre prior and other observers.

The floor is the **centre prior**: fixations of the training images, whatever is on them. It is a
smoothed histogram over relative places. On OSIE (500 images to learn from, 100 to ask about) it
foretells fixations by 0.54 bits better than a uniform map, a fitted Gaussian of any direction by
0.50: people look at the centre, but not in the shape of a Gaussian.

The ceiling is **other observers**: each person's fixations, foretold by those of all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.errors import UserError
from kd.metrics.records import Records
from kd.metrics.saliency import METRICS, NAN, SaliencyTruth, Size, density_of, fixation_density

# Of the prior, in sides of the image. On OSIE 0.03 and 0.05 are worse by 0.001 and 0.003 bits.
PRIOR_SIGMA = 0.04
# Share of a uniform map in the prior, so that no place is impossible.
PRIOR_UNIFORM = 0.01
# Share of the prior in what others foretell: they are few, and not all that is looked at. On OSIE
# (12 images) KLD is best at it, of 0.05, 0.1, 0.2, 0.3; IG at 0.05, by 0.02 bits.
OTHERS_PRIOR = 0.1
_BY_MAP = ("KLD", "CC", "SIM")


def relative(fixations: Tensor, size: Size) -> Tensor:
    """(K, 2) places in 0..1, of fixations in pixels of an image of (height, width)."""
    return fixations.double() / torch.tensor([size[1], size[0]], dtype=torch.float64)


class CentrePrior:
    """Where people look on an image that nobody knows anything of, but its size.

    Args:
        places: (K, 2) `relative` places of all fixations on training images.
        sigma: Of the smoothing, in sides of the image.
        uniform: Share of a uniform map in it.

    Raises:
        UserError: No fixation, or one outside of its image.
    """

    def __init__(
        self, places: Tensor, *, sigma: float = PRIOR_SIGMA, uniform: float = PRIOR_UNIFORM
    ) -> None:
        if not len(places):
            raise UserError("the centre prior: no fixation on any training image")
        if not ((places >= 0) & (places < 1)).all():
            raise UserError("the centre prior: places of fixations have to be from 0 to below 1")
        self._places, self._sigma, self._uniform = places.double(), sigma, uniform
        self._known: dict[Size, Tensor] = {}

    def density(self, size: Size) -> Tensor:
        """(H, W) float64 of sum 1 for an image of (height, width); the same tensor each time."""
        if size not in self._known:
            height, width = size
            # Rounding may bring a place just below 1 to the border.
            last = torch.tensor([width - 1, height - 1])
            pixels = (self._places * torch.tensor([width, height])).floor().minimum(last)
            smooth = fixation_density(pixels, size, (self._sigma * height, self._sigma * width))
            flat = self._uniform / (height * width)
            self._known[size] = density_of((1 - self._uniform) * smooth + flat)
        return self._known[size]


def foretold(
    fixations: Tensor, size: Size, *, sigma: float, prior: Tensor | None = None,
    share: float = OTHERS_PRIOR,
) -> Tensor:  # fmt: skip
    """Predict where a person will look from the fixations of others on the same image.

    Args:
        fixations: (K, 2) theirs.
        size: (height, width).
        sigma: Of the smoothing, in pixels.
        prior: (H, W) where people look on any image; a uniform map where none is given.
        share: Of the prior in it.

    Returns:
        (H, W) float64 of sum 1.
    """
    known = density_of(torch.ones(size) if prior is None else prior)
    if not len(fixations):
        return known
    return (1 - share) * fixation_density(fixations, size, sigma) + share * known


def each_left_out(
    truth: SaliencyTruth, subjects: Tensor, *, sigma: float, share: float = OTHERS_PRIOR
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each person the map that all others foretell, (H, W), and who is meant, (K,) bool.

    Args:
        truth: Everybody's fixations.
        subjects: (K,) whose each fixation is.
        sigma: Of the smoothing, in pixels.
        share: Of the prior.

    Raises:
        UserError: As many subjects as fixations are needed.
    """
    _check(truth, subjects)
    height, width = truth.density.shape
    for subject in subjects.unique():
        own = subjects == subject
        others = truth.fixations[~own]
        if len(others):
            said = foretold(others, (height, width), sigma=sigma, prior=truth.prior, share=share)
            yield said, own


def inter_observer(
    truth: SaliencyTruth, subjects: Tensor, *, sigma: float, share: float = OTHERS_PRIOR
) -> dict[str, float]:
    """How well people foretell each other: every number of `METRICS`.

    Those of fixations are means over people, weighted by their fixations, of the map that all
    others foretell: nobody foretells himself, so a model can be set beside them. (A pixel that only
    others fixated is a negative of `AUC_Judd` here; these are few.) Maps cannot be compared so:
    the truth is of everybody. `KLD`, `CC` and `SIM` are those of the map that one half of the
    people foretells against the density of the other half, the mean of both ways; halves, every
    other person by number, are noisier than everybody, so a model can be above these.

    Args:
        truth: Everybody's fixations on one image.
        subjects: (K,) whose each fixation is.
        sigma: Of the smoothing, in pixels: that of `truth.density`.
        share: Of the prior in what others foretell.

    Returns:
        By name, NaN where fewer than two people looked or the truth says nothing.

    Raises:
        UserError: As many subjects as fixations are needed.
    """
    _check(truth, subjects)
    people = subjects.unique()
    if len(people) < 2:
        return dict.fromkeys(METRICS, NAN)
    size = (truth.density.shape[0], truth.density.shape[1])
    totals = dict.fromkeys((name for name in METRICS if name not in _BY_MAP), 0.0)
    for said, own in each_left_out(truth, subjects, sigma=sigma, share=share):
        one = SaliencyTruth(truth.density, truth.fixations[own], truth.others, truth.prior)
        weight = int(own.sum()) / len(subjects)
        for name in totals:
            totals[name] += weight * METRICS[name](said, one)
    first = torch.isin(subjects, people[::2])
    halves = {name: 0.0 for name in _BY_MAP}
    for own in (first, ~first):
        said = foretold(truth.fixations[own], size, sigma=sigma, prior=truth.prior, share=share)
        true = fixation_density(truth.fixations[~own], size, sigma)
        for name in _BY_MAP:
            halves[name] += METRICS[name](said, SaliencyTruth(true, truth.fixations)) / 2
    return {name: (halves | totals)[name] for name in METRICS}


def _check(truth: SaliencyTruth, subjects: Tensor) -> None:
    if subjects.shape != (len(truth.fixations),):
        raise UserError(
            f"subjects are {tuple(subjects.shape)} for {len(truth.fixations)} fixations; "
            "each fixation is one person's"
        )


Float = NDArray[np.float64]

CENTRE, OBSERVERS = "centre_prior", "other_observers"  # arrays of records
NAMES = {CENTRE: "centre prior", OBSERVERS: "other observers"}
ABOUT = {
    CENTRE: "centre prior: where people look on train images, whatever is shown",
    OBSERVERS: "other observers: each person's fixations foretold by all others'; KLD, CC and SIM "
    "are of halves of them, noisier than the truth of everybody: models may be above",
}


class GazeTruth(Protocol):
    """A split's truth."""

    def __call__(self, number: int) -> SaliencyTruth:
        """Of the image at a place in the split."""
        ...

    @property
    def references(self) -> Mapping[str, Float]:
        """By name of an array, (images of the split, M)."""
        ...


def references(records: Records) -> dict[str, Records]:
    """The references as records of the same images, by their names in tables.

    Those that the records do not hold are left out, as are other observers where nobody's
    fixations could be foretold.
    """
    found: dict[str, Records] = {}
    for array, name in NAMES.items():
        if array in records and not np.isnan(records[array]).all():
            columns = {m: records[array][:, place] for place, m in enumerate(METRICS)}
            found[name] = {**records, **columns}
    return found


def notes(records: Records) -> list[str]:
    """Notes about the references of a table, with the number of images that have them."""
    lines = []
    for array in NAMES:
        if array not in records or np.isnan(records[array]).all():
            continue
        known = int((~np.isnan(records[array])).any(axis=1).sum())
        whole = len(records["image_ids"])
        lines.append(ABOUT[array] + (f" (on {known} of {whole} images)" if known < whole else ""))
    return lines
