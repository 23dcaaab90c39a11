"""Metrics of saliency maps: seven numbers for each image.

Definitions follow Bylinskii et al., 2019, "What do different evaluation metrics tell us about
saliency models?", https://arxiv.org/abs/1604.03605, and, for information gain, Kümmerer et al.,
2015, with the choices of the `pysaliency` package where papers leave one open:

* `KLD`, `SIM` and `IG` compare densities: maps divided by their sums. A map of zeros is treated as
  uniform.
* `KLD` has the constants of the MIT/Tübingen benchmark and does not depend on a map's scale.
* A constant map has a `CC` and an `NSS` of 0, and an AUC of 0.5.
* `AUC_Judd` uses the pixels without a fixation as negatives and the values at fixations as
  thresholds. No noise breaks ties: trapezoids count a tie half, and the number depends on neither a
  seed nor the map's scale.
* `sAUC` uses fixations on other images as negatives, at all thresholds; ties count half.

A number is NaN where the ground truth does not define it: fixation metrics without fixations;
`KLD`, `CC` and `SIM` for a density of zeros; `CC` for a constant density; `sAUC` without others;
`IG` without a prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from kd.errors import UserError

Size = tuple[int, int]  # height, width


def values_at(saliency: Tensor, fixations: Tensor, what: str = "fixation") -> Tensor:
    """Values (K,) of a map (H, W) at fixations (K, 2) x, y.

    Raises:
        UserError: They are not (K, 2), or one lies outside of the image.
    """
    if fixations.ndim != 2 or fixations.shape[1] != 2:
        raise UserError(f"{what}s are {tuple(fixations.shape)}, expected (K, 2): x, y")
    height, width = saliency.shape
    x, y = fixations.unbind(1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)  # false for NaN
    if not inside.all():
        wrong = int((~inside).nonzero()[0])
        raise UserError(
            f"{what} {wrong} at x {float(x[wrong]):g}, y {float(y[wrong]):g} lies outside of the "
            f"image of {width} x {height}; leave it out"
        )
    return saliency[y.long(), x.long()]


def fixation_density(fixations: Tensor, size: Size, sigma: float | tuple[float, float]) -> Tensor:
    """Fixations (K, 2) smoothed by a Gaussian that is reflected at the border.

    Args:
        fixations: (K, 2) x, y in pixels; a pixel is the floor of both.
        size: (height, width).
        sigma: Pixels; or (vertical, horizontal).

    Returns:
        (H, W) float64 of sum 1, zeros without fixations.
    """
    sigmas = np.broadcast_to(np.asarray(sigma, dtype=np.float64), 2)
    if not (sigmas > 0).all():
        raise UserError(f"sigma is {sigma}; fixations are smoothed by more than 0 pixels")
    places = torch.arange(size[0] * size[1]).view(size)
    pixels = values_at(places, fixations)
    counts = torch.bincount(pixels, minlength=places.numel()).view(size).double()
    smooth = gaussian_filter(counts.numpy(), sigmas, mode="reflect")
    return torch.from_numpy(smooth) / max(len(pixels), 1)


def moved(fixations: Tensor, size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Scale fixations (K, 2) from an image of `size` to one of size `to`, (height, width) both.

    The result is float64 and stays inside the image where rounding would reach its border.
    """
    scale = torch.tensor([to[1] / size[1], to[0] / size[0]], dtype=torch.float64)
    last = torch.tensor([to[1], to[0]], dtype=torch.float64)
    last = torch.nextafter(last, torch.zeros_like(last))
    return torch.minimum(fixations.double() * scale, last)


# Added in KLD as in the benchmark's code; also the least density of information gain, so that a
# fixation where a map is 0 costs 52 bits, not infinitely many.
EPS: Final = 2.2204e-16

NAN: Final = math.nan


