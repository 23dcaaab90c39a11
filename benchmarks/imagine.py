"""Measure the time of a heat map of a 384 x 384 image, against one query per window.

Teachers have their recipes' settings, random weights and 80 classes; images have 384 pixels, and
the windows are the defaults of `python -m kd.imagine --class`. The baseline, a loop over single
regions, is measured on some of the windows, alternating with ours. Ratios are paired.

    python benchmarks/imagine.py [--rounds 3] [--windows 12] [--threads 2] [--teachers cnn trunk]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kd.config.datasets import Split
from kd.config.recipes import Model, TaskSection, TeacherRecipe
from kd.context.heatmap import heat_maps, region_probabilities
from kd.context.photo import Photograph
from kd.context.query import Question, expectations
from kd.context.regions import windows
from kd.problems import problem_of_task
from kd.problems.objects.schema import ObjectsSection
from kd.runs.load_teacher import TrainedTeacher
from kd.utils.malloc import keep_freed_memory

GOAL, SIZE, CLASSES = 10.0, 384, 80
CPU = torch.device("cpu")
SCALES, STRIDE = ((0.2, 0.2), (0.4, 0.4)), 0.5  # the defaults of `kd.imagine`
CNN = {"width": 32, "downs": 2, "patch": 4, "grid": 4, "region": True, "dense": True, "hidden": 256}
TEACHERS = {
    "cnn": (Model(name="cnn", options=CNN), "context"),
    "trunk": (
        Model(name="trunk", options={"name": "mobilenet_v2", "levels": 2, "dropout": 0.0}),
        "context",
    ),
    "unet": (Model(name="unet", options={"width": 16, "up": "bilinear"}), "context_pixels"),
}


def untrained(name: str) -> TrainedTeacher:
    """Build a registered teacher with random weights."""
    torch.manual_seed(0)
    split = Split(annotations="none", images="none")
    data = ObjectsSection(name="none", train=split, val=split, size=SIZE)
    model, kind = TEACHERS[name]
    task = TaskSection(name=kind, weights={})
    recipe = TeacherRecipe(data=data, task=task, teacher=model)
    net = problem_of_task(kind).build_teacher(model, CLASSES).eval().requires_grad_(False)
    return TrainedTeacher(Path("."), recipe, net, problem_of_task(kind).task(task, data, CLASSES))


def one_at_a_time(teacher: TrainedTeacher, photo: Photograph, boxes: Tensor) -> None:
    """Run one query and one forward pass per window."""
    unknown, first = torch.tensor([-1]), torch.tensor([0])
    for box in boxes:
        question = Question(photo.scaled, box[None], unknown, first)
        next(expectations(teacher, [question], device=CPU))


class Measured(NamedTuple):
    """Medians over rounds.

    Attributes:
        wall: Wall time of a heat map in seconds.
        busy: Processor time of a heat map in seconds, over all threads; unlike wall time, it hardly
            depends on other load on the machine.
        ratio: Processor time relative to one window at a time.
        ratio_wall: Wall time relative to one window at a time.
        windows: Number of windows.
    """

    wall: float
    busy: float
    ratio: float
    ratio_wall: float
    windows: int


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and processor time in seconds."""
    wall, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - busy


def measure(name: str, rounds: int, some: int) -> Measured:
    """Time a heat map, and some of its windows both ways."""
    teacher = untrained(name)
    pixels = torch.randint(256, (3, SIZE, SIZE), dtype=torch.uint8)
    nothing = torch.empty(0, 4), torch.empty(0, dtype=torch.int64)
    photo = Photograph(Path("none"), pixels, pixels, *nothing)
    slid = [windows(photo.size, scale, STRIDE).boxes for scale in SCALES]
    boxes = torch.cat(slid)
    part = boxes[:: max(1, len(boxes) // some)][:some]
    one_at_a_time(teacher, photo, part[:1])
    wholes, ratios = [], []
    for _ in range(rounds):
        options: dict[str, Any] = {"scales": SCALES, "stride": STRIDE, "device": CPU}
        wholes.append(timed(lambda: heat_maps(teacher, photo, [0], **options)))  # noqa: B023
        ours = timed(lambda: region_probabilities(teacher, photo, part, device=CPU))
        single = timed(lambda: one_at_a_time(teacher, photo, part))
        ratios.append([a / b for a, b in zip(ours, single, strict=True)])
    wall, busy = (statistics.median(side) for side in zip(*wholes, strict=True))
    ratio_wall, ratio = (statistics.median(side) for side in zip(*ratios, strict=True))
    return Measured(wall, busy, ratio, ratio_wall, len(boxes))


def main() -> int:
    """Print a line per teacher; return 1 if the fastest misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=12, help="of the other way")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command does
    fastest = float("inf")
    for name in options.teachers:
        one = measure(name, options.rounds, options.windows)
        fastest = min(fastest, one.wall)
        sys.stdout.write(
            f"{name:<6} {one.windows} windows in {one.wall:6.1f} s ({one.busy:6.1f} s of processor "
            f"time, {1e3 * one.busy / one.windows:5.0f} ms a window); one window at a time takes "
            f"{1 / one.ratio_wall:.2f} times as long, {1 / one.ratio:.2f} times the processor\n"
        )
        sys.stdout.flush()
    sys.stdout.write(f"fastest {fastest:.1f} s on {options.threads} threads (goal {GOAL:g} s)\n")
    return int(fastest > GOAL)


if __name__ == "__main__":
    raise SystemExit(main())
