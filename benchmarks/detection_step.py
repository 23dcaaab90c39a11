"""Measure the overhead of feature imitation over the two detectors, and of its masks.

Student and teacher are Faster R-CNNs on pyramids of five levels, with imitation on each level:

step      the engine's step against bare passes: the teacher's forward pass to its pyramid, the
          student's forward and backward passes with its own losses, and its optimiser; the bare
          side runs adapters only with `--with-adapters`
masks     the masks of all levels, from the batch's boxes, against the same bare step

The two sides of a pair alternate and swap their order. The result is the median of paired ratios.

    python benchmarks/detection_step.py [--size 256] [--batch-size 4] [--boxes 7] [--pairs 10]
        [--student fasterrcnn_resnet18] [--teacher fasterrcnn_resnet50] [--with-adapters]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also when run as a file

from benchmarks._measure import Batch, Step, compare, engine_step
from kd.config.recipes import Optimizer, Schedule, TermSection, Train
from kd.distillation.adapters import Conv3x3
from kd.distillation.hooks import FeatureTaps
from kd.distillation.student import AdaptedStudent
from kd.distillation.targets import LiveTeacher
from kd.distillation.terms import Term, build_term
from kd.engine.state import Objective
from kd.nn.networks import DETECTORS
from kd.problems.detection.task import Detection
from kd.runs.build import make_accelerator

CLASSES, CHANNELS = 20, 256
# So small that weights hardly change: the time of a detector's step depends on the number of its
# proposals, so two sides with different weights would not do the same work.
RATE = 1e-12
STEP_GOAL, MASK_GOAL = 1.05, 0.01
TRAIN = Train(
    precision="fp32",
    clip_norm=0.0,
    optimizer=Optimizer(name="sgd", lr=RATE, weight_decay=0.0, momentum=0.9),
    schedule=Schedule(name="constant", warmup=0.0),
)
LAYERS = [f"network.backbone.{name}" for name in ("0", "1", "2", "3", "pool")]


def networks(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Build student and frozen teacher."""
    torch.manual_seed(0)
    student, teacher = (
        DETECTORS[name].load()(num_classes=CLASSES)
        .to(device)
        .to(memory_format=torch.channels_last)
        for name in (options.student, options.teacher)
    )  # fmt: skip
    return student, teacher.eval().requires_grad_(False)


def adapters(device: torch.device) -> dict[str, nn.Module]:
    """Build an adapter for each level, as in the recipes."""
    return {layer: Conv3x3(CHANNELS, CHANNELS, relu=False).to(device) for layer in LAYERS}


def terms() -> list[Term]:
    """Build an imitation term for each level."""
    return [
        build_term(
            TermSection(
                name="imitation", label=f"near_{number}", weight=1.0, student=layer, teacher=layer
            )
        )
        for number, layer in enumerate(LAYERS)
    ]


def task_of(student: nn.Module) -> Detection:
    """Return the task of a detector."""
    levels, units = student.levels, student.loss_units
    assert isinstance(levels, tuple) and isinstance(units, Mapping)
    return Detection(num_classes=CLASSES, levels=levels, loss_units=units)


def by_engine(options: argparse.Namespace, device: torch.device) -> Step:
    """Return the engine's step as `fit` takes it, without log lines."""
    student, teacher = networks(options, device)
    task = task_of(student)
    asked = Detection(num_classes=CLASSES, wanted="features")
    live = LiveTeacher(teacher, asked, LAYERS, posterior=False)
    objective = Objective(task, dict.fromkeys(task.loss_units, 1.0), terms(), live)
    return engine_step(AdaptedStudent(student, LAYERS, adapters(device)), objective, TRAIN)


def by_hand(options: argparse.Namespace, device: torch.device) -> Step:
    """Return the forward and backward passes of both detectors, without any part of imitation."""
    student, teacher = networks(options, device)
    task, own = task_of(student), nn.ModuleList(adapters(device).values())
    with_adapters = options.with_adapters
    taps = FeatureTaps(student, LAYERS)
    optimizer = torch.optim.SGD([*student.parameters(), *own.parameters()], lr=RATE, momentum=0.9)
    student.train()

    def step(batch: Batch) -> None:
        inputs = task.inputs(batch)
        assert inputs[0] is not None
        images = inputs[0].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            teacher.get_submodule("network.backbone")(images)
        output = student(images, *inputs[1:])
        loss = torch.stack([mean.value for mean in task.losses(output, batch).values()]).sum()
        features = taps.collect()
        if with_adapters:  # gives each adapter a gradient at no extra cost
            maps = zip(own, (features[layer] for layer in LAYERS), strict=True)
            loss = loss + torch.stack([adapter(one).sum() for adapter, one in maps]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def masks_of(options: argparse.Namespace, device: torch.device) -> Step:
    """Return a function that computes the masks of all levels."""
    student, _ = networks(options, device)
    task = task_of(student)

    def step(batch: Batch) -> None:
        height, width = batch["images"].shape[-2:]
        made = task.masks(batch)["imitation"]
        for level in task.levels:
            made((-(-height // level.stride), -(-width // level.stride)))

    return step


def batch_of(options: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    """Generate noise images with boxes of all sizes."""
    torch.manual_seed(2)
    side, count, each = options.size, options.batch_size, options.boxes
    corner = torch.rand(count * each, 2) * side * 0.6
    extent = side * 0.02 * 20 ** torch.rand(count * each, 2)
    batch = {
        "images": torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8),
        "sizes": torch.full((count, 2), side),
        "image_ids": torch.arange(count),
        "boxes": torch.cat([corner, corner + extent], dim=1),
        "labels": torch.randint(0, CLASSES, (count * each,)),
        "image_of": torch.arange(count).repeat_interleave(each),
        "object_ids": torch.arange(count * each),
        "labelled": torch.ones(count, dtype=torch.bool),
    }
    return {name: value.to(device) for name, value in batch.items()}


def main() -> int:
    """Print both comparisons; return 1 if one misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--boxes", type=int, default=7, help="of an image")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--student", default="fasterrcnn_resnet18")
    parser.add_argument("--teacher", default="fasterrcnn_resnet50")
    parser.add_argument("--with-adapters", action="store_true",
                        help="have the adapters in the bare step, too")  # fmt: skip
    options = parser.parse_args()
    device = make_accelerator("fp32").device
    sys.stdout.write(
        f"{options.student} by {options.teacher}, {options.batch_size} images of {options.size} "
        f"with {options.boxes} boxes, {device}, fp32, {torch.get_num_threads()} threads, "
        f"{options.pairs} pairs, medians\n"
    )
    batch, bare = batch_of(options, device), by_hand(options, device)
    step = compare("imitation, bare detectors", by_engine(options, device), bare, [batch],
                   options.pairs)  # fmt: skip
    mask = compare("masks, bare detectors", masks_of(options, device), bare, [batch],
                   options.pairs)  # fmt: skip
    sys.stdout.write(f"goals: step {STEP_GOAL}, masks {MASK_GOAL}\n")
    return int(step > STEP_GOAL or mask > MASK_GOAL)


if __name__ == "__main__":
    raise SystemExit(main())
