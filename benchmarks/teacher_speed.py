"""Measure each teacher's speed and memory for the posteriors of all objects of an image.

Every recipe of configs/teacher is built for the dataset, with random weights (speed does not depend
on them), and predicts the `--objects` of an image of the dataset's size, hidden in turn. Each
teacher runs in a separate process; memory is the growth of its peak during the prediction. Times
are CPU seconds of the process, which other load on the machine affects less: per object in a batch
of all objects (`each`), and for a batch of one object (`alone`).

    python benchmarks/teacher_speed.py [--data coco] [--objects 7] [--teachers unet cnn ...]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.config.reader import find_config, known_configs
from kd.config.recipes import TeacherRecipe
from kd.problems import problem_of_task
from kd.problems.base import named
from kd.problems.objects.schema import ObjectsSection
from kd.problems.recipes import load_recipe
from kd.utils.malloc import keep_freed_memory

CLASSES = {"scenes": 22}  # 80 elsewhere
ROUNDS = 3


def batch_of(size: int, objects: int) -> dict[str, Tensor]:
    """Build a batch of one square image, with objects all over it, each hidden in turn."""
    random = np.random.default_rng(0)
    corners = random.uniform(0, 0.7 * size, (objects, 2))
    sides = random.uniform(0.1 * size, 0.3 * size, (objects, 2))
    boxes = torch.from_numpy(np.concatenate([corners, corners + sides], axis=1)).float()
    pixels = random.integers(0, 256, (1, 3, size, size), dtype=np.uint8)
    return {
        "images": torch.from_numpy(pixels).contiguous(memory_format=torch.channels_last),
        "sizes": torch.tensor([[size, size]]),
        "image_ids": torch.tensor([1]),
        "boxes": boxes,
        "labels": torch.zeros(objects, dtype=torch.int64),
        "image_of": torch.zeros(objects, dtype=torch.int64),
        "object_ids": torch.arange(objects),
        "area_fractions": torch.full((objects,), 0.04),
        "usable": torch.ones(objects, dtype=torch.bool),
        "hidden": torch.arange(objects),
        "hide_fraction": torch.ones(objects),
    }


def measure(name: str, data: str, objects: int) -> dict[str, Any]:
    """Build a recipe's teacher and time it; runs in a separate process."""
    keep_freed_memory()  # as every command does
    recipe = load_recipe(TeacherRecipe, find_config("teacher", name), data=data)
    classes = CLASSES.get(data, 80)
    given = {"weights": None, "remember": False}
    options = {k: given.get(k, v) for k, v in recipe.teacher.options.items()}
    model = problem_of_task(recipe.task.name).build_teacher(
        recipe.teacher.model_copy(update={"options": options}), classes
    )
    model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    task = problem_of_task(recipe.task.name).task(recipe.task, recipe.data, classes, model=model)
    section = recipe.data
    assert isinstance(section, ObjectsSection)

    def ask(count: int) -> tuple[float, float]:
        batch = batch_of(section.size, objects)
        batch = {**batch, "hidden": batch["hidden"][:count], "hide_fraction": torch.ones(count)}
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            task.decode(named(model(*task.inputs(batch))), batch)
        return time.perf_counter() - wall, time.process_time() - cpu

    ask(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = {count: [ask(count) for _ in range(ROUNDS)] for count in (objects, 1)}
    return {
        "size": getattr(recipe.data, "size", None),
        "parameters": sum(p.numel() for p in model.parameters()),
        "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "all": [min(column) for column in zip(*times[objects], strict=True)],
        "alone": [min(column) for column in zip(*times[1], strict=True)],
    }


def main() -> int:
    """Print a row per recipe."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="coco", help="whose image size and options")
    parser.add_argument("--objects", type=int, default=7, help="COCO has 7.3 an image")
    parser.add_argument("--teachers", nargs="+", default=known_configs("teacher"), metavar="NAME")
    parser.add_argument("--json", action="store_true", help="also a line of JSON a recipe")
    options = parser.parse_args()
    sys.stdout.write(
        f"{options.objects} objects of an image of {options.data}, {torch.get_num_threads()} "
        f"threads, best of {ROUNDS}\n{'':<20}{'px':>5}{'M':>7}{'images/s':>12}{'s CPU each':>12}"
        f"{'s CPU alone':>13}{'MiB':>8}\n"
    )
    context = multiprocessing.get_context("spawn")
    for name in options.teachers:
        with context.Pool(1) as pool:
            found = pool.apply(measure, (name, options.data, options.objects))
        sys.stdout.write(
            f"{name:<20}{found['size']:>5}{found['parameters'] / 1e6:>7.1f}"
            f"{1 / found['all'][0]:>12.3f}{found['all'][1] / options.objects:>12.4f}"
            f"{found['alone'][1]:>13.4f}{found['mib']:>8.0f}\n"
        )
        if options.json:
            sys.stdout.write(json.dumps({name: found}) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
