"""Test the stability of the critic: 2,000 steps of the segmentation recipe on photographs.

A small student with random weights learns from a teacher on ImageNet's MobileNetV2: cross-entropy +
10 pixel_wise + 0.5 pair_wise + 0.1 holistic; SGD at 1e-2 with poly decay; the critic with the
defaults of kd.config.recipes; the student's gradient is not clipped. Images are 128-pixel squares
of coco_mini. Score maps have 32 x 32 cells and 13 classes: COCO's twelve groups and background.

    KD_DATA=DATA python benchmarks/critic.py --out DIR [--steps 2000]
    KD_DATA=DATA python benchmarks/critic.py --out DIR --stress [--steps 300]
    KD_DATA=DATA python benchmarks/critic.py --out DIR --time

The first call trains the teacher and stores it in DIR. An interrupted run resumes from its
checkpoint. `metrics.jsonl` is written during the run, and `judged.npz` contains score maps and the
critic's scores of them for `docs/figures.py`. --stress makes a short run with each setting of
STRESS, at the learning rates of the first of 2,000 steps. --time compares steps with and without
the critic, in turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also when run as a file

from benchmarks._segmentation import (
    EPOCH,
    Answers,
    Levels,
    Order,
    Photos,
    Segmentation,
    Segmenter,
    Small,
    iou,
    read_photos,
)
from kd.config.recipes import Critic, Optimizer, Schedule, TermSection, Train
from kd.distillation.student import AdaptedStudent
from kd.distillation.terms import build_term, draw_modules, modules_of
from kd.engine.checkpoint import load_checkpoint, load_model, save_model
from kd.engine.loop import fit, train_step
from kd.engine.state import Hooks, Objective, Training, resume_training, save_training
from kd.errors import UserError
from kd.losses.holistic import Adversary
from kd.nn.freeze import evaluating
from kd.runs.build import make_accelerator
from kd.runs.setup import start_training
from kd.transforms.hide import normalise

PLANNED, TEACHER_STEPS = 2000, 400
SNAPSHOTS = (100, 400)
POLY = Schedule(name="poly", warmup=0.0)
RECIPE = Train(
    optimizer=Optimizer(name="sgd", lr=1e-2, momentum=0.9, weight_decay=5e-4),
    schedule=POLY, clip_norm=0.0, channels_last=False, precision="fp32",
)  # fmt: skip
LESSONS = Train(
    optimizer=Optimizer(name="adam", lr=1e-3, lr_scale={"trunk": 0.1}), schedule=POLY,
    channels_last=False, precision="fp32",
)  # fmt: skip
ADAM: dict[str, Any] = {"name": "adam", "lr": 4e-4, "momentum": 0.0, "weight_decay": 0.0}
# Changes of the critic: its optimiser, and options of its term.
STRESS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "rate x 100": ({"lr": 4e-2}, {}),
    "rate x 10": ({"lr": 4e-3}, {}),
    "no penalty": ({}, {"penalty": 0.0}),
    "first beta 0.9": ({"momentum": 0.9}, {}),
    "rate x 10000": ({"lr": 4.0}, {}),
    "rate x 10000, no penalty": ({"lr": 4.0}, {"penalty": 0.0}),
}


def begin(
    answers: Answers, optimizer: Mapping[str, float], options: Mapping[str, float], *,
    critic: bool = True,
) -> tuple[Training, Objective]:  # fmt: skip
    """Create a student, its critic and the recipe, always from the same random numbers."""
    torch.manual_seed(0)
    terms = [
        build_term(TermSection(name="pixel_wise", weight=10.0, student="logits")),
        build_term(
            TermSection(name="pair_wise", weight=0.5, student="features", teacher="features")
        ),
    ]
    if critic:
        terms.append(
            build_term(
                TermSection(name="holistic", weight=0.1, student="logits", options=dict(options))
            )
        )
    num_classes = answers.outputs["logits"].shape[1]
    small = Small()
    student = AdaptedStudent(Segmenter(small, small.channels, num_classes))
    terms = draw_modules(terms, answers.outputs)
    learning = Critic(optimizer=Optimizer(**{**ADAM, **optimizer}))
    training = start_training(
        make_accelerator("fp32"), student, RECIPE.model_copy(update={"critic": learning}),
        PLANNED, modules_of(terms, trained="critic"),
    )  # fmt: skip
    return training, Objective(Segmentation(), {"cross_entropy": 1.0}, terms, answers)


class Watch:
    """Records the largest gradient norms since the last line, and scores of unseen images."""

    def __init__(self, training: Training, val: Photos, answers: Answers, file: Path) -> None:
        self.training, self.file = training, file
        self.batch = val.batch(torch.arange(16))
        self.teacher = answers(self.batch)["logits"]
        self.norms = {"student": 0.0, "critic": 0.0}
        self.started = time.perf_counter(), training.progress.step
        inner = getattr(training.optimizer, "optimizer", training.optimizer)
        for who, optimizer in (("student", inner), ("critic", training.critics[0].optimizer)):
            optimizer.register_step_pre_hook(lambda own, *_, who=who: self._measure(own, who))

    def _measure(self, optimizer: torch.optim.Optimizer, who: str) -> None:
        every = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([gradient for gradient in every if gradient is not None])
        self.norms[who] = float(np.maximum(self.norms[who], norm.item()))  # keeps a NaN

    def line(self, values: Mapping[str, float], step: int) -> None:
        """Append a line to the file."""
        if not values:
            return
        adversary = self.training.critics[0].adversary
        images = normalise(self.batch["images"])
        with evaluating(self.training.unwrapped), evaluating(adversary), torch.no_grad():
            own = self.training.unwrapped(images)[0]["logits"]
            sides = [adversary.critic(side.softmax(1), images) for side in (self.teacher, own)]
        real, fake = (float(side.mean()) for side in sides)
        won = float((sides[0] > sides[1]).float().mean())
        now = time.perf_counter(), step
        took = (now[0] - self.started[0]) / max(now[1] - self.started[1], 1)
        seen = {"val/D_teacher": real, "val/D_student": fake, "val/teacher_ahead": won}
        norms = {f"norm/{who}": norm for who, norm in self.norms.items()}
        line = {"step": step, **values, **seen, **norms, "s/step": took}
        with self.file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        self.norms, self.started = dict.fromkeys(self.norms, 0.0), now


def run(
    folder: Path, training: Training, objective: Objective, train: Photos, watch: Watch, steps: int
) -> str:
    """Train for some steps or until training stops with an error, and return a summary."""
    last = folder / "last.pt"
    if last.is_file():
        resume_training(training, last)

    def keep() -> None:
        save_training(training, last, {"benchmark": "critic"})
        if (step := training.progress.step) in SNAPSHOTS:
            save_model(folder / f"student_{step}.safetensors", training.exported, {})

    hooks = Hooks(log=watch.line, checkpoint=keep)
    try:
        fit(
            training, objective, Order(train), epochs=steps // EPOCH, hooks=hooks, log_every=10,
            checkpoint_every=50 if steps == PLANNED else 5,
        )  # fmt: skip
    except UserError as error:
        kept = load_checkpoint(last)[0].step if last.is_file() else "none"
        return f"stopped after {training.progress.step} steps: {error} [checkpoint: step {kept}]"
    return f"{training.progress.step} steps, nothing that is not finite"


def taught(out: Path, weights: Path, train: Photos) -> nn.Module:
    """Load the teacher from DIR, or train it."""
    torch.manual_seed(0)
    levels = Levels(weights)
    teacher = Segmenter(levels, levels.channels, len(train.names))
    file = out / "teacher.safetensors"
    if not file.is_file():
        training = start_training(
            make_accelerator("fp32"), AdaptedStudent(teacher), LESSONS, TEACHER_STEPS
        )

        def log(values: dict[str, float], step: int) -> None:
            say(f"teacher, step {step}: {values.get('loss/cross_entropy', 0.0):.3f}")

        hooks = Hooks(log=log, checkpoint=lambda: None)
        objective = Objective(Segmentation(), {"cross_entropy": 1.0})
        epochs = TEACHER_STEPS // EPOCH
        fit(training, objective, Order(train), epochs=epochs, hooks=hooks, log_every=50)
        save_model(file, teacher, {})
    load_model(file, teacher)
    return teacher


def write_judged(
    folder: Path, val: Photos, answers: Answers, training: Training, adversary: Adversary
) -> None:
    """Save score maps of teacher and student, early and late, with the trained critic's scores."""
    rows = torch.arange(len(val.ids))
    student = training.exported
    states = {"student": copy.deepcopy(student.state_dict())}
    for step in SNAPSHOTS:
        fresh = Segmenter(small := Small(), small.channels, len(val.names))
        load_model(folder / f"student_{step}.safetensors", fresh)
        states[f"student_{step}"] = fresh.state_dict()
    batch = val.batch(rows)
    images = normalise(batch["images"])
    maps = {"teacher": answers(batch)["logits"].softmax(1)}
    with evaluating(student), evaluating(adversary), torch.no_grad():
        for name, state in sorted(states.items(), reverse=True):
            student.load_state_dict(state)
            maps[name] = torch.cat([student(p)["logits"].softmax(1) for p in images.split(32)])
        scores = {f"D_{name}": adversary.critic(own, images).numpy() for name, own in maps.items()}
    arrays: dict[str, Any] = {"ids": val.ids, "names": val.names, **scores}
    arrays |= {"images": val.images.numpy(), "truth": val.maps.numpy()}
    arrays |= {name: own.half().numpy() for name, own in maps.items()}
    np.savez_compressed(folder / "judged.npz", **arrays)


