"""Measure the overhead and memory of a structured distillation step over its networks.

Student and teacher are PSPNets, the losses cross-entropy, pixel-wise, pair-wise and holistic:

step      the engine's step against bare passes: the teacher's forward pass, the student's forward
          and backward passes with cross-entropy and critic, the critic's step, both optimisers
memory    the step's peak, against a pair-wise term that forms the affinities of all nodes

The two sides of a pair alternate and swap their order. The result is the median of paired ratios.

    python benchmarks/segmentation_step.py [--crop 128] [--batch-size 4] [--pairs 10]
        [--student resnet18] [--teacher resnet50]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also when run as a file

from benchmarks._measure import Batch, Step, compare, engine_step, peak_memory
from kd.config.recipes import Optimizer, Schedule, TermSection, Train
from kd.distillation.student import AdaptedStudent
from kd.distillation.targets import LiveTeacher
from kd.distillation.terms import Term, build_term, draw_modules
from kd.engine.state import Objective
from kd.losses.holistic import Adversary
from kd.nn.segmentation import pspnet
from kd.problems.segmentation.task import Segmentation
from kd.runs.build import make_accelerator
from kd.transforms.hide import normalise

CLASSES, STEP_GOAL = 19, 1.05
TRAIN = Train(
    precision="fp32",
    clip_norm=0.0,
    optimizer=Optimizer(name="sgd", lr=1e-2),
    schedule=Schedule(name="poly", warmup=0.0),
)


def networks(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Build student and frozen teacher."""
    torch.manual_seed(0)
    student = pspnet(CLASSES, trunk=options.student, auxiliary=False)
    teacher = pspnet(CLASSES, trunk=options.teacher, auxiliary=False).eval().requires_grad_(False)
    student, teacher = (
        one.to(device).to(memory_format=torch.channels_last) for one in (student, teacher)
    )
    return student, teacher


def terms(pair_wise: Callable[..., Tensor] | None = None, kernel: int = 2) -> list[Term]:
    """Build the three terms, optionally with another pair-wise function."""
    built = [
        build_term(TermSection(name="pixel_wise", weight=10.0)),
        build_term(TermSection(name="pair_wise", weight=10.0, student="pyramid", teacher="pyramid",
                   options={"kernel": kernel})),
        build_term(TermSection(name="holistic", weight=0.1)),
    ]  # fmt: skip
    if pair_wise is not None:
        built[1] = replace(built[1], function=pair_wise)
    return built


def naive(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute pair-wise as in its formula, with all pairs of nodes; all pixels must be valid."""
    sides = [F.normalize(maps.flatten(2), dim=1) for maps in (student, teacher)]
    ours, theirs = (nodes.transpose(1, 2) @ nodes for nodes in sides)
    return (ours - theirs).square().mean(dim=(1, 2)).mean()


def by_engine(options: argparse.Namespace, device: torch.device, chosen: Sequence[Term]) -> Step:
    """Return the engine's step as `fit` takes it, without log lines."""
    student, teacher = networks(options, device)
    task = Segmentation(num_classes=CLASSES)
    live = LiveTeacher(teacher, task, ["pyramid"], posterior=False)
    drawn = draw_modules(chosen, {"logits": torch.zeros(1, CLASSES, 1, 1)})
    objective = Objective(task, {"cross_entropy": 1.0}, drawn, live)
    return engine_step(AdaptedStudent(student, ["pyramid"]), objective, TRAIN)


def by_hand(options: argparse.Namespace, device: torch.device) -> Step:
    """Return the forward and backward passes of the three networks, without the terms' own work."""
    student, teacher = networks(options, device)
    adversary = Adversary(CLASSES).to(device)
    own = torch.optim.SGD(student.parameters(), lr=1e-2, momentum=0.9)
    critics = torch.optim.Adam(adversary.parameters(), lr=4e-4, betas=(0.0, 0.999))
    student.train()

    def step(batch: Batch) -> None:
        images, truth = normalise(batch["images"]), batch["label_maps"].long()
        images = images.contiguous(memory_format=torch.channels_last)
        logits = student(images)["logits"]
        with torch.no_grad():
            known = teacher(images)["logits"]
        large = F.interpolate(logits, truth.shape[1:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(large, truth, ignore_index=255)
        (loss + 0.1 * adversary(logits, known, images)).backward()
        own.step()
        own.zero_grad(set_to_none=True)
        adversary.judge(logits.detach(), known, images).backward()
        critics.step()
        critics.zero_grad(set_to_none=True)

    return step


def main() -> int:
    """Print both comparisons; return 1 if the step misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--teacher", default="resnet50")
    options = parser.parse_args()
    device = make_accelerator("fp32").device
    side, count = options.crop, options.batch_size
    torch.manual_seed(2)
    batch = {
        "images": torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=device),
        "label_maps": torch.randint(
            0, CLASSES, (count, side, side), dtype=torch.uint8, device=device
        ),
        "image_ids": torch.arange(count, device=device),
    }
    sys.stdout.write(
        f"PSPNet {options.student} by PSPNet {options.teacher}, {count} crops of {side}, {device}, "
        f"fp32, {torch.get_num_threads()} threads, {options.pairs} pairs, medians\n"
    )
    engine = by_engine(options, device, terms())
    ratio = compare(
        "distilled step, bare networks", engine, by_hand(options, device), [batch], options.pairs
    )
    whole = by_engine(options, device, terms(kernel=1))
    formed = by_engine(options, device, terms(naive, kernel=1))
    ours, theirs = (peak_memory(partial(step, batch), device) for step in (whole, formed))
    sys.stdout.write(
        f"peak memory, every place a node: {ours / 2**20:.0f} MiB, pair-wise as written "
        f"{theirs / 2**20:.0f} MiB, ratio {ours / theirs:.2f}\ngoal: step {STEP_GOAL}\n"
    )
    return int(ratio > STEP_GOAL)


if __name__ == "__main__":
    raise SystemExit(main())
