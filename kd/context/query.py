"""Query a trained context teacher about any region of any image."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.data.loader import Sample, collate, to_device
from kd.problems.base import named
from kd.problems.context import context_task, hidden_objects, scene_sample
from kd.problems.inference import InputImage
from kd.runs.load_teacher import TrainedTeacher
from kd.transforms.augment import pad
from kd.transforms.hide import hidden_regions, regions_of
from kd.utils.images import grey_image, scaled_size

# Largest number of outputs of one pass, such as K * C * S * S pixel logits: 512 MB as float32, and
# as much again for decoding.
MOST_OUTPUTS = 1 << 27


@dataclass(frozen=True)
class Question:
    """Regions to query in one image, which is then scaled and padded for the teacher.

    Attributes:
        image: (3, H, W) uint8 RGB, any size. `read_image` at the teacher's image size decodes it to
            the same pixels as in a dataset.
        boxes: (M, 4) xyxy pixels of the annotated objects and the queried regions.
        labels: (M,) int64, -1 for queried regions and objects of unknown class.
        hidden: (K,) int64, box indices of the queried regions; each is hidden separately.
        masks: (K, H, W) bool, exact regions. For an empty mask, the box is used.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    hidden: Tensor
    masks: Tensor | None = None


@torch.no_grad()
def expectations(
    teacher: TrainedTeacher,
    questions: Iterable[Question],
    *,
    device: torch.device,
    model: nn.Module | None = None,
    most_inputs: int = 64,
) -> Iterator[Tensor]:
    """Predict the class in each queried region.

    Consecutive questions share a forward pass if they fit.

    Args:
        teacher: Provides the image size, the task and, by default, the model.
        questions: Read lazily, at most one pass ahead.
        device: Device to which the model is moved.
        model: Replaces the teacher's model, for example by a fold model.
        most_inputs: Largest number of regions per pass; fewer if pixel-wise outputs are large.

    Yields:
        Log-probabilities (K, C), float32 on the CPU, for each question in order.
    """
    task, size = context_task(teacher), hidden_objects(teacher).size
    most_inputs = max(1, min(most_inputs, MOST_OUTPUTS // task.outputs_per_region(size)))
    network = (teacher.model if model is None else model).eval().to(device)
    waiting: list[Sample] = []  # samples of the next pass
    ready = torch.empty(0, task.num_classes)  # predictions not yet yielded
    counts: list[int] = []  # regions of each question not yet yielded
    for question in chain(questions, [None]):
        samples: Iterable[Sample | None] = [None]
        if question is not None:
            counts.append(len(question.hidden))
            samples = _samples(question, teacher, most_inputs)
        for sample in samples:
            if waiting and (sample is None or not _fits(sample, waiting, most_inputs)):
                ready = torch.cat([ready, _predict(teacher, network, waiting, device)])
                waiting = []
            if sample is not None:
                waiting.append(sample)
        while counts and counts[0] <= len(ready):
            count = counts.pop(0)
            yield ready[:count]
            ready = ready[count:]


def _fits(sample: Sample, others: Sequence[Sample], most: int) -> bool:
    regions = sum(len(one["hidden"]) for one in (sample, *others))
    return regions <= most and sample.keys() == others[0].keys()


def _predict(
    teacher: TrainedTeacher, model: nn.Module, samples: Sequence[Sample], device: torch.device
) -> Tensor:
    """Compute log-probabilities of all hidden regions of some samples in one forward pass."""
    channels_last = teacher.recipe.train.channels_last
    batch = to_device(collate(samples), device, channels_last=channels_last)
    task = teacher.task
    if "segments" in batch:
        task = dataclasses.replace(task, shape="segment")  # type: ignore[type-var]
    return task.decode(named(model(*task.inputs(batch))), batch).float().cpu()


def _samples(question: Question, teacher: TrainedTeacher, most: int) -> Iterator[Sample]:
    """Yield samples (docs/batch.md) of at most `most` hidden regions each."""
    data = hidden_objects(teacher)
    size = data.size
    height, width = question.image.shape[1:]
    scaled = scaled_size(height, width, size)
    pixels = question.image if data.images else grey_image(scaled)
    image = InputImage(pixels, (height, width), question.boxes)
    sample = scene_sample(image, question.labels, question.hidden, size)
    boxes = sample["boxes"]
    exact = question.masks is not None or getattr(teacher.task, "shape", "box") == "segment"
    for start in range(0, len(question.hidden), most):
        hidden = question.hidden[start : start + most]
        part = {**sample, "hidden": hidden, "hide_fraction": torch.ones(len(hidden))}
        if exact:
            masks = None if question.masks is None else question.masks[start : start + most]
            part["segments"] = _segments(masks, boxes[hidden], scaled, size)
        yield part


def _segments(masks: Tensor | None, boxes: Tensor, scaled: tuple[int, int], size: int) -> Tensor:
    """Return masks in the padded image, (K, S, S) bool; boxes replace missing or empty masks."""
    drawn = hidden_regions(boxes, (size, size))
    if masks is None:
        return drawn
    exact = pad(scale_masks(masks, scaled), size)
    some = exact.flatten(1).any(dim=1)[:, None, None]
    return torch.where(some, exact, drawn)


def scale_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize masks (K, H, W) bool; a pixel takes the value at its centre."""
    if tuple(masks.shape[1:]) == size:
        return masks
    return F.interpolate(masks[None].to(torch.uint8), size=size, mode="nearest-exact")[0].bool()


def teacher_input(teacher: TrainedTeacher, question: Question) -> tuple[Tensor, Tensor]:
    """Return the teacher's input without padding.

    Returns:
        Image (3, h, w) uint8 before anything is hidden, grey if the teacher does not read images;
        and the pixels that each region hides, (K, h, w) bool.
    """
    shape = getattr(teacher.task, "shape", "box")
    (sample,) = _samples(question, teacher, len(question.hidden))
    regions = regions_of(sample, shape="segment" if "segments" in sample else shape)
    height, width = sample["sizes"].tolist()
    image = sample["images"][:, :height, :width]
    if getattr(teacher.task, "image_inputs", "whole") == "none":
        image = grey_image((height, width))
    return image, regions[:, :height, :width]
