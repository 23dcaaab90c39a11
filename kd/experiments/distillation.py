"""Train the variants of one student, which differ only in the part of the method under test.

All variants of a seed have the same initial weights, data order, augmented images, labels and
number of steps. A head that only some variants have is initialised last, so that all other modules
have the same initial weights in every variant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import Tensor, nn

from kd.config.recipes import DistillRecipe, Train
from kd.data.loader import Samples
from kd.distillation.hooks import FeatureTaps
from kd.distillation.student import AdaptedStudent, adapt_student
from kd.distillation.terms import Term, build_term, check_weights, outputs_by_teacher, tapped_layers
from kd.distillation.variants import Variant, variants_of
from kd.engine.optim import make_optimizer
from kd.engine.state import Objective
from kd.errors import ConfigError, UserError
from kd.experiments.teachers import RecipeTeachers, find_teachers, open_teachers
from kd.experiments.validate import check_terms
from kd.problems.base import Dataset, Mean, Sampling, Task
from kd.runs.build import check_kind, make_loader
from kd.runs.setup import check_losses, first_batch, open_run
from kd.runs.train import RunSetup, run_training


def train_section(train: Train, variant: Variant) -> Train:
    """Return the training settings of a variant.

    If the variant has no context head, the factors on the head's learning rate and weight decay
    are removed.
    """
    if variant.context_head:
        return train
    optimizer = train.optimizer
    scales = {
        name: {k: v for k, v in getattr(optimizer, name).items() if not k.startswith("context")}
        for name in ("lr_scale", "decay_scale")
    }
    return train.model_copy(update={"optimizer": optimizer.model_copy(update=scales)})


@dataclass
class Distillation:
    """A distillation experiment: trains each variant of a recipe's student for each seed.

    Creating the object checks the recipe against the data and opens the teachers, which all
    variants share. Quick checks come first.

    Attributes:
        recipe: The resolved recipe.
        data: The dataset.
        accelerator: Devices and processes.
        out: Output folder; runs are written to `seed<k>/<variant>/` in it.
        label: Label of progress lines; empty: the names of student and variant.
        labelled_only: Whether to train on labelled images only, because no term needs the others.
        data_typed: Argument of `--data` as the user typed it, for error messages.
        variants: The recipe's variants by name.
        terms: The terms of all variants.
        task: The students' task.
        sources: The opened teachers; None if no variant needs one.

    Raises:
        UserError: Terms, variants, teachers or the student do not fit each other or the data.
    """

    recipe: DistillRecipe
    data: Dataset
    accelerator: Accelerator
    out: Path
    label: str = ""  # label of progress lines; empty: names of student and variant
    labelled_only: bool = False  # leave out unlabelled images: no term reads them
    data_typed: str | None = None  # argument of --data, quoted in messages

    def __post_init__(self) -> None:
        recipe, data = self.recipe, self.data
        check_kind(recipe.task.name, recipe.data)
        every = variants_of(recipe)
        self.variants = {name: every[name] for name in recipe.variants}
        wanted = [section for one in self.variants.values() for section in one.terms + one.watched]
        own = [section for section in recipe.all_losses if section in wanted]
        others = [section for section in wanted if section not in own]
        self.terms = [build_term(section) for section in own + others]
        self.sources: RecipeTeachers | None = None
        taught = any(variant.terms for variant in self.variants.values())
        paths = find_teachers(recipe, self.terms, data, self.data_typed) if taught else {}
        self.task = self._task()
        check_terms(recipe, self.variants.values(), self.terms, self.task, data)
        if taught:
            self._check_students()  # before a teacher runs for hours
            self.sources = open_teachers(
                recipe, self.terms, self.task, data, self.accelerator, paths
            )

    @property
    def _any_variant(self) -> Variant:
        """A variant with every head that any of the variants has."""
        return Variant("any", tuple(term.section for term in self.terms))

    def _task(self) -> Task:
        section, data = self.recipe.task, self.data
        problem = data.problem
        model = self.student(self._any_variant, None) if problem.task_needs_student else None
        fractions = problem.class_fractions(section, data)
        return problem.task(
            section, data.section, data.num_classes, model=model, fractions=fractions
        )

    def _check_students(self) -> None:
        """Build every variant's student, tap its layers and compute its supervised losses."""
        layers, seed = tapped_layers(self.terms, self.task), self.recipe.seeds[0]
        whole = self.student(self._any_variant, None) if layers else nn.Identity()
        for term in (term for term in self.terms if term.student in layers):
            called = f"losses: {term.name}: student"
            FeatureTaps(whole, [term.student], called=called).remove()
        objective = Objective(self.task, self.recipe.task.weights)
        for name, variant in self.variants.items():
            student = self.student(variant, self.data.labelled(seed))
            self._losses(AdaptedStudent(student), self.samples(name, seed), objective)

    def _losses(
        self, student: nn.Module, samples: Samples, objective: Objective
    ) -> Mapping[str, Mean]:
        called = f"student {self.recipe.student.name!r}"
        batch = self.first_batch(samples)
        student = student.to(self.accelerator.device)
        return check_losses(student, batch, objective, self.data.num_classes, called=called)

    def check(self) -> None:
        """Build every variant and compute its losses on two images, before any is trained.

        Raises:
            UserError: A layer, an output, a loss weight or a parameter prefix does not fit.
        """
        seed = self.recipe.seeds[0]
        for name, variant in self.variants.items():
            samples = self.samples(name, seed)
            model, objective = self.assemble(name, seed, samples)
            check_weights(self._losses(model, samples, objective), objective.weights_at(0.0))
            settings = train_section(self.recipe.train, variant).optimizer.model_dump()
            make_optimizer(model, **settings)

    def run(self, variant: str, seed: int) -> None:
        """Train one variant for one seed, or resume; do nothing if the run is finished."""
        recipe, accelerator = self.recipe, self.accelerator
        config = {**recipe.model_dump(mode="json"), "variant": variant, "seed": seed}
        folder = open_run(accelerator, self.out / f"seed{seed}" / variant, config, resume=True)
        if folder.finished:
            return
        samples = self.samples(variant, seed)
        loader = make_loader(
            samples, accelerator, batch_size=recipe.train.batch_size // recipe.train.accumulate,
            workers=recipe.data.workers, seed=seed, train=True,
        )  # fmt: skip
        model, objective = self.assemble(variant, seed, samples)
        label = f"{self.label or f'{recipe.student.name} {variant}'} seed {seed}"
        train = train_section(recipe.train, self.variants[variant])
        teacher = None if self.sources is None else self.sources.teacher
        setup = RunSetup(folder, accelerator, self.data, train, seed, label, teacher)
        run_training(setup, model, objective, loader)

    def assemble(self, variant: str, seed: int, samples: Samples) -> tuple[nn.Module, Objective]:
        """Build a variant's `AdaptedStudent` with the seed's initial weights, and its objective.

        Adapters are initialised after the student, so that they do not change its weights.
        """
        one, terms, source = self.variants[variant], self._terms(variant), None
        if self.sources is not None and terms:
            source = self.sources.targets(
                self._outputs(variant), shuffled=seed if one.shuffled else None
            )
        task = self.task.for_terms(terms)
        set_seed(seed)
        student = self.student(one, self.data.labelled(seed)).to(self.accelerator.device)
        batch = self.first_batch(samples)
        model, terms = adapt_student(student, terms, self.recipe.adapters, source, task, batch)
        weights = self.recipe.task.weights
        objective = Objective(task, weights, terms, source, watched=not one.terms)
        return model.to(self.accelerator.device), objective

    def student(self, variant: Variant, labelled: NDArray[np.int64] | None) -> nn.Module:
        """Build a variant's student with initial weights.

        `labelled` are the ids of the labelled train images, or None if all are labelled.
        """
        try:
            problem = self.data.problem
            return problem.build_student(
                self.recipe.student, self.data.num_classes,
                prior=problem.student_prior(self.data, labelled), context=variant.context_head,
                outputs=variant.outputs,
            )  # fmt: skip
        except ConfigError as error:
            if variant.context_head:
                raise
            raise UserError(
                f"variants: {variant.name}: sets the student's option `context` to false: {error}"
            ) from error

    def first_batch(self, samples: Samples) -> dict[str, Tensor]:
        """Return a batch of at most two samples, to find shapes and mistakes before training."""
        return first_batch(samples, self.recipe.train, self.accelerator)

    def samples(self, variant: str, seed: int) -> Samples:
        """Return the training samples, with the cached maps that this variant's terms read.

        Apart from these maps, the samples of all variants are the same.
        """
        recipe, data = self.recipe, self.data
        labelled = data.labelled(seed)
        sampling = Sampling(
            seed=seed,
            epochs=recipe.train.epochs,
            images=labelled if self.labelled_only else None,
            labelled=labelled,
            hide="all" if all(map(recipe.caches, recipe.teachers)) else "one",
            cached=[] if self.sources is None else self.sources.fields(self._outputs(variant)),
        )
        return data.problem.training(data, sampling, self.task)

    def _terms(self, variant: str) -> list[Term]:
        """Return a variant's terms, or, if it has none, the terms that it only logs."""
        one = self.variants[variant]
        if one.terms:
            return [term for term in self.terms if term.section in one.terms]
        if self.sources is None or not self.sources.all_cached:
            return []
        # Maps would pass through adapters that are not trained.
        return [t for t in self.terms if t.section in one.watched and not t.kind.maps]

    def _outputs(self, variant: str) -> dict[str, list[str]]:
        return outputs_by_teacher(self._terms(variant), self.recipe.more_teachers)
