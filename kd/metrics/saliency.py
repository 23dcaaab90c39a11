"""How well a saliency map tells where people look: the seven numbers of one image.

Definitions are those of Bylinskii et al., 2019, "What do different evaluation metrics tell us about
saliency models?", https://arxiv.org/abs/1604.03605, and of Kümmerer et al., 2015, for information
gain, with the choices of the `pysaliency` package where papers leave one:

* `KLD`, `SIM` and `IG` are about densities: a map divided by its sum. One of zeros says as much as
  a uniform one, and is taken for it.
* `KLD` has the constants of the MIT/Tübingen benchmark and does not depend on a map's scale.
* A map that is constant has a `CC` and an `NSS` of 0, and an AUC of 0.5.
* `AUC_Judd` takes the pixels without a fixation as negatives and the values at fixations as
  thresholds. No noise is added to break ties: trapezoids count a tie half, and the number
  does not depend on a seed or on the map's scale.
* `sAUC` takes where people looked on other images as negatives, at all thresholds, ties half.

Where the truth says nothing a number is NaN: those about fixations without one, `KLD`, `CC` and
`SIM` of a truth of zeros, `CC` of a constant truth, `sAUC` without others, `IG` without prior.
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
    """(K,) values of a map (H, W) at the pixels of fixations (K, 2).

    Args:
        saliency: (H, W).
        fixations: (K, 2) x, y.
        what: They are called in messages.

    Raises:
        UserError: They are not (K, 2), or one lies outside of the frame.
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
            f"image of {width} x {height}; leave such ones out"
        )
    return saliency[y.long(), x.long()]


def fixation_density(fixations: Tensor, size: Size, sigma: float | tuple[float, float]) -> Tensor:
    """Fixations, each smoothed by a Gaussian of which nothing falls outside of the frame.

    Args:
        fixations: (K, 2) x, y in pixels; a pixel is the floor of both.
        size: (height, width).
        sigma: In pixels; down and across, where two are given.

    Returns:
        (H, W) float64 of sum 1, zeros without fixations.

    Raises:
        UserError: A fixation lies outside of the frame, or a sigma is not above 0.
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
    """Fixations of one image at the same relative place of another.

    Args:
        fixations: (K, 2) x, y in pixels.
        size: (height, width) of their image.
        to: (height, width) of the other.

    Returns:
        (K, 2) float64, inside the frame also where rounding would bring one to its very border.
    """
    scale = torch.tensor([to[1] / size[1], to[0] / size[0]], dtype=torch.float64)
    last = torch.tensor([to[1], to[0]], dtype=torch.float64)
    last = torch.nextafter(last, torch.zeros_like(last))
    return torch.minimum(fixations.double() * scale, last)


# Added in KLD as the benchmark's code does; the least density that information gain counts with,
# so that a fixation where a map is 0 costs it 52 bits, and not everything.
EPS: Final = 2.2204e-16

NAN: Final = math.nan


@dataclass(frozen=True)
class SaliencyTruth:
    """Where people looked on one image.

    Args:
        density: (H, W) fixations smoothed, of any scale.
        fixations: (K, 2) x, y in pixels of the image; a pixel is the floor of both.
        others: (J, 2) fixations on other images, moved to this one's size (`fixations.moved`).
        prior: (H, W) where people look on any image, of any scale.
    """

    density: Tensor
    fixations: Tensor
    others: Tensor | None = None
    prior: Tensor | None = None


def kld(prediction: Tensor, truth: Tensor) -> float:
    """KL(truth || prediction) in nats, 0 where they are equal; smaller is better.

    Args:
        prediction: (H, W), not negative, of any scale; so in all functions here.
        truth: (H, W) density, of any scale.

    Raises:
        UserError: Sizes that differ, values below zero or not finite; so in all functions here.
    """
    said, true = _same_size(prediction, truth)
    if not true.any():
        return NAN
    p, q = density_of(said), density_of(true)
    return float((q * (EPS + q / (p + EPS)).log()).sum())


def cc(prediction: Tensor, truth: Tensor) -> float:
    """Pearson's correlation of two maps, in -1..1."""
    said, true = _same_size(prediction, truth)
    if _constant(true):
        return NAN
    if _constant(said):
        return 0.0
    said, true = said - said.mean(), true - true.mean()
    # Each to its largest value first: squares of tiny densities would underflow.
    said, true = said / said.abs().max(), true / true.abs().max()
    return float((said * true).sum() / (said.square().sum() * true.square().sum()).sqrt())


def sim(prediction: Tensor, truth: Tensor) -> float:
    """What two densities share, in 0..1."""
    said, true = _same_size(prediction, truth)
    if not true.any():
        return NAN
    return float(torch.minimum(density_of(said), density_of(true)).sum())


def nss(prediction: Tensor, fixations: Tensor) -> float:
    """Mean over fixations of the map, of which mean and variance are made 0 and 1.

    Peters et al., 2005. Chance is 0.

    Args:
        prediction: As in `kld`.
        fixations: (K, 2) x, y in pixels.

    Raises:
        UserError: Also for a fixation outside of the frame; so in all functions of fixations.
    """
    said = _map(prediction, "prediction")
    values = values_at(said, fixations)
    if not len(values):
        return NAN
    if _constant(said):
        return 0.0
    peak = said.max()  # as in `cc`
    said, values = said / peak, values / peak
    return float(((values - said.mean()) / said.std(correction=0)).mean())