@dataclass(frozen=True)
class SaliencyTruth:
    """Ground truth of one image.

    Args:
        density: (H, W) smoothed fixations, of any scale.
        fixations: (K, 2) x, y in pixels of the image; a pixel is the floor of both.
        others: (J, 2) fixations on other images, scaled to this one's size (`moved`).
        prior: (H, W) density of fixations on any image, of any scale.
    """

    density: Tensor
    fixations: Tensor
    others: Tensor | None = None
    prior: Tensor | None = None


def kld(prediction: Tensor, truth: Tensor) -> float:
    """KL(truth || prediction) in nats, 0 where they are equal; lower is better.

    Args:
        prediction: (H, W), not negative, of any scale; so in all functions here.
        truth: (H, W) density, of any scale.

    Raises:
        UserError: Different sizes, negative or non-finite values; so in all functions here.
    """
    predicted, true = _same_size(prediction, truth)
    if not true.any():
        return NAN
    p, q = density_of(predicted), density_of(true)
    return float((q * (EPS + q / (p + EPS)).log()).sum())


def cc(prediction: Tensor, truth: Tensor) -> float:
    """Pearson's correlation of two maps, in -1..1."""
    predicted, true = _same_size(prediction, truth)
    if _constant(true):
        return NAN
    if _constant(predicted):
        return 0.0
    predicted, true = predicted - predicted.mean(), true - true.mean()
    # Scale first: squares of tiny densities would underflow.
    predicted, true = predicted / predicted.abs().max(), true / true.abs().max()
    return float((predicted * true).sum() / (predicted.square().sum() * true.square().sum()).sqrt())


def sim(prediction: Tensor, truth: Tensor) -> float:
    """Similarity: the overlap of two densities, in 0..1."""
    predicted, true = _same_size(prediction, truth)
    if not true.any():
        return NAN
    return float(torch.minimum(density_of(predicted), density_of(true)).sum())


def nss(prediction: Tensor, fixations: Tensor) -> float:
    """Mean over fixations (K, 2) of the map, standardised to mean 0 and variance 1.

    Peters et al., 2005. Chance is 0.
    """
    predicted = _map(prediction, "prediction")
    values = values_at(predicted, fixations)
    if not len(values):
        return NAN
    if _constant(predicted):
        return 0.0
    peak = predicted.max()  # as in `cc`
    predicted, values = predicted / peak, values / peak
    return float(((values - predicted.mean()) / predicted.std(correction=0)).mean())


def auc_judd(prediction: Tensor, fixations: Tensor) -> float:
    """Area under the ROC curve of fixated pixels against all others; NaN if every pixel is fixated.

    Judd et al., 2009. A pixel that is fixated twice is two positives.
    """
    predicted = _map(prediction, "prediction")
    positives = values_at(predicted, fixations).sort().values
    free = torch.ones_like(predicted, dtype=torch.bool)
    columns, rows = fixations.long().unbind(1)
    free[rows, columns] = False
    negatives = predicted[free]
    if not len(positives) or not len(negatives):
        return NAN
    # The curve has a corner at each positive and is straight between two: a negative there is below
    # all positives above it, and below half of those at the corner before it.
    not_above = torch.searchsorted(positives, negatives, right=True)
    counts_at = torch.bincount(not_above, minlength=len(positives) + 1)
    below = torch.cat([positives.new_tensor([-math.inf]), positives])
    at_corner = torch.arange(len(below)) - torch.searchsorted(positives, below)
    beaten = len(positives) - torch.arange(len(below)) + 0.5 * at_corner.double()
    return float((counts_at * beaten).sum() / (len(positives) * len(negatives)))


