"""Measure the overhead of distilling a saliency student from cached maps.

step      student B on batches with a teacher's stored maps, against student A on the same images:
          `fit`'s step with forward and backward passes and optimiser
loading   making a training sample with its stored map, against one without

The two sides of a pair alternate and swap their order. The result is the median of paired ratios.

    python benchmarks/saliency_step.py [--size 120,160] [--batch-size 8] [--pairs 12]
        [--trunk resnet18]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also when run as a file

from benchmarks._measure import Batch, Step, compare, engine_step
from kd.config.recipes import Model, Optimizer, Schedule, TermSection, Train
from kd.data.loader import collate
from kd.distillation.student import AdaptedStudent
from kd.distillation.targets import CachedTeacher
from kd.distillation.terms import build_term
from kd.engine.state import Objective
from kd.formats.fixations import Fixations, GazeSplit
from kd.problems import problem
from kd.problems.saliency.data import SaliencySamples
from kd.problems.saliency.task import Saliency
from kd.runs.build import make_accelerator
from kd.storage.fields import CachedField
from kd.storage.store import IDS, Store

GOAL = 1.10
IMAGES, FILE = 16, (300, 400)  # as of OSIE
TRAIN = Train(
    precision="fp32",
    clip_norm=0.0,
    optimizer=Optimizer(name="adamw", lr=5e-4),
    schedule=Schedule(name="poly", warmup=0.0),
)


class Anywhere:
    """Fixations of 15 people with ten random fixations each."""

    def __call__(self, number: int, size: tuple[int, int]) -> Fixations:
        random = np.random.default_rng(number)
        return Fixations(random.random((150, 2)) * (size[1], size[0]), np.arange(150) % 15)


def data_set(folder: Path, size: tuple[int, int]) -> tuple[SaliencySamples, SaliencySamples]:
    """Return the same images with and without a teacher's stored maps."""
    random, paths = np.random.default_rng(0), []
    for number in range(IMAGES):
        pixels = random.integers(0, 256, (FILE[0] // 4, FILE[1] // 4, 3)).astype(np.uint8)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(pixels).resize((FILE[1], FILE[0])).save(paths[-1], quality=90)
    split = GazeSplit(str(folder), tuple(paths), Anywhere(), 12.0)
    store = Store(folder / "kept")
    store.create({"maps": "of nobody"}, 1)
    values = random.normal(size=(IMAGES, 1, *size)).astype(np.float16)
    store.write_shard(0, {IDS: np.arange(IMAGES), "values": values})
    kept = CachedField(store, "saliency", channels=1, stride=2)
    return (
        SaliencySamples(split, size=size, augment={}, cached=[kept]),
        SaliencySamples(split, size=size, augment={}),
    )


def step_of(trunk: str, branches: str) -> Step:
    """Return the engine's step of student A, or of student B with its term."""
    torch.manual_seed(0)
    model = Model(name="saliency", options={"trunk": trunk})
    student = AdaptedStudent(
        problem("saliency").named_student(model.name, {**model.options, "branches": branches})
    )
    if branches == "a":
        return engine_step(student, Objective(Saliency(), {"kld": 1.0}), TRAIN)
    terms = [build_term(TermSection(name="saliency", weight=2.5))]
    source = CachedTeacher(None, ["saliency"])
    return engine_step(student, Objective(Saliency(), {"kld": 1.0}, terms, source), TRAIN)


def sample_seconds(dataset: SaliencySamples) -> float:
    """Measure the median seconds to make a sample."""
    times = []
    for place in range(2 * IMAGES):
        started = time.perf_counter()
        dataset[place // IMAGES, place % IMAGES]
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> int:
    """Print both comparisons; return 1 if the step misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="120,160", help="height and width of the images")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--trunk", default="resnet18")
    options = parser.parse_args()
    height, width = (int(side) for side in options.size.split(","))
    device = make_accelerator("fp32").device
    with tempfile.TemporaryDirectory() as folder:
        stored, bare = data_set(Path(folder), (height, width))
        batches: list[Batch] = [
            collate([stored[epoch, place] for place in range(options.batch_size)])
            for epoch in range(2)
        ]
        sys.stdout.write(
            f"saliency student on {options.trunk}, {options.batch_size} images of {width} x "
            f"{height}, {device}, fp32, {torch.get_num_threads()} threads, {options.pairs} pairs, "
            "medians\n"
        )
        ratio = compare(
            "distilled from stored maps, plain",
            step_of(options.trunk, "b"),
            step_of(options.trunk, "a"),
            batches,
            options.pairs,
        )
        with_map, without = sample_seconds(stored), sample_seconds(bare)
    sys.stdout.write(
        f"a sample with its stored map {1e3 * with_map:.1f} ms, without {1e3 * without:.1f} ms\n"
        f"goal: step {GOAL}\n"
    )
    return int(ratio > GOAL)


if __name__ == "__main__":
    raise SystemExit(main())
