"""Images of a val split with fixations, and the true and predicted densities of fixations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from accelerate import Accelerator
from matplotlib.figure import Figure

from kd.data.loader import collate
from kd.metrics.saliency import kld
from kd.problems.results import Predictor, spread
from kd.problems.saliency.data import SaliencyDataset
from kd.problems.saliency.figures import density_figure
from kd.utils.images import read_image


def saliency_overlays(
    data: SaliencyDataset,
    predictors: Mapping[str, Predictor],
    *,
    count: int,
    accelerator: Accelerator,
) -> Iterator[Figure]:
    """Draw val images spread over the split, each with fixations, true and predicted densities.

    Args:
        data: The dataset.
        predictors: Name -> network, in the order of the panels.
        count: How many images at most.
        accelerator: Device and precision.
    """
    images = data.val.images
    for place in spread(count, len(images)):
        image = read_image(images[place], None)
        size = (image.shape[1], image.shape[2])
        truth = data.val.density(place, size, size)[0]
        maps = {"truth": truth}
        for name, one in predictors.items():
            # This image alone: a whole split would read the size of each of its files first.
            samples = data.whole("val", size=one.size, only=np.array([place]))
            predicted = one(collate([samples[0, 0]]), accelerator)[0]
            maps[f"{name}, KLD {kld(predicted, truth):.2f}"] = predicted
        yield density_figure(image, data.val.fixations(place, size).points, maps)
