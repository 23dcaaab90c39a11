"""Run everything in minutes: scenes, a teacher, plain and distilled students, the comparison.

`python -m kd.demo`, or `make demo`. It shortens the recipes in configs/.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kd import compare, distill, train_teacher
from kd.cli import run_command
from kd.errors import UserError

TEACHER = [
    *("--set", "data.generate={train: 2000, val: 500, size: 64, seed: 0}"),
    *("--set", "train.evaluate_every=0"),
]
# One seed and two variants of the recipe, with 60 labelled scenes as there, but fewer others.
STUDENT = [
    *("--set", "data.generate={train: 1000, val: 500, size: 64, seed: 0}"),
    *("--set", "data.labelled=0.06"),
    *("--set", "seeds=[0]", "--set", "variants=[plain, distilled]"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the commands one after the other, after printing each of them."""
    parser = argparse.ArgumentParser(prog="python -m kd.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    args = parser.parse_args(argv)
    teacher, student = str(args.out / "teacher"), str(args.out / "resnet18")
    started = time.perf_counter()
    steps = (
        ("kd.train_teacher", train_teacher.main,
         ["--teacher", "cnn", *TEACHER, "--out", teacher, "--resume"]),
        ("kd.distill", distill.main,
         ["--student", "resnet18", "--teacher", teacher, *STUDENT, "--out", student, "--resume"]),
        ("kd.compare", compare.main,
         [student, "--figure", str(args.out / "comparison.png"),
          "--metrics", "top1,confusable_top1,mean_class_top1,nll"]),
    )  # fmt: skip
    for name, command, arguments in steps:
        line = " ".join(f"'{a}'" if " " in a else a for a in arguments)
        sys.stdout.write(f"\n$ python -m {name} {line}\n")
        sys.stdout.flush()
        if command(arguments) != 0:
            raise UserError(f"{name} did not finish; resume the demo with: python -m kd.demo")
    minutes = (time.perf_counter() - started) / 60
    sys.stdout.write(
        f"\n{minutes:.1f} minutes. Images and curves: tensorboard --logdir {args.out}\n"
        f"The comparison as a figure: {args.out / 'comparison.png'}\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
