"""The variants of a comparison: one student, with and without each thing that is compared.

All variants of a seed share initial weights, data order, pixels, labels and steps. A saliency
student has its second map, the last to be drawn, in those variants alone that teach it.

plain      the student and its labels, no distillation
distilled  with the recipe's terms
no_context without the context head, no distillation
shuffled   the recipe's terms, each posterior given to another object: the control
output_kd  without the context head; the posterior teaches its output: the ablation of METHODS 7

An ablation's variants are named in the recipe, each with the labels of its terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import nn

from kd.config.recipes import VARIANTS, DistillRecipe, Train
from kd.config.recipes import Term as TermSection
from kd.data.loader import Samples, collate, to_device
from kd.distillation.hooks import FeatureTaps
from kd.distillation.targets import SoftTargetSource
from kd.distillation.terms import Term, check_weights
from kd.engine.loop import forward_losses
from kd.engine.optim import make_optimizer
from kd.engine.state import Objective
from kd.errors import UserError
from kd.experiments.connect import (
    adapt_student,
    build_terms,
    outputs_by_teacher,
    tapped_layers,
    task_of,
)
from kd.experiments.teachers import RecipeTeachers, find_teachers, open_teachers
from kd.experiments.validate import check_terms
from kd.problems.base import Dataset, Mean, Sampling, Task
from kd.runs.build import check_kind, make_loader
from kd.runs.load_student import BARE, outputs_read
from kd.runs.setup import open_run
from kd.runs.train import Session, run_training

TAUGHT = ("distilled", "shuffled", "output_kd")


def train_section(train: Train, variant: str) -> Train:
    """The settings of a variant: those of the context head fall away where there is none."""
    if variant not in BARE:
        return train
    optimizer = train.optimizer
    kept = {
        name: {k: v for k, v in getattr(optimizer, name).items() if not k.startswith("context")}
        for name in ("lr_scale", "decay_scale")
    }
    return train.model_copy(update={"optimizer": optimizer.model_copy(update=kept)})


@dataclass
class Distillation:
    """All that the variants of a recipe share; the teacher is opened once, ahead of training."""

    recipe: DistillRecipe
    data: Dataset
    accelerator: Accelerator
    out: Path
    label: str = ""  # what progress lines call a student and its variant; empty: their names
    labelled_alone: bool = False  # leave out pictures without labels: no term reads them
    data_typed: str | None = None  # what --data was given, for messages

    def __post_init__(self) -> None:
        """Find out what can be wrong before the first step, what takes no time first."""
        recipe, data = self.recipe, self.data
        check_kind(recipe.task.name, recipe.data)
        self.terms = build_terms(self._wanted())
        self.sources: RecipeTeachers | None = None
        check_terms(recipe, self.terms, data)
        taught = any(self._taught(variant) for variant in recipe.variants)
        paths = find_teachers(recipe, self.terms, data, self.data_typed) if taught else {}
        self.task = self._task()
        if taught:
            self._check_layers()
            self.sources = open_teachers(recipe, self.terms, data, self.accelerator, paths)

    def _task(self) -> Task:
        section, data = self.recipe.task, self.data
        problem = data.problem
        model = self._student("distilled", None) if problem.task_needs_student else None
        fractions = problem.class_fractions(section, data)
        return problem.task(
            section, data.section, data.num_classes, model=model, fractions=fractions
        )

    def _wanted(self) -> list[TermSection]:
        """The terms that any of the variants has."""
        recipe = self.recipe
        wanted = {name for variant in recipe.variants for name in recipe.terms_of(variant) or ()}
        if any(variant in VARIANTS for variant in recipe.variants if variant not in BARE):
            wanted |= {term.curve for term in recipe.losses}
        return [term for term in recipe.all_losses if term.curve in wanted]

    def _taught(self, variant: str) -> bool:
        """Whether a teacher teaches it."""
        return variant in TAUGHT or bool(self.recipe.terms_of(variant))

    def _check_layers(self) -> None:
        """A mistyped layer of the student, before a teacher works for hours."""
        layers = tapped_layers(self.terms)
        if layers and any(
            variant not in VARIANTS or variant == "distilled" for variant in self.recipe.variants
        ):
            student = self._student("distilled", None)
            FeatureTaps(student, layers, called="student").remove()

    def check(self) -> None:
        """Build every variant and compute its losses on two images, before any of them trains.

        Raises:
            UserError: A layer, an output or a weight that does not fit, shapes that differ.
        """
        seed = self.recipe.seeds[0]
        labelled = self.data.labelled(seed)
        for variant in self.recipe.variants:
            dataset = self._dataset(seed, labelled, variant)
            model, objective = self._assemble(variant, seed, labelled, dataset)
            batch = self._sample(dataset)
            losses = _first_losses(model, batch, objective)
            check_weights(losses, objective.weights_at(0.0))
            settings = train_section(self.recipe.train, variant).optimizer.model_dump()
            make_optimizer(model, **settings)

    def run(self, variant: str, seed: int) -> None:
        """Train one variant of one seed, unless its folder has it already."""
        recipe, accelerator = self.recipe, self.accelerator
        config = {**recipe.model_dump(mode="json"), "variant": variant, "seed": seed}
        folder = open_run(accelerator, self.out / f"seed{seed}" / variant, config, resume=True)
        if folder.finished:
            return
        labelled = self.data.labelled(seed)
        dataset = self._dataset(seed, labelled, variant)
        loader = make_loader(
            dataset,
            accelerator,
            batch_size=recipe.train.batch_size // recipe.train.accumulate,
            workers=recipe.data.workers,
            seed=seed,
            train=True,
        )
        model, objective = self._assemble(variant, seed, labelled, dataset)
        label = f"{self.label or f'{recipe.student.name} {variant}'} seed {seed}"
        train = train_section(recipe.train, variant)
        teacher = None if self.sources is None else self.sources.teacher
        session = Session(folder, accelerator, self.data, train, seed, label, teacher)
        run_training(session, model, objective, loader)

    def _assemble(
        self, variant: str, seed: int, labelled: NDArray[np.int64] | None, dataset: Samples
    ) -> tuple[nn.Module, Objective]:
        """A student at its seed's initial weights, adapters drawn after it, and what it learns."""
        terms, source = self._terms(variant), self._source(variant, seed)
        task = task_of(self.task, terms)
        set_seed(seed)
        student = self._student(variant, labelled).to(self.accelerator.device)
        batch = self._sample(dataset)
        tapped = tapped_layers(terms)
        adapters = {name: a for name, a in self.recipe.adapters.items() if name in tapped}
        model, terms = adapt_student(student, terms, adapters, source, task, batch)
        objective = Objective(
            task, self.recipe.task.weights, terms, source, watched=not self._taught(variant)
        )
        return model.to(self.accelerator.device), objective

    def _student(self, variant: str, labelled: NDArray[np.int64] | None) -> nn.Module:
        """A student at initial weights."""
        return self.data.problem.build_student(
            self.recipe.student,
            self.data,
            labelled=labelled,
            context=variant not in BARE,
            outputs=outputs_read(self.recipe, variant),
        )

    def _sample(self, dataset: Samples) -> dict[str, torch.Tensor]:
        """A batch of two, or of what a process gets, to find shapes and mistakes before workers."""
        train = self.recipe.train
        own = train.batch_size // train.accumulate // self.accelerator.num_processes
        batch = collate([dataset[0, place] for place in range(min(2, max(1, own), len(dataset)))])
        return to_device(batch, self.accelerator.device, channels_last=False)

    def _dataset(
        self, seed: int, labelled: NDArray[np.int64] | None, variant: str = "plain"
    ) -> Samples:
        """The same samples for every variant; stored maps come with them where they are used."""
        recipe, data = self.recipe, self.data
        cached = [] if self.sources is None else self.sources.fields(self._outputs(variant))
        sampling = Sampling(
            seed=seed,
            epochs=recipe.train.epochs,
            images=labelled if self.labelled_alone else None,
            labelled=labelled,
            hide="all" if all(map(recipe.keeps, recipe.teachers)) else "one",
            cached=cached,
        )
        return data.problem.training(data, sampling, self.task)

    def _has_terms(self, variant: str) -> bool:
        """Whether it is taught, or shows stored terms without learning from them: at no cost."""
        return self._taught(variant) or (
            variant == "plain" and self.sources is not None and self.sources.stored
        )

    def _terms(self, variant: str) -> list[Term]:
        if not self._has_terms(variant):
            return []
        if variant == "output_kd":
            options = {"temperature": 1.0}
            return build_terms([TermSection(name="output_kd", weight=1.0, options=options)])
        if variant == "plain":  # maps would go through adapters that nobody trains
            return [term for term in self.terms if not term.kind.maps]
        names = self.recipe.terms_of(variant)
        if names is None:
            names = tuple(term.curve for term in self.recipe.losses)
        return [term for term in self.terms if term.name in names]

    def _source(self, variant: str, seed: int) -> SoftTargetSource | None:
        if self.sources is None or not self._has_terms(variant):
            return None
        shuffled = seed if variant == "shuffled" else None
        return self.sources.targets(self._outputs(variant), shuffled=shuffled)

    def _outputs(self, variant: str) -> dict[str, list[str]]:
        """What a variant's terms read of each teacher."""
        return outputs_by_teacher(self._terms(variant), self.recipe.more_teachers)


def _first_losses(
    model: nn.Module, batch: dict[str, torch.Tensor], objective: Objective
) -> dict[str, Mean]:
    """Losses in training, where some models give more; the model's statistics move.

    Raises:
        UserError: Too few images for a batch norm that sees one place of each.
    """
    try:
        with torch.no_grad():
            return forward_losses(model.train(), batch, objective)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"train.batch_size: {len(batch['images'])} image for each process and micro-batch is "
            "too few for the student, whose batch norms see one place of each; 2 are enough"
        ) from error
