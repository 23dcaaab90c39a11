"""Measure the effect of int8 on a trained teacher's posteriors and speed.

The run's teacher predicts all objects of some val images unchanged, with batch norms folded
(kd.nn.inference) and in int8 (kd.nn.inference, ranges from 32 train images). The table shows top-1,
NLL, the KL from the float32 posteriors, and CPU time per object.

    python benchmarks/int8_teacher.py --teacher runs/teacher/unet/scenes [--images 200]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from kd.config.reader import read_yaml
from kd.config.recipes import TeacherRecipe
from kd.data.loader import Samples, collate
from kd.nn.inference import for_answers, in_int8
from kd.problems.base import Split, Task, named
from kd.problems.objects.batch import hidden_labels
from kd.problems.recipes import recipe_from
from kd.runs.build import open_data
from kd.runs.load_teacher import images_of, load_teacher

BATCH = 8


@dataclass
class Tally:
    """Sums over the objects so far."""

    seconds: float = 0.0
    right: int = 0
    surprise: float = 0.0
    divergence: float = 0.0


def batches(dataset: Samples, images: int) -> Iterator[dict[str, Tensor]]:
    """Yield the first images, each with all its objects hidden in turn."""
    for start in range(0, min(images, len(dataset)), BATCH):
        places = range(start, min(start + BATCH, images, len(dataset)))
        yield collate([dataset[0, place] for place in places])


@torch.inference_mode()
def answer(model: nn.Module, task: Task, batch: dict[str, Tensor], tally: Tally) -> Tensor:
    """Compute a batch's log-probabilities (K, C), timed."""
    inputs = task.inputs(batch)
    began = time.process_time()
    output = model(*inputs)
    tally.seconds += time.process_time() - began
    log_probs, labels = task.decode(named(output), batch), hidden_labels(batch)
    tally.right += int((log_probs.argmax(dim=1) == labels).sum())
    tally.surprise -= float(log_probs[torch.arange(len(labels)), labels].sum())
    return log_probs


def main() -> int:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", type=Path, help="a run folder, or a checkpoint in one")
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    if options.teacher is None:
        sys.stdout.write("left out: name a trained teacher with --teacher RUN\n")
        return 0
    folder = options.teacher if options.teacher.is_dir() else options.teacher.parent
    recipe = recipe_from(TeacherRecipe, read_yaml(folder / "config.yaml"), str(folder))
    data = open_data(recipe.data, recipe.task.name)
    teacher = load_teacher(options.teacher, data.num_classes)
    train, val = (data.problem.evaluation(data, split) for split in get_args(Split))
    samples = [images_of(teacher.task, batch) for batch in batches(train, 32)]
    spared = ["head"] if hasattr(teacher.model, "head") else []
    models = {
        "float32": teacher.model,
        "folded": for_answers(teacher.model),
        "int8": in_int8(teacher.model, samples, spared=spared),
    }
    tallies = {name: Tally() for name in models}
    objects = 0
    for batch in batches(val, options.images):
        objects += len(batch["hidden"])
        found = {
            name: answer(model, teacher.task, batch, tallies[name])
            for name, model in models.items()
        }
        own = found["float32"]
        for name, log_probs in found.items():
            tallies[name].divergence += float((own.exp() * (own - log_probs)).sum())
    sys.stdout.write(f"{options.teacher}: {objects} objects of {options.images} val images\n")
    sys.stdout.write(f"{'':<10}{'ms/object':>11}{'ratio':>8}{'top-1':>8}{'NLL':>9}{'KL':>10}\n")
    for name, tally in tallies.items():
        sys.stdout.write(
            f"{name:<10}{1e3 * tally.seconds / objects:>11.2f}"
            f"{tallies['float32'].seconds / tally.seconds:>8.2f}{100 * tally.right / objects:>8.2f}"
            f"{tally.surprise / objects:>9.4f}{tally.divergence / objects:>10.5f}\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
