"""A network of label maps or saliency asked about single val pictures, for drawing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kd.data.images import ImageSamples
from kd.data.loader import Sample, collate, to_device
from kd.nn.freeze import evaluating
from kd.problems.base import Task
from kd.problems.saliency.data import SaliencyDataset
from kd.problems.segmentation.data import SegmentationDataset


@dataclass(frozen=True)
class Asked:
    """A network and how it is asked.

    Args:
        model: An `AdaptedStudent`, on the device.
        task: How it is asked and read.
        size: Of the pictures that it sees: the long side in pixels, of gaze what they are scaled
            into; None: that of each file.
    """

    model: nn.Module
    task: Task
    size: int | tuple[int, int] | None


def spread(count: int, images: int) -> list[int]:
    """Places of at most so many pictures, evenly over a split."""
    count = min(count, images)
    return [number * images // count for number in range(count)]


def val_sample(data: SegmentationDataset | SaliencyDataset, one: Asked, place: int) -> Sample:
    """A batch of one val picture as a network sees it, with what is true."""
    # This picture alone: a whole split reads the size of each of its files first.
    only, shown = np.array([place]), one.size
    dataset: ImageSamples
    if isinstance(data, SaliencyDataset):
        dataset = data.whole("val", size=shown, only=only)
    else:
        assert not isinstance(shown, tuple)
        dataset = data.whole("val", size=shown, only=only)
    return collate([dataset[0, 0]])


@torch.no_grad()
def answer(one: Asked, sample: Sample, accelerator: Accelerator) -> Tensor:
    """What the task decodes of the picture of a batch of one, on the CPU."""
    batch = to_device(sample, accelerator.device, channels_last=False)
    with evaluating(one.model), accelerator.autocast():
        output, _ = one.model(*one.task.inputs(batch))
    return one.task.decode(output, batch)[0].cpu()
