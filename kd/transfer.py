"""Compare students that start from a context teacher's trunk, random and ImageNet weights.

`python -m kd.transfer --task scene_labels`
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kd.cli import read_recipe, recipe_parser, run_command, set_up_logging
from kd.config.recipes import TransferRecipe


def main(argv: Sequence[str] | None = None) -> int:
    """Train from each kind of initial weights with each seed, then print the table."""
    parser = recipe_parser(
        "python -m kd.transfer",
        "transfer",
        "Train a student from a context teacher's trunk on another task, by linear probe and "
        "fine-tuning, and compare it with random and ImageNet weights.",
    )
    parser.add_argument("--teacher", metavar="RUN", help="the teacher's run folder or checkpoint")
    args = parser.parse_args(argv)
    extra = [f"teacher.run={json.dumps(args.teacher)}"] if args.teacher else []
    recipe = read_recipe(args, TransferRecipe, "transfer", extra)
    return 0 if recipe is None else _run(recipe, args)


def _run(recipe: TransferRecipe, args: argparse.Namespace) -> int:
    from kd.experiments.distillation import Distillation
    from kd.experiments.transfer import starts
    from kd.metrics.registry import load_metrics
    from kd.report.tables import print_table, transfer_table
    from kd.runs.build import make_accelerator, open_data
    from kd.runs.load_teacher import RUNS
    from kd.runs.setup import open_run

    load_metrics(recipe.metrics)  # before the data are opened
    accelerator = make_accelerator(recipe.train.precision)
    set_up_logging(verbose=args.verbose, rank=accelerator.process_index)
    name = args.recipe or Path(args.config).stem
    out = args.out or RUNS / "transfer" / name / recipe.data.name
    rows = list(starts(recipe, args.data))
    with accelerator.main_process_first():
        data = open_data(recipe.data, recipe.task.name)
    runs = [
        Distillation(row.recipe, data, accelerator, out / row.path, f"{row.mode} {row.name}", True)
        for row in rows
    ]
    for run in runs:
        run.check()
    open_run(accelerator, out, recipe.model_dump(mode="json"), resume=args.resume)
    for seed in recipe.seeds:
        for run in runs:
            run.run("no_context", seed)
    if accelerator.is_main_process:
        numbers = {
            (row.mode, row.name): [
                json.loads(row.summary(out, seed).read_text()) for seed in recipe.seeds
            ]
            for row in rows
        }
        table = transfer_table(numbers, recipe.seeds, title=f"{name} on {recipe.data.name}")
        print_table(table, sys.stdout)
        (out / "table.md").write_text(table.to_markdown() + "\n", encoding="utf-8")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