def shuffled_auc(prediction: Tensor, fixations: Tensor, others: Tensor) -> float:
    """Area under the ROC curve of fixations (K, 2) here against those on other images (J, 2).

    Tatler et al., 2005; Zhang et al., 2008. A bias that all images share, such as to the centre,
    gains nothing. All fixations are in pixels of this image.
    """
    predicted = _map(prediction, "prediction")
    positives = values_at(predicted, fixations).sort().values
    negatives = values_at(predicted, others, "fixation of others")
    if not len(positives) or not len(negatives):
        return NAN
    not_above = torch.searchsorted(positives, negatives, right=True)
    equal = not_above - torch.searchsorted(positives, negatives)
    beaten = int((len(positives) - not_above).sum()) + 0.5 * int(equal.sum())
    return beaten / (len(positives) * len(negatives))


def information_gain(prediction: Tensor, fixations: Tensor, prior: Tensor) -> float:
    """Bits per fixation by which a density predicts fixations (K, 2) better than the prior (H, W).

    Kümmerer et al., 2015, https://doi.org/10.1073/pnas.1510393112. Densities are at least `EPS`.
    """
    predicted, known = _same_size(prediction, prior, "prior")
    if not len(fixations):
        return NAN
    own, without = (log2_at(one, fixations) for one in (predicted, known))
    return float((own - without).mean())


def log2_at(saliency: Tensor, fixations: Tensor) -> Tensor:
    """Base-2 logarithm of a map's density at fixations, (K,)."""
    return values_at(density_of(saliency), fixations).clamp_min(EPS).log2()


# By name, in the order of tables.
METRICS: dict[str, Callable[[Tensor, SaliencyTruth], float]] = {
    "KLD": lambda predicted, truth: kld(predicted, truth.density),
    "CC": lambda predicted, truth: cc(predicted, truth.density),
    "SIM": lambda predicted, truth: sim(predicted, truth.density),
    "NSS": lambda predicted, truth: nss(predicted, truth.fixations),
    "AUC_Judd": lambda predicted, truth: auc_judd(predicted, truth.fixations),
    "sAUC": lambda predicted, truth: (
        NAN if truth.others is None else shuffled_auc(predicted, truth.fixations, truth.others)
    ),
    "IG": lambda predicted, truth: (
        NAN if truth.prior is None else information_gain(predicted, truth.fixations, truth.prior)
    ),
}


def measure(prediction: Tensor, truth: SaliencyTruth) -> dict[str, float]:
    """Compute all of `METRICS`; NaN where the ground truth does not define one."""
    predicted, true = _same_size(prediction, truth.density)  # in float64, once for all
    whole = replace(truth, density=true)
    return {name: number(predicted, whole) for name, number in METRICS.items()}


def density_of(saliency: Tensor) -> Tensor:
    """A map divided by its sum, float64; uniform for a map of zeros."""
    whole = saliency.double()
    total = whole.sum()
    return whole / total if total > 0 else torch.full_like(whole, 1 / whole.numel())


def _constant(saliency: Tensor) -> bool:
    """Whether all values are equal; a variance is rarely exactly 0."""
    least, most = saliency.aminmax()
    return bool(least == most)


def _same_size(prediction: Tensor, truth: Tensor, what: str = "truth") -> tuple[Tensor, Tensor]:
    predicted, true = _map(prediction, "prediction"), _map(truth, what)
    if predicted.shape != true.shape:
        (h, w), (height, width) = predicted.shape, true.shape
        raise UserError(
            f"the prediction is {w} x {h}, the {what} {width} x {height}; scale it to that first"
        )
    return predicted, true


def _map(saliency: Tensor, what: str) -> Tensor:
    """Check a map and convert it to float64."""
    if saliency.ndim != 2 or not saliency.numel():
        raise UserError(f"the {what} is {tuple(saliency.shape)}, expected (H, W)")
    whole = saliency.double()
    least, most = (float(bound) for bound in whole.aminmax())  # NaN where there is one
    if not math.isfinite(least) or not math.isfinite(most):
        raise UserError(f"the {what} holds values that are not finite")
    if least < 0:
        raise UserError(
            f"the {what} holds values below zero ({least:.4g}); convert logits to a density"
        )
    return whole
