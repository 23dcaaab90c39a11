"""Compare torchdistill's engine with ours on the same job: loss curve and time per step.

torchvision's ResNet-34 teaches ResNet-18, as in torchdistill's KD example: the mean of
cross-entropy and of softened KL times the squared temperature, SGD with momentum and weight decay,
a cosine schedule. The teacher's weights are random too, since its accuracy affects neither result.

theirs    `get_distillation_box` with `KDLoss`, in the loop of its example image_classification.py
          without meters; the teacher is in evaluation mode, which torchdistill does not set
ours      `kd.engine.loop.fit`; every image has one object of its size; one log line per step
twin      theirs again, with initial weights that differ by a rounding error, to show how fp32
          magnifies rounding; with --double, curves agree to the last logged digit

All use the same batches, normalised by the same function, in torch's default memory format. An
epoch is a few steps. Ours and theirs take turns by epochs and swap their order, so that other load
on the machine slows both. The result is the median of paired ratios.

    python benchmarks/torchdistill_engine.py [--pairs 30] [--epoch-steps 2] [--batch-size 16]
        [--side 64] [--double]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill import __version__ as VERSION
from torchdistill.core.distillation import get_distillation_box
from torchvision.models import resnet18, resnet34

from kd.config.recipes import TermSection
from kd.distillation.student import AdaptedStudent
from kd.distillation.targets import LiveTeacher
from kd.distillation.terms import build_term
from kd.engine.loop import fit
from kd.engine.optim import make_schedule
from kd.engine.state import Hooks, Objective, Training
from kd.losses.supervised import cross_entropy_labelled
from kd.problems.base import Batch, Classes, Evaluator, Mask, Mean, Output, Rows, Task
from kd.problems.objects.batch import hidden_labels, object_counts, object_rows
from kd.runs.build import make_accelerator
from kd.transforms.hide import normalise

CLASSES, TEMPERATURE, HARD_WEIGHT = 10, 4.0, 0.5  # HARD_WEIGHT is that of cross-entropy
SGD: dict[str, Any] = {"lr": 0.005, "momentum": 0.9, "weight_decay": 1e-4}
TIME_GOAL = 1.00
# Limits of the relative difference of losses: at the first step, due to rounding only, and of the
# largest, as a multiple of the twin's or of a log line's fp32 rounding, whichever is larger.
FIRST_GOAL, TWIN_GOAL, LOGGED = 1e-6, 3.0, torch.finfo(torch.float32).eps
# Trains one more epoch and returns the loss of each step.
Epoch = Callable[[], list[float]]


@dataclass(frozen=True)
class ImageTask(Task):
    """Image classification: each image has one object that covers it."""

    dtype: torch.dtype

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return normalised images, (N, 3, H, W)."""
        return (normalise(batch["images"]).to(self.dtype),)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Return `cross_entropy`."""
        value = cross_entropy_labelled(output["logits"], hidden_labels(batch))
        return {"cross_entropy": Mean(value, "labelled")}

    def rows(self, batch: Batch) -> Rows:
        """Return one row per object."""
        return object_rows(batch)

    def counts(
        self, batch: Batch, units: Collection[str] = (), masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        """Count the objects."""
        return object_counts(batch, units)

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Return log-probabilities (N, C), which soften like logits."""
        return output["logits"].log_softmax(dim=1)

    def metric(self, classes: Classes) -> Evaluator:
        raise NotImplementedError  # nothing is evaluated here


