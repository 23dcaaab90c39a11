"""The arms of a comparison: one student, with and without each thing that is compared.

All arms of a seed share initial weights, data order, pixels, labels and steps.

plain      the student and its labels, no distillation
distilled  with the recipe's terms
bare       without the context head, no distillation
shuffled   the recipe's terms, each posterior given to another object: the control
direct     the bare student's output taught by the posterior: the ablation of METHODS 7
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from kd.build import (
    OpenData,
    adapt_student,
    build_student,
    build_task,
    build_terms,
    first_batch,
    labelled_images,
    make_dataset,
    make_loader,
)
from kd.config import Arm, DistillRecipe
from kd.config import Term as TermSection
from kd.data.loader import SceneLoader
from kd.engine import Objective, Training, to_device
from kd.errors import UserError
from kd.objective import Term
from kd.pictures import write_pictures
from kd.run_folder import RunFolder
from kd.session import Session, run_training
from kd.soft_targets import LiveTeacher, SoftTargetSource, StoredPosteriors
from kd.tasks.base import Task
from kd.teacher_runs import (
    TrainedTeacher,
    expectation,
    find_teacher,
    load_teacher,
    train_posteriors,
)
from kd.tracking import Tracker

TAUGHT = ("distilled", "shuffled", "direct")


@dataclass
class Distillation:
    """All that the arms of a recipe share; the teacher is opened once, before anything trains."""

    recipe: DistillRecipe
    data: OpenData
    accelerator: Accelerator
    out: Path

    def __post_init__(self) -> None:
        """Find out what can be wrong before the first step."""
        self.task = build_task(self.recipe.task, self.recipe.data, self.data.num_classes)
        self.terms = build_terms(self.recipe.losses)
        self.teacher: TrainedTeacher | None = None
        self.posteriors: StoredPosteriors | None = None
        if any(arm in TAUGHT for arm in self.recipe.arms):
            self.teacher = self._open_teacher()

    def _open_teacher(self) -> TrainedTeacher:
        recipe = self.recipe
        path = find_teacher(recipe.teacher, recipe.data.name)
        teacher = load_teacher(path, self.data.num_classes, recipe.data)
        teacher.model.to(self.accelerator.device)
        if recipe.soft_targets.kind == "stored":
            self.posteriors = train_posteriors(
                teacher, self.data, self.accelerator, out_of_fold=recipe.soft_targets.out_of_fold
            )
        elif "shuffled" in recipe.arms:
            raise UserError("arms: shuffled needs soft_targets.kind=stored")
        return teacher

    def run(self, arm: Arm, seed: int) -> None:
        """Train one arm of one seed, unless its folder has it already."""
        recipe, accelerator = self.recipe, self.accelerator
        config = {**recipe.model_dump(mode="json"), "arm": arm, "seed": seed}
        folder = RunFolder(self.out / f"seed{seed}" / arm, config, resume=True)
        if folder.finished:
            return
        labelled = labelled_images(self.data.train, recipe.data.labelled, seed)
        loader = self._loader(seed, labelled)
        terms = self._terms(arm)
        source = self._source(arm, seed, terms)
        set_seed(seed)
        student = build_student(
            recipe.student, self.data.prior(labelled), context=arm not in ("bare", "direct")
        )
        batch = to_device(first_batch(loader), torch.device("cpu"), channels_last=False)
        live = source if isinstance(source, LiveTeacher) else None
        model = adapt_student(student, terms, recipe.adapters, live, self.task, batch)
        objective = Objective(self.task, recipe.task.weights, terms, source)
        label = f"{recipe.student.name} {arm} seed {seed}"
        session = Session(folder, accelerator, self.data, recipe.train, seed, label, self._pictures)
        run_training(session, model, objective, loader)

    def _loader(self, seed: int, labelled: object) -> SceneLoader:
        recipe = self.recipe
        dataset = make_dataset(
            self.data,
            "train",
            train=True,
            mode="all" if recipe.soft_targets.kind == "stored" else "one",
            labelled=labelled,  # type: ignore[arg-type]
            seed=seed,
            epochs=recipe.train.epochs,
        )
        return make_loader(
            dataset,
            self.accelerator,
            batch_size=max(1, recipe.train.batch_size // recipe.train.accumulate),
            workers=recipe.data.workers,
            seed=seed,
            train=True,
        )

    def _terms(self, arm: Arm) -> list[Term]:
        if arm not in TAUGHT:
            return []
        if arm == "direct":
            options = {"temperature": 1.0}
            return build_terms([TermSection(name="direct", weight=1.0, options=options)])
        return self.terms

    def _source(self, arm: Arm, seed: int, terms: list[Term]) -> SoftTargetSource | None:
        if arm not in TAUGHT or self.teacher is None:
            return None
        if self.posteriors is not None:
            return self.posteriors.shuffled(seed) if arm == "shuffled" else self.posteriors
        layers = [term.teacher for term in terms if term.kind.maps]
        autocast = self.accelerator.mixed_precision == "bf16"
        return LiveTeacher(self.teacher.model, self.teacher.task, layers, autocast=autocast)

    def _pictures(self, session: Session, training: Training, task: Task, tracker: Tracker) -> None:
        expects = None if self.teacher is None else partial(expectation, self.teacher)
        write_pictures(session, training, task, tracker, expectation=expects)
