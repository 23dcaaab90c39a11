"""Measure the overhead of the engine over a bare loop, and of a distilled over a plain step.

Student resnet18, scenes of 64 pixels, batches of 64, all in one process:

live      engine against a bare loop: a live context teacher, two losses, clipping, AdamW
stored    a distilled step with stored posteriors against the plain step, both by the engine

The two sides of a pair alternate and swap their order, so that other load on the machine slows
both. The result is the median of paired ratios.

    python benchmarks/engine_step.py [--pairs 20] [--batch-size 64]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also when run as a file

from benchmarks._measure import Batch, Step, compare, engine_step
from kd.config.datasets import Generate, Split
from kd.config.recipes import TermSection, Train
from kd.data.loader import to_device
from kd.distillation.student import AdaptedStudent
from kd.distillation.targets import CachedPosteriors, LiveTeacher
from kd.distillation.terms import build_term
from kd.engine.state import Objective
from kd.problems.objects.data import open_objects
from kd.problems.objects.schema import ObjectsSection
from kd.problems.objects.task import Classification, Context
from kd.runs.build import make_accelerator, make_loader
from kd.transforms.hide import hidden_regions, hide, normalise
from students.classifiers import build_student
from teachers.cnn import cnn

LIVE_GOAL, STORED_GOAL = 1.03, 1.10


def load(folder: Path, batch_size: int) -> tuple[list[Batch], int]:
    """Load some batches of scenes with one hidden object per image, and the number of classes."""
    section = ObjectsSection(
        root=str(folder),
        train=Split(annotations="annotations/instances_train.json", images="train"),
        val=Split(annotations="annotations/instances_val.json", images="val"),
        generate=Generate(train=4 * batch_size, val=8),
        size=64,
        min_fraction=0.0,
        max_fraction=1.0,
    )
    data = open_objects(section)
    accelerator = make_accelerator("fp32")
    dataset = data.samples("train", train=True, mode="one")
    loader = make_loader(dataset, accelerator, batch_size=batch_size, workers=0, train=True)
    loader.set_epoch(0)
    device = accelerator.device
    return [to_device(b, device, channels_last=True) for b in loader], data.num_classes


def make_student(classes: int) -> nn.Module:
    torch.manual_seed(0)
    return build_student("resnet18", num_classes=classes, stride=16)


def make_teacher(classes: int, device: torch.device) -> nn.Module:
    torch.manual_seed(1)
    return cnn(classes, width=32).to(device).to(memory_format=torch.channels_last).eval()


def by_engine(classes: int, objective: Objective) -> Step:
    """Return the engine's step as `fit` takes it, without log lines."""
    return engine_step(AdaptedStudent(make_student(classes)), objective, Train(precision="fp32"))


def by_hand(classes: int, teacher: nn.Module, device: torch.device) -> Step:
    """Return a bare step that does the same work."""
    student = make_student(classes).to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=1e-4)

    def step(batch: Batch) -> None:
        hidden = batch["hidden"]
        rows, boxes = batch["image_of"][hidden], batch["boxes"][hidden]
        images = normalise(batch["images"])
        output = student(images, torch.cat([rows[:, None].float(), boxes], dim=1))
        with torch.no_grad():
            size = (images.shape[2], images.shape[3])
            regions = hidden_regions(boxes, size)
            known = teacher(hide(normalise(batch["images"]), rows, regions)).log_softmax(dim=1)
        supervised = F.cross_entropy(output["logits"], batch["labels"][hidden])
        ours = output["context"].log_softmax(dim=1)
        loss = supervised + F.kl_div(ours, known, reduction="batchmean", log_target=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> int:
    """Print both ratios; return 1 if one misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        batches, classes = load(Path(folder) / "scenes", args.batch_size)
    device = batches[0]["images"].device
    task, weights = Classification(num_classes=classes), {"cross_entropy": 1.0}
    teacher = make_teacher(classes, device)
    terms = [
        build_term(TermSection(name="context_logits", weight=1.0, options={"temperature": 1.0}))
    ]
    live = Objective(task, weights, terms, LiveTeacher(teacher, Context(num_classes=classes)))
    ids = torch.cat([batch["object_ids"] for batch in batches])
    posteriors = CachedPosteriors(ids, torch.randn(len(ids), classes).log_softmax(dim=1))
    stored, plain = Objective(task, weights, terms, posteriors), Objective(task, weights)
    sys.stdout.write(f"resnet18, {args.batch_size} scenes of 64 px, {device}, fp32, ")
    sys.stdout.write(f"{torch.get_num_threads()} threads, {args.pairs} pairs, medians\n")
    live_ratio = compare(
        "live teacher: engine, loop by hand", by_engine(classes, live),
        by_hand(classes, teacher, device), batches, args.pairs,
    )  # fmt: skip
    stored_ratio = compare(
        "engine: distilled with stored, plain", by_engine(classes, stored),
        by_engine(classes, plain), batches, args.pairs,
    )  # fmt: skip
    sys.stdout.write(f"goals: {LIVE_GOAL} and {STORED_GOAL}\n")
    return int(live_ratio > LIVE_GOAL or stored_ratio > STORED_GOAL)


if __name__ == "__main__":
    raise SystemExit(main())
