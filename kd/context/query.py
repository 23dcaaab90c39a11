"""A trained teacher asked about any region of any image, as it is asked about a val object."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.data.loader import Sample, collate, to_device
from kd.problems.base import named
from kd.problems.context import context_task, hidden_objects
from kd.runs.load_teacher import TrainedTeacher
from kd.transforms.augment import pad
from kd.transforms.hide import hidden_regions, regions_of
from kd.utils.images import grey_image, resize, scaled_size

# Outputs of one pass, K * C * S * S of pixel logits: half a gigabyte as float32, and decoding takes
# it once more.
MOST_OUTPUTS = 1 << 27


@dataclass(frozen=True)
class Question:
    """Regions of one image; frames, scales and padding are the teacher's and not to be cared for.

    Attributes:
        image: (3, H, W) uint8 RGB, any size. Of a JPEG at least twice as large as the teacher's
            images, `read_image` with their size decodes what the dataset would, to the bit.
        boxes: (M, 4) xyxy pixels of that image: all objects known, the asked ones too.
        labels: (M,) int64, -1 = unknown: an asked region, or a neighbour without a name.
        hidden: (K,) int64, indices into M: the regions asked about, each in a pass of its own.
        masks: (K, H, W) bool, exact regions in place of the boxes; an empty one is its box.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    hidden: Tensor
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        objects, asked = len(self.boxes), len(self.hidden)
        if self.image.dtype != torch.uint8 or self.image.ndim != 3 or len(self.image) != 3:
            raise ValueError("image must be (3, H, W) uint8")
        if self.boxes.shape != (objects, 4) or self.labels.shape != (objects,):
            raise ValueError(
                f"boxes {tuple(self.boxes.shape)} and labels {tuple(self.labels.shape)} "
                "must be (M, 4) and (M,)"
            )
        if asked and not (0 <= int(self.hidden.min()) and int(self.hidden.max()) < objects):
            raise ValueError(f"hidden must be indices of the {objects} boxes")
        expected = (asked, *self.image.shape[1:])
        if self.masks is not None and tuple(self.masks.shape) != expected:
            raise ValueError(f"masks are {tuple(self.masks.shape)}, expected {expected}")


