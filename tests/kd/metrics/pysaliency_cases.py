"""Makes `pysaliency_cases.npz`: small images and what the pysaliency package says of them.

The package is no dependency of the tests: release 0.2.22 calls `numpy.trapz` and `pkg_resources`,
which NumPy 2.4 and setuptools 82 no longer have, imports scikit-learn and torch without saying so,
and brings 200 MB of numba. To make the file again, in an environment of its own:

    pip install pysaliency "numpy<2.4" "setuptools<81" scikit-learn torch
    python tests/kd/metrics/pysaliency_cases.py tests/kd/metrics/pysaliency_cases.npz
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pysaliency
from pysaliency import metrics
from pysaliency.datasets import get_image_hash
from pysaliency.models import SaliencyMapNormalizingModel
from scipy.ndimage import gaussian_filter

SIZES = ((18, 24), (21, 17), (12, 30))


def whole(values: Any, largest: int) -> Any:
    """A map in whole numbers, 0..largest, that files keep to the last bit."""
    return np.round(values / values.max() * largest).astype(np.uint16)


def smoothed(rng: np.random.Generator, size: tuple[int, int], sigma: float) -> Any:
    """Noise, smoothed, from 0 up."""
    noise = gaussian_filter(rng.random(size), sigma)
    return noise - noise.min()


def maps_of(rng: np.random.Generator, size: tuple[int, int]) -> dict[str, Any]:
    """Maps with hardly a tie or zero, with many, and those without any shape."""
    values = smoothed(rng, size, 2.0)
    return {
        "smooth": whole(values, 60000) + 1,
        "tied": whole(values**2, 6),
        "uniform": np.full(size, 3, np.uint16),
        "zeros": np.zeros(size, np.uint16),
    }


class Stored(pysaliency.SaliencyMapModel):  # type: ignore[misc]  # the package has no types
    """Answers each stimulus with a map."""

    def __init__(self, stimuli: Any, maps: list[Any]) -> None:
        super().__init__(caching=False)
        pairs = zip(stimuli.stimulus_ids, maps, strict=True)
        self.maps = {number: values.astype(float) for number, values in pairs}

    def _saliency_map(self, stimulus: Any) -> Any:
        """A copy, as callers change it."""
        return self.maps[get_image_hash(stimulus)].copy()


def scored(stimuli: Any, fixations: Any, said: Stored, true: Stored, prior: Stored) -> Any:
    """(7, images), in the order of `kd.metrics.saliency.METRICS`."""
    shapes = [(said.saliency_map(one), true.saliency_map(one)) for one in stimuli]
    per_fixation = {
        "NSS": said.NSSs(stimuli, fixations),
        "IG": SaliencyMapNormalizingModel(said).information_gains(
            stimuli, fixations, SaliencyMapNormalizingModel(prior)
        ),
    }
    by_picture = {
        name: [values[fixations.n == n].mean() for n in range(len(stimuli))]
        for name, values in per_fixation.items()
    }
    judd = said.AUC_per_image(stimuli, fixations, nonfixations="unfixated", thresholds="fixations")
    return np.array([
        [metrics.MIT_KLDiv(a, b) for a, b in shapes],
        [metrics.CC(a, b) for a, b in shapes],
        [metrics.SIM(a, b) for a, b in shapes],
        by_picture["NSS"],
        judd,
        said.AUC_per_image(stimuli, fixations, nonfixations="shuffled"),
        by_picture["IG"],
    ])  # fmt: skip


def main(file: str) -> None:
    """Write the cases."""
    rng = np.random.default_rng(7)
    shown = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in SIZES]
    stimuli = pysaliency.Stimuli(shown)
    xs, ys, ns = [], [], []
    for picture, (height, width) in enumerate(SIZES):
        for _ in range(12 + 5 * picture):
            xs.append(np.clip(rng.normal(0.5, 0.2), 0, 0.999) * width)
            ys.append(np.clip(rng.normal(0.5, 0.2), 0, 0.999) * height)
            ns.append(picture)
        xs.append(xs[-1])  # a pixel that is fixated twice
        ys.append(ys[-1])
        ns.append(picture)
    x, y, n = np.array(xs), np.array(ys), np.array(ns)
    fixations = pysaliency.Fixations.create_without_history(x, y, n)
    maps = [maps_of(rng, size) for size in SIZES]
    truths = [whole(smoothed(rng, size, 1.5), 9000) for size in SIZES]
    priors = [whole(smoothed(rng, size, 4.0), 9000) + 10 for size in SIZES]
    arrays: dict[str, Any] = {"x": x, "y": y, "n": n}
    for k in range(len(SIZES)):
        arrays |= {f"truth{k}": truths[k], f"prior{k}": priors[k]}
        arrays |= {f"{name}{k}": values for name, values in maps[k].items()}
    true, prior = Stored(stimuli, truths), Stored(stimuli, priors)
    for name in maps[0]:
        said = Stored(stimuli, [one[name] for one in maps])
        arrays[f"expected_{name}"] = scored(stimuli, fixations, said, true, prior)
    np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
