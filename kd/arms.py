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

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import nn

from kd.build import (
    OpenData,
    adapt_student,
    build_student,
    build_task,
    build_terms,
    make_dataset,
    make_loader,
)
from kd.config import Arm, DistillRecipe, Train
from kd.config import Term as TermSection
from kd.data.dataset import SceneDataset, collate
from kd.data.splits import labelled_images
from kd.engine import evaluating, forward_losses, to_device
from kd.errors import UserError
from kd.launch import open_run
from kd.objective import Term, check_weights
from kd.optim import make_optimizer
from kd.pictures import write_pictures
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
from kd.training import Objective, Training

TAUGHT = ("distilled", "shuffled", "direct")
BARE = ("bare", "direct")


def train_section(train: Train, arm: Arm) -> Train:
    """The settings of an arm: those of the context head fall away where there is none."""
    if arm not in BARE:
        return train
    optimizer = train.optimizer
    kept = {
        name: {k: v for k, v in getattr(optimizer, name).items() if not k.startswith("context")}
        for name in ("lr_scale", "decay_scale")
    }
    return train.model_copy(update={"optimizer": optimizer.model_copy(update=kept)})


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
        self.live: LiveTeacher | None = None
        self._check_terms()
        if any(arm in TAUGHT for arm in self.recipe.arms):
            self.teacher = self._open_teacher()

    def _check_terms(self) -> None:
        recipe = self.recipe
        stored = recipe.soft_targets.kind == "stored"
        if "shuffled" in recipe.arms and not stored:
            raise UserError("arms: shuffled needs soft_targets.kind=stored")
        maps = [term.name for term in self.terms if term.kind.maps]
        if stored and maps and {"distilled", "shuffled"} & set(recipe.arms):
            raise UserError(f"losses: {', '.join(maps)}: feature maps need soft_targets.kind=live")

    def _open_teacher(self) -> TrainedTeacher:
        recipe = self.recipe
        path = find_teacher(recipe.teacher, recipe.data.name)
        teacher = load_teacher(path, self.data.num_classes)
        teacher.model.to(self.accelerator.device)
        if recipe.soft_targets.kind == "stored":
            targets = recipe.soft_targets
            self.posteriors = train_posteriors(
                teacher, self.data, self.accelerator, out_of_fold=targets.out_of_fold
            ).balanced(targets.balance)
        else:
            if teacher.recipe.data.size != recipe.data.size:
                raise UserError(
                    f"data.size {recipe.data.size}: the teacher saw {teacher.recipe.data.size}; "
                    "a live teacher sees the student's pictures"
                )
            # One for all arms and seeds: each would leave its hooks on the teacher.
            layers = [term.teacher for term in self.terms if term.kind.maps]
            autocast = self.accelerator.mixed_precision == "bf16"
            self.live = LiveTeacher(teacher.model, teacher.task, layers, autocast=autocast)
        return teacher

    def check(self) -> None:
        """Build every arm and compute its losses on two images, so that no arm fails after others.

        Raises:
            UserError: A layer, an output or a weight that does not fit, shapes that differ.
        """
        seed = self.recipe.seeds[0]
        labelled = labelled_images(self.data.train, self.recipe.data.labelled, seed)
        dataset = self._dataset(seed, labelled)
        for arm in self.recipe.arms:
            model, objective = self._assemble(arm, seed, labelled, dataset)
            batch = self._sample(dataset)
            with torch.no_grad(), evaluating(model):
                losses = forward_losses(model, batch, objective)
            check_weights(losses, objective.weights_at(0.0))
            settings = train_section(self.recipe.train, arm).optimizer.model_dump()
            make_optimizer(model, **settings)

    def run(self, arm: Arm, seed: int) -> None:
        """Train one arm of one seed, unless its folder has it already."""
        recipe, accelerator = self.recipe, self.accelerator
        config = {**recipe.model_dump(mode="json"), "arm": arm, "seed": seed}
        folder = open_run(accelerator, self.out / f"seed{seed}" / arm, config, resume=True)
        if folder.finished:
            return
        labelled = labelled_images(self.data.train, recipe.data.labelled, seed)
        dataset = self._dataset(seed, labelled)
        loader = make_loader(
            dataset,
            accelerator,
            batch_size=recipe.train.batch_size // recipe.train.accumulate,
            workers=recipe.data.workers,
            seed=seed,
            train=True,
        )
        model, objective = self._assemble(arm, seed, labelled, dataset)
        label = f"{recipe.student.name} {arm} seed {seed}"
        train = train_section(recipe.train, arm)
        session = Session(folder, accelerator, self.data, train, seed, label, self._pictures)
        run_training(session, model, objective, loader)

    def _assemble(
        self, arm: Arm, seed: int, labelled: NDArray[np.int64] | None, dataset: SceneDataset
    ) -> tuple[nn.Module, Objective]:
        """A student at its seed's initial weights, adapters drawn after it, and what it learns."""
        terms, source = self._terms(arm), self._source(arm, seed)
        set_seed(seed)
        student = build_student(
            self.recipe.student, self.data.prior(labelled), context=arm not in BARE
        ).to(self.accelerator.device)
        batch = self._sample(dataset)
        adapters = self.recipe.adapters
        model = adapt_student(student, terms, adapters, self.live, self.task, batch)
        objective = Objective(
            self.task, self.recipe.task.weights, terms, source, watched=arm not in TAUGHT
        )
        return model.to(self.accelerator.device), objective

    def _sample(self, dataset: SceneDataset) -> dict[str, torch.Tensor]:
        """Two samples as a batch, for finding shapes and mistakes without starting workers."""
        batch = collate([dataset[0, place] for place in range(min(2, len(dataset)))])
        return to_device(batch, self.accelerator.device, channels_last=False)

    def _dataset(self, seed: int, labelled: NDArray[np.int64] | None) -> SceneDataset:
        recipe = self.recipe
        return make_dataset(
            self.data,
            "train",
            train=True,
            mode="all" if recipe.soft_targets.kind == "stored" else "one",
            labelled=labelled,
            seed=seed,
            epochs=recipe.train.epochs,
        )

    def _has_terms(self, arm: Arm) -> bool:
        """Whether it is taught, or shows stored terms without learning from them: at no cost."""
        return arm in TAUGHT or (arm == "plain" and self.posteriors is not None)

    def _terms(self, arm: Arm) -> list[Term]:
        if not self._has_terms(arm):
            return []
        if arm == "direct":
            options = {"temperature": 1.0}
            return build_terms([TermSection(name="direct", weight=1.0, options=options)])
        return self.terms

    def _source(self, arm: Arm, seed: int) -> SoftTargetSource | None:
        if not self._has_terms(arm):
            return None
        if self.posteriors is not None:
            return self.posteriors.shuffled(seed) if arm == "shuffled" else self.posteriors
        return self.live

    def _pictures(self, session: Session, training: Training, task: Task, tracker: Tracker) -> None:
        expects = None if self.teacher is None else partial(expectation, self.teacher)
        write_pictures(session, training, task, tracker, expectation=expects)
