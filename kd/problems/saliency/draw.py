"""Pictures of a val split with fixations, truth, and where networks say that people look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from accelerate import Accelerator
from matplotlib.figure import Figure

from kd.evaluation.ask_network import Asked, answer, spread, val_sample
from kd.metrics.saliency import kld
from kd.problems.saliency.data import SaliencyDataset
from kd.problems.saliency.figures import gaze_figure
from kd.utils.images import read_image


def gaze_overlays(
    data: SaliencyDataset, asked: Mapping[str, Asked], *, count: int, accelerator: Accelerator
) -> Iterator[Figure]:
    """Draw val pictures spread over the split, each beside fixations, truth and every answer.

    Args:
        data: The data set.
        asked: Name -> network, in the order of the panels.
        count: How many pictures.
        accelerator: The device, and the precision of evaluations.
    """
    images = data.val.images
    for place in spread(count, len(images)):
        picture = read_image(images[place], None)
        size = (picture.shape[1], picture.shape[2])
        truth = data.val.density(place, size, size)[0]
        maps = {"truth": truth}
        for name, one in asked.items():
            said = answer(one, val_sample(data, one, place), accelerator)[0]
            maps[f"{name}, KLD {kld(said, truth):.2f}"] = said
        yield gaze_figure(picture, data.val.fixations(place, size).points, maps)
