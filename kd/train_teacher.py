"""Train a context teacher: `python -m kd.train_teacher --teacher unet --data coco`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from numpy.typing import NDArray

from kd.adapted import AdaptedStudent
from kd.baselines import index_objects
from kd.build import build_task, build_teacher, make_accelerator, make_loader
from kd.opened import OpenData, make_dataset, open_objects
from kd.cli import read_recipe, recipe_parser, run_command, set_up_logging
from kd.config import TeacherRecipe
from kd.data.splits import fold_of
from kd.launch import open_run
from kd.nn.cooccurrence import Fitted
from kd.pictures import write_pictures
from kd.run_folder import RunFolder
from kd.session import Session, run_training, say_summary
from kd.tasks.context_map import ContextMap
from kd.teacher_runs import default_folder
from kd.training import Objective


def main(argv: Sequence[str] | None = None) -> int:
    """Train the teacher, and its fold models where the recipe has folds."""
    about = "Train a context teacher: it predicts what is hidden from what surrounds it."
    parser = recipe_parser("python -m kd.train_teacher", "teacher", about)
    args = parser.parse_args(argv)
    recipe = read_recipe(args, TeacherRecipe, "teacher")
    if recipe is None:
        return 0
    accelerator = make_accelerator(recipe.train.precision)
    set_up_logging(verbose=args.verbose, rank=accelerator.process_index)
    name = args.recipe or Path(args.config).stem
    out = args.out or default_folder(name, recipe.data.name)
    config = recipe.model_dump(mode="json")
    with accelerator.main_process_first():
        data = open_objects(recipe.data)
    whole = open_run(accelerator, out, config, resume=args.resume)
    if not whole.finished:
        if recipe.folds:
            folds = fold_of(data.train.image_ids, recipe.folds)
            for number in range(recipe.folds):
                only = data.train.image_ids[folds != number]
                folder = open_run(accelerator, out / f"fold{number}", config, resume=True)
                train_one(recipe, data, accelerator, folder, f"{name} fold {number + 1}", only)
        train_one(recipe, data, accelerator, whole, name, None)
    if accelerator.is_main_process:
        say_summary(f"teacher {name} on {recipe.data.name}: {out}", whole.summary())
    accelerator.end_training()
    return 0


def train_one(
    recipe: TeacherRecipe,
    data: OpenData,
    accelerator: Accelerator,
    folder: RunFolder,
    label: str,
    only: NDArray[np.int64] | None,
) -> None:
    """Train one model on some of the train images, all where `only` is None."""
    if folder.finished:
        return
    set_seed(recipe.seed)
    model = build_teacher(recipe.teacher, data.num_classes)
    if isinstance(model, Fitted) and not folder.checkpoint.is_file():  # which has the counts
        model.fit(index_objects(data.train, only))
    shares = data.prior(only), data.shares(only)
    task = build_task(recipe.task, recipe.data, data.num_classes, *shares, model=model)
    dataset = make_dataset(
        data, "train", train=True, mode=recipe.hide, only=only, seed=recipe.seed,
        epochs=recipe.train.epochs, class_maps=isinstance(task, ContextMap),
    )  # fmt: skip
    loader = make_loader(
        dataset, accelerator, batch_size=recipe.train.batch_size // recipe.train.accumulate,
        workers=recipe.data.workers, seed=recipe.seed, train=True,
    )  # fmt: skip
    session = Session(folder, accelerator, data, recipe.train, recipe.seed, label, write_pictures)
    run_training(session, AdaptedStudent(model), Objective(task, recipe.task.weights), loader)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