@dataclass
class Epochs:
    """Batches in memory, `steps` per epoch."""

    batches: list[dict[str, Tensor]]
    steps: int
    first: int = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield this epoch's batches."""
        return iter(self.batches[self.first : self.first + self.steps])

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return self.steps

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Set the epoch."""
        self.first = epoch * self.steps + start_batch


def make_batches(number: int, size: int, side: int) -> list[dict[str, Tensor]]:
    """Generate noisy images of the classes, each with one object, which is hidden and predicted."""
    random = torch.Generator().manual_seed(0)
    shape = (3, side, side)
    clean = torch.randint(128, (CLASSES, *shape), generator=random, dtype=torch.uint8)
    batches = []
    for index in range(number):
        labels = torch.randint(CLASSES, (size,), generator=random)
        noise = torch.randint(128, (size, *shape), generator=random, dtype=torch.uint8)
        rows = torch.arange(size)
        batches.append(
            {
                "images": clean[labels] + noise,
                "sizes": torch.full((size, 2), side),
                "image_ids": rows + index * size,
                "boxes": torch.tensor([[0.0, 0.0, side, side]]).repeat(size, 1),
                "labels": labels,
                "image_of": rows,
                "object_ids": rows + index * size,
                "area_fractions": torch.ones(size),
                "usable": torch.ones(size, dtype=torch.bool),
                "hidden": rows,
                "hide_fraction": torch.ones(size),
            }
        )
    return batches


def make_models(batches: Sequence[Batch], dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Build student and teacher, with batch norms fitted to keep the teacher's logits small."""
    torch.manual_seed(0)
    student, teacher = resnet18(num_classes=CLASSES), resnet34(num_classes=CLASSES)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean of all batches
    with torch.no_grad():
        for batch in batches:
            teacher(normalise(batch["images"]))
    return student.to(dtype), teacher.to(dtype).eval()


def shifted(model: nn.Module) -> nn.Module:
    """Copy a model and change its weights by a rounding error."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(1 + torch.finfo(weight.dtype).eps * torch.randn_like(weight))
    return twin


def by_kd(student: nn.Module, teacher: nn.Module, epochs: Epochs) -> Epoch:
    """Set up the job in kd's engine."""
    accelerator = make_accelerator("fp32")
    model = AdaptedStudent(student.to(accelerator.device))
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    schedule = make_schedule(optimizer, len(epochs.batches), name="cosine")
    training = Training(accelerator, accelerator.prepare(model), optimizer, schedule)
    task = ImageTask(next(teacher.parameters()).dtype)
    term = build_term(
        TermSection(name="output_kd", weight=1 - HARD_WEIGHT, options={"temperature": TEMPERATURE})
    )
    known = LiveTeacher(teacher.to(accelerator.device), task)
    objective = Objective(task, {"cross_entropy": HARD_WEIGHT}, [term], known)
    losses: list[float] = []

    def log(values: Mapping[str, float], step: int) -> None:
        if values:
            losses.append(values["loss/total"])

    hooks = Hooks(log=log, checkpoint=lambda: None)

    def epoch() -> list[float]:
        losses.clear()
        last = training.progress.epoch + 1
        fit(training, objective, epochs, epochs=last, hooks=hooks, log_every=1)
        return list(losses)

    return epoch


def their_config(steps: int) -> dict[str, Any]:
    """Return `train` of torchdistill's config: its KD example with this benchmark's numbers."""
    logits = {"module_path": ".", "module_io": "output"}
    paths = {f"{who}_{name}": at for who in ("student", "teacher") for name, at in logits.items()}
    loss = {**paths, "temperature": TEMPERATURE, "alpha": HARD_WEIGHT, "reduction": "batchmean"}
    terms = {"kd": {"criterion": {"key": "KDLoss", "kwargs": loss}, "weight": 1.0}}
    return {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": dict(SGD)},
        "scheduler": {
            "key": "CosineAnnealingLR", "kwargs": {"T_max": steps}, "scheduling_step": 1,
        },
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }  # fmt: skip


def by_torchdistill(student: nn.Module, teacher: nn.Module, epochs: Epochs) -> Epoch:
    """Set up the job in torchdistill's engine."""
    device, dtype = make_accelerator("fp32").device, next(teacher.parameters()).dtype
    config = their_config(len(epochs.batches))
    box = get_distillation_box(teacher, student, {}, config, device, None, False, 1)
    done = 0

    def epoch() -> list[float]:
        nonlocal done
        losses: list[float] = []
        box.pre_epoch_process(epoch=done)
        epochs.set_epoch(done)
        for batch in epochs:
            images, labels = batch["images"].to(device), batch["labels"].to(device)
            loss = box.forward_process(normalise(images).to(dtype), labels, None)
            box.post_forward_process(loss=loss)
            losses.append(loss.item())
        box.post_epoch_process()
        done += 1
        return losses

    return epoch


