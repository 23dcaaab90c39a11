"""Compute a teacher's posteriors ahead of training: `python -m kd.cache RUN --data coco`.

`kd.distill` does this by itself where they are missing; this command does it on another day, or on
the machine that has the GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kd.build import make_accelerator, open_data
from kd.cli import run_command, set_up_logging
from kd.config_reader import data_config
from kd.teacher_runs import load_teacher, train_posteriors


def main(argv: Sequence[str] | None = None) -> int:
    """Compute and store the posteriors of a data set's train objects."""
    parser = argparse.ArgumentParser(prog="python -m kd.cache", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a teacher's run folder")
    parser.add_argument("--data", required=True, metavar="NAME", help="configs/data/NAME.yaml")
    parser.add_argument("--set", action="append", default=[], dest="settings",
                        metavar="data.a=value", help="change a value of the data set")  # fmt: skip
    parser.add_argument(
        "--in-fold", action="store_true", help="by the teacher itself, not by its fold models"
    )
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    args = parser.parse_args(argv)
    set_up_logging()
    data = open_data(data_config(args.data, args.settings))
    accelerator = make_accelerator(args.precision)
    teacher = load_teacher(args.run, data.num_classes)
    out_of_fold = bool(teacher.recipe.folds) and not args.in_fold
    stored = train_posteriors(teacher, data, accelerator, out_of_fold=out_of_fold)
    sys.stdout.write(f"{len(stored.object_ids)} posteriors, {stored.source}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
