"""Compare a distilled step from a cache with a plain step, loading included, and report cache size.

Student resnet18 on 128-pixel scenes with every object hidden, batches of 32, two workers. The
distilled student learns from cached posteriors (context_logits) and a cached layer of a CNN teacher
(hint, through a resizing adapter). The workers read the layer's maps, transform them with the image
and collate them. Both students train for whole epochs in turn, with `fit`'s step. The result is the
median of paired ratios.

    python benchmarks/cached_step.py [--rounds 5] [--images 512] [--workers 2]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kd.config.datasets import Generate, Split
from kd.config.recipes import Adapter, Model, TaskSection, TeacherRecipe, TermSection, Train
from kd.data.loader import SampleLoader, to_device
from kd.distillation.registry import POSTERIOR
from kd.distillation.student import adapt_student
from kd.distillation.targets import CachedPosteriors, CachedTeacher
from kd.distillation.terms import build_term
from kd.engine.loop import train_step
from kd.engine.state import Objective
from kd.problems.objects.data import ObjectsDataset, open_objects
from kd.problems.objects.schema import ObjectsSection
from kd.problems.objects.task import Classification, Context
from kd.runs.build import make_accelerator, make_loader
from kd.runs.load_teacher import TrainedTeacher
from kd.runs.setup import start_training
from kd.storage.fields import CachedField
from kd.teacher_cache.cache import CacheOptions, open_cache
from students.classifiers import build_student
from teachers.cnn import cnn

GOAL, BATCH, LAYER, SEEN = 1.10, 32, "features.4", "trunk.trunk.layer3"


def section(folder: Path, images: int, workers: int) -> ObjectsSection:
    """Return the data section: scenes, flipped at random."""
    still = dict.fromkeys(("shift", "rotate"), 0.0)
    return ObjectsSection(
        name="bench",
        root=str(folder / "scenes"),
        train=Split(annotations="annotations/instances_train.json", images="train"),
        val=Split(annotations="annotations/instances_val.json", images="val"),
        generate=Generate(train=images, val=8, size=128),
        size=128,
        augment=still,
        workers=workers,
    )


def cached(data: ObjectsDataset, folder: Path) -> dict[str, CachedField]:
    """Cache the outputs of a teacher with random weights."""
    torch.manual_seed(0)
    recipe = TeacherRecipe(
        data=data.section,
        task=TaskSection(name="context", weights={"cross_entropy": 1.0}),
        teacher=Model(name="cnn"),
    )
    model = cnn(data.num_classes, width=32).eval().requires_grad_(False)
    teacher = TrainedTeacher(folder, recipe, model, Context(num_classes=data.num_classes))
    accelerator = make_accelerator("fp32")
    return open_cache(teacher, data, accelerator, CacheOptions(outputs=(POSTERIOR, LAYER)))


def epochs(data: ObjectsDataset, kept: dict[str, CachedField] | None) -> Callable[[int], float]:
    """Return a function that trains for one epoch and returns the seconds per step."""
    accelerator, task = make_accelerator("fp32"), Classification(num_classes=data.num_classes)
    fields = [kept[LAYER]] if kept else []
    dataset = data.samples("train", train=True, epochs=100, cached=fields)
    loader: SampleLoader = make_loader(
        dataset, accelerator, batch_size=BATCH, workers=data.section.workers, train=True
    )
    torch.manual_seed(1)
    student = build_student("resnet18", num_classes=data.num_classes, stride=16)
    terms, source = [], None
    if kept:
        source = CachedTeacher(CachedPosteriors.read(kept[POSTERIOR]), [LAYER])
        terms = [
            build_term(one)
            for one in [
                TermSection(name="context_logits", weight=1.0),
                TermSection(name="hint", weight=0.1, student=SEEN, teacher=LAYER),
            ]
        ]
    loader.set_epoch(0)
    adapters = {SEEN: Adapter(kind="resize", to=LAYER)} if kept else {}
    model, terms = adapt_student(student, terms, adapters, source, task, next(iter(loader)))
    training = start_training(accelerator, model, Train(precision="fp32"), 100_000)
    objective = Objective(task, {"cross_entropy": 1.0}, terms, source)
    training.model.train()

    def run(epoch: int) -> float:
        loader.set_epoch(epoch)
        started, steps = time.perf_counter(), 0
        for batch in loader:
            moved = to_device(batch, accelerator.device, channels_last=True)
            train_step(training, [moved], objective, objective.weights_at(0.5))
            steps += 1
        return (time.perf_counter() - started) / steps

    return run


def main() -> int:
    """Print the ratio and the sizes; return 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = open_objects(section(Path(folder), options.images, options.workers))
        kept = cached(data, Path(folder))
        for name, output in kept.items():
            shape = "x".join(map(str, output.shape))
            size = output.store.bytes / options.images
            sys.stdout.write(f"{name:<12} {shape:>12} float16   {size:>10.0f} bytes an image\n")
        plain, distilled = epochs(data, None), epochs(data, kept)
        pairs = []
        for number in range(1, options.rounds + 1):
            order = (plain, distilled) if number % 2 else (distilled, plain)
            first, second = (side(number) for side in order)
            pairs.append((first, second) if number % 2 else (second, first))
    ratio = statistics.median(b / a for a, b in pairs)
    a, b = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
    low, high = (extreme(b / a for a, b in pairs) for extreme in (min, max))
    sys.stdout.write(
        f"plain {a:.0f} ms, distilled from the cache {b:.0f} ms a step, ratio {ratio:.3f} "
        f"({low:.3f} to {high:.3f}; goal {GOAL})\n"
    )
    return int(ratio > GOAL)


if __name__ == "__main__":
    raise SystemExit(main())