@torch.no_grad()
def expectations(
    teacher: TrainedTeacher,
    questions: Iterable[Question],
    *,
    device: torch.device,
    model: nn.Module | None = None,
    most_inputs: int = 64,
) -> Iterator[Tensor]:
    """What the teacher expects in each region.

    Images are scaled and padded as the dataset's are for evaluation; questions that come one
    after another share a pass where they fit.

    Args:
        teacher: Its image size, its task and, by default, its model are used.
        questions: Taken as they are needed, a pass ahead at most.
        device: Where to compute; the model is moved there.
        model: In place of the teacher's own, such as a fold's.
        most_inputs: Regions in one pass. Pixel-wise teachers get fewer where memory asks for it.

    Yields:
        Log-probabilities (K, C), float32 on the CPU, for each question, in order.
    """
    data, task = hidden_objects(teacher), context_task(teacher)
    num_classes = task.num_classes
    most_inputs = min(most_inputs, MOST_OUTPUTS // task.outputs_per_region(data.size))
    asked = _Asked(teacher, teacher.model if model is None else model, device)
    waiting: list[Sample] = []  # of the next pass
    answers: list[Tensor] = []  # of passes done, not handed out yet
    counts: list[int] = []  # regions of each question not answered yet
    for question in questions:
        counts.append(len(question.hidden))
        for sample in _samples(question, teacher, max(1, most_inputs)):
            inputs = sum(len(other["hidden"]) for other in waiting) + len(sample["hidden"])
            if waiting and (inputs > most_inputs or waiting[0].keys() != sample.keys()):
                answers.append(asked(waiting))
                waiting = []
            waiting.append(sample)
        yield from _finished(answers, counts, num_classes)
    if waiting:
        answers.append(asked(waiting))
    yield from _finished(answers, counts, num_classes)


def _finished(answers: list[Tensor], counts: list[int], num_classes: int) -> Iterator[Tensor]:
    """Hand out the answers of the questions that are complete; what is left stays in the lists."""
    rows = torch.cat([*answers, torch.empty(0, num_classes)])
    while counts and counts[0] <= len(rows):
        count = counts.pop(0)
        yield rows[:count]
        rows = rows[count:]
    answers[:] = [rows]


def _samples(question: Question, teacher: TrainedTeacher, most: int) -> Iterator[Sample]:
    """A question as samples of docs/batch.md, of at most `most` hidden regions each."""
    data = hidden_objects(teacher)
    size = data.size
    height, width = question.image.shape[1:]
    scaled = scaled_size(height, width, size)
    image = resize(question.image, scaled) if data.images else grey_image(scaled)
    scale = torch.tensor([scaled[1] / width, scaled[0] / height]).repeat(2)
    stored = question.boxes.float()
    boxes = stored * scale
    usable = torch.zeros(len(boxes), dtype=torch.bool)
    usable[question.hidden] = True
    sample = {
        "images": pad(image, size),
        "sizes": torch.tensor(scaled),
        "image_ids": torch.tensor(0),
        "boxes": boxes,
        "labels": question.labels.long(),
        "object_ids": torch.arange(len(boxes)),
        "shares": (stored[:, 2:] - stored[:, :2]).prod(dim=1) / (height * width),
        "usable": usable,
    }
    exact = question.masks is not None or getattr(teacher.task, "shape", "box") == "segment"
    for start in range(0, len(question.hidden), most):
        hidden = question.hidden[start : start + most]
        part = {**sample, "hidden": hidden, "hide_fraction": torch.ones(len(hidden))}
        if exact:
            masks = None if question.masks is None else question.masks[start : start + most]
            part["segments"] = _segments(masks, boxes[hidden], scaled, size)
        yield part


def _segments(masks: Tensor | None, boxes: Tensor, scaled: tuple[int, int], size: int) -> Tensor:
    """Masks in the frame, (K, S, S) bool; the box where there is none or nothing is left of it."""
    drawn = hidden_regions(boxes, (size, size))
    if masks is None:
        return drawn
    exact = pad(scale_masks(masks, scaled), size)
    some = exact.flatten(1).any(dim=1)[:, None, None]
    return torch.where(some, exact, drawn)


def scale_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, H, W) bool at another size: a pixel takes what lies at its centre, as boxes are drawn."""
    if tuple(masks.shape[1:]) == size:
        return masks
    return F.interpolate(masks[None].to(torch.uint8), size=size, mode="nearest-exact")[0].bool()


def as_seen(teacher: TrainedTeacher, question: Question) -> tuple[Tensor, Tensor]:
    """What the teacher is shown, without the padding.

    Returns:
        The image (3, h, w) uint8 with nothing hidden, grey where none is shown, and the pixels
        that each region hides, (K, h, w) bool, by the teacher's shape of regions.
    """
    shape = getattr(teacher.task, "shape", "box")
    (sample,) = _samples(question, teacher, len(question.hidden))
    regions = regions_of(sample, shape="segment" if "segments" in sample else shape)
    height, width = sample["sizes"].tolist()
    image = sample["images"][:, :height, :width]
    if getattr(teacher.task, "pictures", "whole") == "none":
        image = grey_image((height, width))
    return image, regions[:, :height, :width]


class _Asked:
    """A model that answers lists of samples, in one pass each."""

    def __init__(self, teacher: TrainedTeacher, model: nn.Module, device: torch.device) -> None:
        self.task, self.device = teacher.task, device
        self.model = model.eval().to(device)
        self.channels_last = teacher.recipe.train.channels_last

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        """Log-probabilities of all hidden regions of the samples, in order."""
        batch = to_device(collate(samples), self.device, channels_last=self.channels_last)
        task = self.task
        if "segments" in batch:
            task = dataclasses.replace(task, shape="segment")  # type: ignore[type-var]
        output = self.model(*task.inputs(batch))
        return task.decode(named(output), batch).float().cpu()
