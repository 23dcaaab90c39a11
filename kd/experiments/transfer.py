"""Compare one student with several initial weights of its trunk, probed and fine-tuned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.config.recipes import DistillRecipe, Finetune, Model, Probe, Train, TransferRecipe
from kd.errors import UserError
from kd.problems import problem_of_task
from kd.runs.load_teacher import find_teacher

TEACHER = "teacher"


@dataclass(frozen=True)
class Start:
    """One row of the table: how a student is trained and which initial weights its trunk has.

    Attributes:
        mode: `probe` (only the head is trained) or `finetune`.
        name: Name of the trunk's initial weights, a key of the recipe's `starts`.
        recipe: Recipe that trains this student.
    """

    mode: str
    name: str
    recipe: DistillRecipe

    @property
    def path(self) -> Path:
        """Path of this row's runs, relative to the output folder."""
        return Path(self.mode) / self.name

    def summary(self, out: Path, seed: int) -> Path:
        """Path of one seed's `summary.json`; `out` is the output folder."""
        return out / self.path / f"seed{seed}" / "no_context" / "summary.json"


def starts(recipe: TransferRecipe, data_typed: str | None = None) -> Iterator[Start]:
    """Yield every combination of mode and initial weights, grouped by mode.

    `data_typed` is the argument of `--data`, which error messages repeat.

    Raises:
        UserError: A run or a file of weights is missing.
    """
    student, weights = _student(recipe, data_typed)
    for mode, section in (("probe", recipe.probe), ("finetune", recipe.finetune)):
        if section is None:
            continue
        for name, source in weights.items():
            options = {**student.options, "weights": source, **_frozen(section)}
            variant = DistillRecipe(
                data=recipe.data, task=recipe.task, metrics=recipe.metrics, seeds=recipe.seeds,
                variants=("no_context",), student=student.model_copy(update={"options": options}),
                train=_train(recipe.train, section, random=source is None),
            )  # fmt: skip
            yield Start(mode, name, variant)


def _student(recipe: TransferRecipe, data_typed: str | None) -> tuple[Model, dict[str, str | None]]:
    """Return the student, and the trunk's initial weights by name of the start.

    Weights are a run folder, a file, "imagenet", or None for random weights.
    """
    student, weights = recipe.student, dict(recipe.starts)
    problem = problem_of_task(recipe.task.name)
    alike = student.name == problem.transferred and "like" not in student.options
    if alike or TEACHER in weights.values():
        run = str(find_teacher(recipe.teacher, recipe.data.name, typed=data_typed))
        weights = {name: run if source == TEACHER else source for name, source in weights.items()}
        if alike:
            student = student.model_copy(update={"options": {**student.options, "like": run}})
    for name, source in weights.items():
        if source not in (None, "imagenet") and not Path(str(source)).exists():
            raise UserError(f"starts.{name}: {source}: no such run folder or file of weights")
    return problem.resolve_student(student), weights


def _frozen(section: Probe | Finetune) -> dict[str, Any]:
    if isinstance(section, Finetune):
        return {}
    return {"frozen": "all", "remember": section.remember}


def _train(train: Train, section: Probe | Finetune, *, random: bool) -> Train:
    """Return the training settings of a mode; a `random` trunk has the full learning rate."""
    optimizer = train.optimizer
    if isinstance(section, Finetune) and not random:
        scale = {**optimizer.lr_scale, "trunk": section.trunk}
        optimizer = optimizer.model_copy(update={"lr_scale": scale})
    if section.lr is not None:
        optimizer = optimizer.model_copy(update={"lr": section.lr})
    return train.model_copy(
        update={"optimizer": optimizer, "epochs": section.epochs or train.epochs}
    )