def time_steps(answers: Answers, train: Photos, pairs: int = 15) -> str:
    """Measure the median seconds of a step with and without the critic, in turns."""
    sides = [begin(answers, {}, {}, critic=critic) for critic in (True, False)]
    batches = list(Order(train))[: pairs + 2]
    times: list[tuple[float, ...]] = []
    for batch in batches:
        took = []
        for training, objective in sides:
            training.model.train()
            started = time.perf_counter()
            train_step(training, [batch], objective, objective.weights_at(0.0))
            took.append(time.perf_counter() - started)
        times.append(tuple(took))
    medians = [statistics.median(side) for side in zip(*times[2:], strict=True)]
    ratio = statistics.median(a / b for a, b in times[2:])
    return f"a step with critic {medians[0]:.2f} s, without {medians[1]:.2f} s: x {ratio:.1f}"


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/critic"))
    parser.add_argument("--steps", type=int, help=f"of {EPOCH}; {PLANNED}, or 300 with --stress")
    parser.add_argument("--stress", nargs="*", help="settings; all of them where none is named")
    parser.add_argument("--time", action="store_true")
    args = parser.parse_args()
    root = Path(os.environ.get("KD_DATA", "datasets"))
    if not (root / "coco_mini").is_dir():
        say(f"{root}/coco_mini is not there; KD_DATA names the folder it lies in")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    train, val = (read_photos(root / "coco_mini", split) for split in ("train", "val"))
    teacher = taught(args.out, root / "weights" / "mobilenet_v2_features.pth", train)
    say(f"teacher: {iou(teacher, val)}")
    answers, seen = Answers(teacher, train), Answers(teacher, val)
    if args.time:
        say(time_steps(answers, train))
        return 0
    chosen = STRESS if args.stress is not None else {"recipe": ({}, {})}
    for name in args.stress or chosen:
        optimizer, options = chosen[name]
        folder = args.out / name.replace(" ", "_").replace(",", "")
        folder.mkdir(exist_ok=True)
        training, objective = begin(answers, optimizer, options)
        watch = Watch(training, val, seen, folder / "metrics.jsonl")
        steps = args.steps or (PLANNED if args.stress is None else 300)
        say(f"{name}: {run(folder, training, objective, train, watch, steps)}")
        if args.stress is None:
            say(f"student: {iou(training.unwrapped, val)}")
            write_judged(folder, val, seen, training, training.critics[0].adversary)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
