"""References of saliency maps: the centre prior and other observers.

The lower reference is the **centre prior**: a smoothed histogram of the relative places of all
fixations on train images, whatever their content. On OSIE (500 train images, 100 val images) it
predicts fixations by 0.54 bits better than a uniform map, a fitted Gaussian with free covariance by
0.50: people look at the centre, but their fixations are not normally distributed.

The upper reference is **other observers**: each person's fixations predicted from all others'.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.errors import UserError
from kd.metrics.records import Records
from kd.metrics.saliency import METRICS, NAN, SaliencyTruth, Size, density_of, fixation_density

# Standard deviation of the prior's smoothing, as a fraction of each side of the image. On OSIE 0.03
# and 0.05 are worse by 0.001 and 0.003 bits.
PRIOR_SIGMA = 0.04
# Weight of a uniform map in the prior, so that no place is impossible.
PRIOR_UNIFORM = 0.01
# Weight of the prior in predictions from other observers, who are few. On OSIE (12 images) KLD is
# best at it, of 0.05, 0.1, 0.2, 0.3; IG at 0.05, by 0.02 bits.
OTHERS_PRIOR = 0.1
_BY_MAP = ("KLD", "CC", "SIM")


def relative(fixations: Tensor, size: Size) -> Tensor:
    """(K, 2) places in 0..1, of fixations in pixels of an image of (height, width)."""
    return fixations.double() / torch.tensor([size[1], size[0]], dtype=torch.float64)


class CentrePrior:
    """Density of fixations on an image of which only the size is known.

    Args:
        places: (K, 2) `relative` places of all fixations on train images.
        sigma: Standard deviation of the smoothing, as a fraction of each side of the image.
        uniform: Weight of a uniform map.

    Raises:
        UserError: There are no fixations, or one lies outside of its image.
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
        """(H, W) float64 of sum 1 for an image of (height, width), cached by size."""
        if size not in self._known:
            height, width = size
            # Rounding may bring a place just below 1 to the border.
            last = torch.tensor([width - 1, height - 1])
            pixels = (self._places * torch.tensor([width, height])).floor().minimum(last)
            smooth = fixation_density(pixels, size, (self._sigma * height, self._sigma * width))
            flat = self._uniform / (height * width)
            self._known[size] = density_of((1 - self._uniform) * smooth + flat)
        return self._known[size]


def predict_from_others(
    fixations: Tensor, size: Size, *, sigma: float, prior: Tensor | None = None,
    prior_weight: float = OTHERS_PRIOR,
) -> Tensor:  # fmt: skip
    """Predict where a person looks from the fixations of others on the same image.

    Args:
        fixations: (K, 2), of the others.
        size: (height, width).
        sigma: Standard deviation of the smoothing, pixels.
        prior: (H, W) density on any image; None: uniform.
        prior_weight: Weight of the prior.

    Returns:
        (H, W) float64 of sum 1.
    """
    known = density_of(torch.ones(size) if prior is None else prior)
    if not len(fixations):
        return known
    return (1 - prior_weight) * fixation_density(fixations, size, sigma) + prior_weight * known


def each_left_out(
    truth: SaliencyTruth, subjects: Tensor, *, sigma: float, prior_weight: float = OTHERS_PRIOR
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each person, the map (H, W) predicted from all others, and their fixations, (K,) bool.

    Args and errors are those of `inter_observer`.
    """
    _check(truth, subjects)
    height, width = truth.density.shape
    for subject in subjects.unique():
        own = subjects == subject
        others = truth.fixations[~own]
        if len(others):
            yield predict_from_others(
                others, (height, width), sigma=sigma, prior=truth.prior, prior_weight=prior_weight
            ), own  # fmt: skip


def inter_observer(
    truth: SaliencyTruth, subjects: Tensor, *, sigma: float, prior_weight: float = OTHERS_PRIOR
) -> dict[str, float]:
    """How well people predict each other: every metric of `METRICS`.

    Metrics at fixations score the map predicted from all others at each person's fixations, and
    are averaged with the number of fixations as weight. Nobody predicts themselves, so a model can
    be compared. (Pixels that only others fixated are negatives of `AUC_Judd` here; these are few.)
    `KLD`, `CC` and `SIM` compare maps, and the ground truth includes everybody: they score the map
    predicted from one half of the people (every other person) against the density of the other
    half, averaged over both ways. Halves are noisier, so a model may be better than these.

    Args:
        truth: Everybody's fixations on one image.
        subjects: (K,) the person of each fixation.
        sigma: Standard deviation of the smoothing, pixels: that of `truth.density`.
        prior_weight: Weight of the prior in predictions from others.

    Returns:
        By name; NaN with fewer than two people, or where a metric is undefined.

    Raises:
        UserError: There are not as many subjects as fixations.
    """
    _check(truth, subjects)
    people = subjects.unique()
    if len(people) < 2:
        return dict.fromkeys(METRICS, NAN)
    size = (truth.density.shape[0], truth.density.shape[1])
    totals = dict.fromkeys((name for name in METRICS if name not in _BY_MAP), 0.0)
    for predicted, own in each_left_out(truth, subjects, sigma=sigma, prior_weight=prior_weight):
        one = SaliencyTruth(truth.density, truth.fixations[own], truth.others, truth.prior)
        weight = int(own.sum()) / len(subjects)
        for name in totals:
            totals[name] += weight * METRICS[name](predicted, one)
    first = torch.isin(subjects, people[::2])
    halves = dict.fromkeys(_BY_MAP, 0.0)
    for own in (first, ~first):
        predicted = predict_from_others(
            truth.fixations[own], size, sigma=sigma, prior=truth.prior, prior_weight=prior_weight
        )
        true = fixation_density(truth.fixations[~own], size, sigma)
        for name in _BY_MAP:
            halves[name] += METRICS[name](predicted, SaliencyTruth(true, truth.fixations)) / 2
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
    CENTRE: "centre prior: density of fixations on train images, whatever the image",
    OBSERVERS: "other observers: each person's fixations predicted from all others'; KLD, CC and "
    "SIM compare halves of them, noisier than everybody's: models may be better",
}


def references(records: Records) -> dict[str, Records]:
    """The references as records of the same images, by their names in tables.

    References that the records lack, or that are NaN throughout, are left out.
    """
    found: dict[str, Records] = {}
    for array in _present(records):
        columns = {m: records[array][:, place] for place, m in enumerate(METRICS)}
        found[NAMES[array]] = {**records, **columns}
    return found


def notes(records: Records) -> list[str]:
    """Table notes on the references, with the number of images that have them."""
    lines = []
    for array in _present(records):
        known = int((~np.isnan(records[array])).any(axis=1).sum())
        whole = len(records["image_ids"])
        lines.append(ABOUT[array] + (f" (on {known} of {whole} images)" if known < whole else ""))
    return lines


def _present(records: Records) -> list[str]:
    return [name for name in NAMES if name in records and not np.isnan(records[name]).all()]
