"""Train a teacher: `python -m kd.train_teacher --teacher unet --data coco`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kd.cli import read_recipe, recipe_parser, run_command, set_up_logging
from kd.config.recipes import TeacherRecipe


def main(argv: Sequence[str] | None = None) -> int:
    """Train the teacher, and its fold models where the recipe has folds."""
    parser = recipe_parser("python -m kd.train_teacher", "teacher", "Train a teacher.")
    args = parser.parse_args(argv)
    recipe = read_recipe(args, TeacherRecipe, "teacher")
    return 0 if recipe is None else _run(recipe, args)


def _run(recipe: TeacherRecipe, args: argparse.Namespace) -> int:
    # Torch takes seconds to import: not before everything is checked that can be without it.
    from kd.experiments.teacher import train_one
    from kd.metrics.registry import load_metrics
    from kd.runs.build import make_accelerator, open_data
    from kd.runs.load_teacher import default_folder
    from kd.runs.read import results_of
    from kd.runs.setup import open_run
    from kd.runs.train import print_summary

    load_metrics(recipe.metrics)  # before the data are opened
    accelerator = make_accelerator(recipe.train.precision)
    set_up_logging(verbose=args.verbose, rank=accelerator.process_index)
    name = args.recipe or Path(args.config).stem
    out = args.out or default_folder(name, recipe.data.name)
    config = recipe.model_dump(mode="json")
    with accelerator.main_process_first():
        data = open_data(recipe.data, recipe.task.name)
    whole = open_run(accelerator, out, config, resume=args.resume)
    if not whole.finished:
        if recipe.folds:
            for number, images in enumerate(data.problem.folds(data, recipe.folds)):
                folder = open_run(accelerator, out / f"fold{number}", config, resume=True)
                train_one(recipe, data, accelerator, folder, f"{name} fold {number + 1}", images)
        train_one(recipe, data, accelerator, whole, name, None)
    if accelerator.is_main_process:
        results = results_of(config, out)
        print_summary(f"teacher {name} on {recipe.data.name}: {out}", whole.summary(), results)
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
