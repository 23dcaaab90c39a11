"""Reference predictions of saliency maps: the centre prior and other observers.

The **centre prior**, the lower reference, predicts the same map for all images: a smoothed
histogram of the relative positions of all train fixations. On OSIE it gains 0.54 bits per fixation
over a uniform map; a fitted Gaussian gains 0.50. The upper reference, **other observers**, predicts
each person's fixations from those of everyone else on the same image.
"""

from __future__ import annotations

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
# Weight of a uniform map in the prior, so that the density is positive everywhere.
PRIOR_UNIFORM = 0.01
# Weight of the prior in predictions from other observers, because these are few. Among 0.05, 0.1,
# 0.2 and 0.3, the value 0.1 has the best KLD on OSIE (12 images); 0.05 improves IG by 0.02 bits.
OTHERS_PRIOR = 0.1
_BY_MAP = ("KLD", "CC", "SIM")
CENTRE, OBSERVERS = "centre_prior", "other_observers"  # names of arrays in the records
NAMES = {CENTRE: "centre prior", OBSERVERS: "other observers"}
ABOUT = {
    CENTRE: "centre prior: density of fixations on train images, whatever the image",
    OBSERVERS: "other observers: each person's fixations predicted from everybody else's; KLD, CC "
    "and SIM compare two halves of the people, which are noisier, so models may be better",
}

Float = NDArray[np.float64]


def relative(fixations: Tensor, size: Size) -> Tensor:
    """Convert fixations (K, 2) x, y in pixels to fractions of the image's width and height."""
    return fixations.double() / torch.tensor([size[1], size[0]], dtype=torch.float64)


class CentrePrior:
    """Predicts the density of fixations from the image's size alone.

    `places` are all train fixations, (K, 2), as fractions of the image's width and height.
    """

    def __init__(self, places: Tensor) -> None:
        if not len(places):
            raise UserError("the centre prior needs fixations, but no training image has any")
        if not ((places >= 0) & (places < 1)).all():
            raise UserError("the centre prior: relative positions of fixations must be in [0, 1)")
        self._places = places.double()
        self._known: dict[Size, Tensor] = {}

    def density(self, size: Size) -> Tensor:
        """Density (H, W) of an image, float64 with sum 1; cached for each (height, width)."""
        if size not in self._known:
            height, width = size
            # Because of rounding, a position just below 1 can fall on the image's border.
            last = torch.tensor([width - 1, height - 1])
            pixels = (self._places * torch.tensor([width, height])).floor().minimum(last)
            smooth = fixation_density(pixels, size, (PRIOR_SIGMA * height, PRIOR_SIGMA * width))
            flat = PRIOR_UNIFORM / (height * width)
            self._known[size] = density_of((1 - PRIOR_UNIFORM) * smooth + flat)
        return self._known[size]


def predict_from_others(
    fixations: Tensor, size: Size, *, sigma: float, prior: Tensor | None = None
) -> Tensor:
    """Predict a density of fixations, (H, W) float64 with sum 1, from other people's fixations.

    Args:
        fixations: Fixations of the other people, (K, 2) x, y in pixels.
        size: (height, width) of the image.
        sigma: Standard deviation of the smoothing, pixels.
        prior: Density (H, W) to mix in, such as the centre prior; None: uniform.
    """
    known = density_of(torch.ones(size) if prior is None else prior)
    if not len(fixations):
        return known
    return (1 - OTHERS_PRIOR) * fixation_density(fixations, size, sigma) + OTHERS_PRIOR * known


def inter_observer(truth: SaliencyTruth, subjects: Tensor, *, sigma: float) -> dict[str, float]:
    """Measure how well people's fixations on one image predict each other, by every metric.

    Metrics at fixations: each person is predicted from all other people; the average is weighted by
    number of fixations. `KLD`, `CC` and `SIM`: each half of the people is predicted from the other
    half. A half is noisier than all people, so a model may score better. Metrics are NaN if
    undefined or if there are fewer than two people.

    Args:
        truth: All fixations on the image.
        subjects: Index of the person who made each fixation, (K,).
        sigma: Standard deviation of the smoothing in pixels, as in `truth.density`.
    """
    if subjects.shape != (len(truth.fixations),):
        raise UserError(
            f"subjects has shape {tuple(subjects.shape)} for {len(truth.fixations)} fixations; "
            "expected one person for each fixation"
        )
    people = subjects.unique()
    if len(people) < 2:
        return dict.fromkeys(METRICS, NAN)
    size = (truth.density.shape[0], truth.density.shape[1])

    def predict(chosen: Tensor) -> Tensor:
        return predict_from_others(truth.fixations[chosen], size, sigma=sigma, prior=truth.prior)

    totals = dict.fromkeys(METRICS, 0.0)
    for subject in people:
        own = subjects == subject
        predicted, weight = predict(~own), int(own.sum()) / len(subjects)
        one = SaliencyTruth(truth.density, truth.fixations[own], truth.others, truth.prior)
        for name in METRICS.keys() - set(_BY_MAP):
            totals[name] += weight * METRICS[name](predicted, one)
    first = torch.isin(subjects, people[::2])
    for half in (first, ~first):
        true = fixation_density(truth.fixations[~half], size, sigma)
        for name in _BY_MAP:
            found = METRICS[name](predict(half), SaliencyTruth(true, truth.fixations))
            totals[name] += found / 2
    return totals


def references(records: Records) -> dict[str, Records]:
    """Records of the available references on the same images, by display name."""
    found: dict[str, Records] = {}
    for array in _present(records):
        columns = {m: records[array][:, place] for place, m in enumerate(METRICS)}
        found[NAMES[array]] = {**records, **columns}
    return found


def notes(records: Records) -> list[str]:
    """Table notes that explain each reference and on how many images it was scored."""
    lines = []
    for array in _present(records):
        known = int((~np.isnan(records[array])).any(axis=1).sum())
        whole = len(records["image_ids"])
        lines.append(ABOUT[array] + (f" (on {known} of {whole} images)" if known < whole else ""))
    return lines


def _present(records: Records) -> list[str]:
    return [name for name in NAMES if name in records and not np.isnan(records[name]).all()]
