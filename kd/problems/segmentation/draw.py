"""Images of a val split with their true and predicted label maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import Tensor

from kd.data.loader import collate
from kd.problems.results import Predictor, spread
from kd.problems.segmentation.data import SegmentationDataset
from kd.report.overlay import overlay_figure
from kd.utils.images import VOID, read_image


def overlays(
    data: SegmentationDataset,
    predictors: Mapping[str, Predictor],
    *,
    count: int,
    accelerator: Accelerator,
) -> Iterator[Figure]:
    """Draw val images spread over the split, each beside its true and every predicted label map.

    Args:
        data: The dataset.
        predictors: Name -> network, in the order of the panels.
        count: How many images at most.
        accelerator: Device and precision.
    """
    images = data.val.images
    for place in spread(count, len(images)):
        image = read_image(images[place], None)
        truth = data.val.label_map(place, (image.shape[1], image.shape[2]))
        maps = {"truth": truth}
        for name, one in predictors.items():
            assert not isinstance(one.size, tuple)
            # This image alone: a whole split would read the size of each of its files first.
            samples = data.whole("val", size=one.size, only=np.array([place]))
            predicted = one(collate([samples[0, 0]]), accelerator)
            maps[f"{name}{_accuracy(predicted, truth)}"] = predicted
        yield overlay_figure(image, maps, data.class_names)


def _accuracy(predicted: Tensor, truth: Tensor) -> str:
    """For a title: the fraction of the labelled pixels that are right."""
    known = truth != VOID
    if not known.any():
        return ""
    return f", {100 * float((predicted[known] == truth[known]).float().mean()):.0f} % right"