def timed(epoch: Epoch, curve: list[float], steps: int) -> tuple[float, float]:
    """Run one more epoch and return wall and CPU seconds per step."""
    clock, processor = time.perf_counter(), time.process_time()
    curve += epoch()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - clock) / steps, (time.process_time() - processor) / steps


def report_times(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> None:
    """Print medians of both engines and of paired ratios with quartiles, in wall and CPU time."""
    for kind, a, b in zip(
        ("clock", "processor"), zip(*ours, strict=True), zip(*theirs, strict=True), strict=True
    ):
        low, ratio, high = statistics.quantiles([x / y for x, y in zip(a, b, strict=True)], n=4)
        sys.stdout.write(f"a step by the {kind:<10} ours {1e3 * statistics.median(a):.1f} ms, ")
        sys.stdout.write(f"theirs {1e3 * statistics.median(b):.1f} ms, ratio {ratio:.3f} ")
        sys.stdout.write(f"(quartiles {low:.3f} to {high:.3f} of {len(a)} pairs)\n")
    sys.stdout.write(f"goal: a ratio of {TIME_GOAL:.2f} at most\n")


def report_curves(ours: list[float], theirs: list[float], twin: list[float]) -> bool:
    """Print the losses and their differences; return whether the curves are the same."""
    gaps, twin_gaps = (
        [abs(a - b) / abs(b) for a, b in zip(curve, theirs, strict=True)] for curve in (ours, twin)
    )
    absolute = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    sys.stdout.write(f"{'step':>6}{'ours':>13}{'theirs':>13}{'apart':>10}{'relative':>10}")
    sys.stdout.write(f"{'the twin':>10}\n")
    last = len(ours) - 1
    for step in sorted({*range(4), 5, 7, 9, 14, 19, 29, 39, last} & set(range(last + 1))):
        sys.stdout.write(f"{step + 1:>6}{ours[step]:>13.7f}{theirs[step]:>13.7f}")
        sys.stdout.write(f"{absolute[step]:>10.1e}{gaps[step]:>10.1e}{twin_gaps[step]:>10.1e}\n")
    sys.stdout.write(f"{'largest':<32}{max(absolute):>10.1e}{max(gaps):>10.1e}")
    sys.stdout.write(f"{max(twin_gaps):>10.1e}\n")
    goal = max(TWIN_GOAL * max(twin_gaps), LOGGED)
    sys.stdout.write(f"goals: first step {FIRST_GOAL:.0e}, largest {goal:.1e}\n")
    return gaps[0] <= FIRST_GOAL and max(gaps) <= goal


def main() -> int:
    """Print times and curves; return 1 if the curves differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=30, help="timed epochs of each engine")
    parser.add_argument("--epoch-steps", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--double", action="store_true", help="all in float64")
    args = parser.parse_args()
    steps = args.epoch_steps * (args.pairs + 1)
    epochs = Epochs(make_batches(steps, args.batch_size, args.side), args.epoch_steps)
    dtype = torch.float64 if args.double else torch.float32
    student, teacher = make_models(epochs.batches[:4], dtype)
    twin = by_torchdistill(shifted(student), copy.deepcopy(teacher), epochs)
    theirs = by_torchdistill(copy.deepcopy(student), copy.deepcopy(teacher), epochs)
    ours = by_kd(student, teacher, epochs)
    our_curve, their_curve = ours(), theirs()  # not timed: warms up allocators and kernels
    our_times: list[tuple[float, float]] = []
    their_times: list[tuple[float, float]] = []
    sides = [(ours, our_curve, our_times), (theirs, their_curve, their_times)]
    for _ in range(args.pairs):
        for epoch, curve, times in sides:
            times.append(timed(epoch, curve, args.epoch_steps))
        sides.reverse()
    twin_curve = [loss for _ in range(args.pairs + 1) for loss in twin()]
    device = make_accelerator("fp32").device
    sys.stdout.write(f"resnet34 to resnet18, {args.batch_size} images of {args.side} px, {dtype}, ")
    sys.stdout.write(f"{device}, {torch.get_num_threads()} threads, torchdistill {VERSION}\n")
    report_times(our_times, their_times)
    return int(not report_curves(our_curve, their_curve, twin_curve))


if __name__ == "__main__":
    raise SystemExit(main())