def auc_judd(prediction: Tensor, fixations: Tensor) -> float:
    """Area under the curve of fixated pixels against all that nobody looked at.

    Judd et al., 2009. A pixel that is fixated twice is two positives. NaN also where every pixel
    is fixated.
    """
    said = _map(prediction, "prediction")
    positives = values_at(said, fixations).sort().values
    free = torch.ones_like(said, dtype=torch.bool)
    columns, rows = fixations.long().unbind(1)
    free[rows, columns] = False
    negatives = said[free]
    if not len(positives) or not len(negatives):
        return NAN
    # The curve has a corner at each positive and is straight between two: a negative there stands
    # beside all positives above it, and half of those at the corner below.
    not_above = torch.searchsorted(positives, negatives, right=True)
    how_many = torch.bincount(not_above, minlength=len(positives) + 1)
    below = torch.cat([positives.new_tensor([-math.inf]), positives])
    at_corner = torch.arange(len(below)) - torch.searchsorted(positives, below)
    return _area(how_many, at_corner, len(negatives))


def shuffled_auc(prediction: Tensor, fixations: Tensor, others: Tensor) -> float:
    """Area under the curve of fixations here against fixations on other images.

    Tatler et al., 2005; Zhang et al., 2008. What everybody does on every image, looking at the
    centre, is worth nothing.

    Args:
        prediction: As in `kld`.
        fixations: (K, 2) x, y in pixels.
        others: (J, 2) those on other images, in pixels of this one; some may be where this
            image was looked at as well.
    """
    said = _map(prediction, "prediction")
    positives = values_at(said, fixations).sort().values
    negatives = values_at(said, others, "fixation of others")
    if not len(positives) or not len(negatives):
        return NAN
    not_above = torch.searchsorted(positives, negatives, right=True)
    equal = not_above - torch.searchsorted(positives, negatives)
    beaten = int((len(positives) - not_above).sum()) + 0.5 * int(equal.sum())
    return beaten / (len(positives) * len(negatives))


def information_gain(prediction: Tensor, fixations: Tensor, prior: Tensor) -> float:
    """Bits a fixation by which a density foretells fixations better than the prior does.

    Kümmerer et al., 2015, https://doi.org/10.1073/pnas.1510393112. Densities count with at least
    `EPS`.

    Args:
        prediction: As in `kld`.
        fixations: (K, 2) x, y in pixels.
        prior: (H, W), of any scale.
    """
    said, known = _same_size(prediction, prior, "prior")
    if not len(fixations):
        return NAN
    own, without = (log2_at(one, fixations) for one in (said, known))
    return float((own - without).mean())


def log2_at(saliency: Tensor, fixations: Tensor) -> Tensor:
    """Logarithm to the base 2 of a map's density at fixations, (K,)."""
    return values_at(density_of(saliency), fixations).clamp_min(EPS).log2()


# Every number by its name in tables, in their order.
METRICS: dict[str, Callable[[Tensor, SaliencyTruth], float]] = {
    "KLD": lambda said, truth: kld(said, truth.density),
    "CC": lambda said, truth: cc(said, truth.density),
    "SIM": lambda said, truth: sim(said, truth.density),
    "NSS": lambda said, truth: nss(said, truth.fixations),
    "AUC_Judd": lambda said, truth: auc_judd(said, truth.fixations),
    "sAUC": lambda said, truth: (
        NAN if truth.others is None else shuffled_auc(said, truth.fixations, truth.others)
    ),
    "IG": lambda said, truth: (
        NAN if truth.prior is None else information_gain(said, truth.fixations, truth.prior)
    ),
}


def measure(prediction: Tensor, truth: SaliencyTruth) -> dict[str, float]:
    """Every number of `METRICS`, NaN where the truth says nothing.

    Raises:
        UserError: Sizes that differ, values below zero or not finite, fixations outside.
    """
    said, true = _same_size(prediction, truth.density)  # in float64, once for all
    whole = replace(truth, density=true)
    return {name: number(said, whole) for name, number in METRICS.items()}


def density_of(saliency: Tensor) -> Tensor:
    """A map divided by its sum, float64; a uniform one of a map of zeros."""
    whole = saliency.double()
    total = whole.sum()
    return whole / total if total > 0 else torch.full_like(whole, 1 / whole.numel())


def _area(how_many: Tensor, at_corner: Tensor, negatives: int) -> float:
    """Mean over negatives of the share of positives above them, and half of those beside.

    Args:
        how_many: (K + 1,) negatives with r of the K positives not above them.
        at_corner: (K + 1,) of these positives, how many count half.
        negatives: Their number.
    """
    positives = len(how_many) - 1
    beaten = positives - torch.arange(positives + 1) + 0.5 * at_corner.double()
    return float((how_many * beaten).sum() / (positives * negatives))


def _constant(saliency: Tensor) -> bool:
    """By its values: a variance is rarely 0 to the last digit."""
    least, most = saliency.aminmax()
    return bool(least == most)


def _same_size(prediction: Tensor, truth: Tensor, what: str = "truth") -> tuple[Tensor, Tensor]:
    said, true = _map(prediction, "prediction"), _map(truth, what)
    if said.shape != true.shape:
        (h, w), (height, width) = said.shape, true.shape
        raise UserError(
            f"the prediction is {w} x {h}, the {what} {width} x {height}; scale it to that first"
        )
    return said, true


def _map(saliency: Tensor, what: str) -> Tensor:
    """As float64, checked."""
    if saliency.ndim != 2 or not saliency.numel():
        raise UserError(f"the {what} is {tuple(saliency.shape)}, expected (H, W)")
    whole = saliency.double()
    least, most = (float(bound) for bound in whole.aminmax())  # NaN where there is one
    if not math.isfinite(least) or not math.isfinite(most):
        raise UserError(f"the {what} holds values that are not finite")
    if least < 0:
        raise UserError(
            f"the {what} holds values below zero ({least:.4g}); logits have to become a density"
        )
    return whole
