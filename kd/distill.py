"""Train a student with a teacher, and its plain twin without.

`python -m kd.distill --student resnet18`
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kd.cli import read_recipe, recipe_parser, run_command, set_up_logging
from kd.config.recipes import DistillRecipe
from kd.registry import look_up


def main(argv: Sequence[str] | None = None) -> int:
    """Train every variant for every seed, then print the table."""
    parser = recipe_parser(
        "python -m kd.distill",
        "distill",
        "Train a student with a teacher, and its plain twin without, and compare them.",
    )
    parser.add_argument("--teacher", metavar="RUN", help="a teacher's run folder or checkpoint")
    parser.add_argument(
        "--ablation", metavar="NAME", help="variants of this ablation of the recipe, and plain"
    )
    args = parser.parse_args(argv)
    extra = [f"teacher.run={json.dumps(args.teacher)}"] if args.teacher else []
    recipe = read_recipe(args, DistillRecipe, "distill", extra)
    if recipe is None:
        return 0
    if args.ablation:
        variants = look_up(recipe.ablations, args.ablation, what="ablation of this recipe")
        recipe = recipe.model_copy(update={"variants": ("plain", *variants)})
    return _run(recipe, args, argv)


def _run(recipe: DistillRecipe, args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    from kd.deploy.card import write_card
    from kd.deploy.model import best_run
    from kd.evaluation.write import write_overlays
    from kd.experiments.distillation import Distillation
    from kd.metrics.registry import load_metrics
    from kd.problems import problem_of_task
    from kd.report.tables import distill_table, print_table
    from kd.runs.build import make_accelerator, open_data
    from kd.runs.load_teacher import RUNS
    from kd.runs.read import read_distill
    from kd.runs.setup import open_run

    problem = problem_of_task(recipe.task.name)
    recipe = recipe.model_copy(update={"student": problem.resolve_student(recipe.student)})
    load_metrics(recipe.metrics)  # before the data are opened
    accelerator = make_accelerator(recipe.train.precision)
    set_up_logging(verbose=args.verbose, rank=accelerator.process_index)
    name = args.recipe or Path(args.config).stem
    out = args.out or RUNS / "distill" / name / recipe.data.name
    with accelerator.main_process_first():
        data = open_data(recipe.data, recipe.task.name)
    distillation = Distillation(recipe, data, accelerator, out, data_typed=args.data)
    distillation.check()
    open_run(accelerator, out, recipe.model_dump(mode="json"), resume=args.resume)
    for seed in recipe.seeds:
        for variant in recipe.variants:
            distillation.run(variant, seed)
    if accelerator.is_main_process and "plain" in recipe.variants:
        runs = read_distill(out, recipe.variants)  # there may be others in the folder
        table = distill_table(
            runs.results, runs.records(), runs.seeds, title=f"{name} on {recipe.data.name}"
        )
        print_table(table, sys.stdout)
        (out / "table.md").write_text(table.to_markdown() + "\n", encoding="utf-8")
        best = best_run(runs)
        write_card(out, best, table, ["python", "-m", "kd.distill", *(argv or sys.argv[1:])])
        sys.stdout.write(
            f"model: {best.folder / 'model.safetensors'} ({best.name}), described in "
            f"{out / 'README.md'}\nuse it: python -m kd.predict {out} IMAGES, or python -m "
            f"kd.export {out}\n"
        )
    if accelerator.is_main_process:
        write_overlays(distillation)
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
