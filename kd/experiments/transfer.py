"""One student from several starts, probed and fine-tuned: each a bare variant of a comparison."""

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
    """One row of the table: how the student learns, where its trunk starts, and its recipe."""

    mode: str
    name: str
    recipe: DistillRecipe

    @property
    def path(self) -> Path:
        """Below the folder of all."""
        return Path(self.mode) / self.name

    def summary(self, out: Path, seed: int) -> Path:
        """The file of the numbers of one seed."""
        return out / self.path / f"seed{seed}" / "no_context" / "summary.json"


def starts(recipe: TransferRecipe, data_typed: str | None = None) -> Iterator[Start]:
    """Every mode from every start, modes apart; the teacher's run is looked for.

    Args:
        recipe: As the user wrote it.
        data_typed: What `--data` was given, for a message.

    Raises:
        UserError: No run where a start needs one, or a student that cannot be built from it.
    """
    student, weights = _student(recipe, data_typed)
    for mode, section in (("probe", recipe.probe), ("finetune", recipe.finetune)):
        if section is None:
            continue
        for name, source in weights.items():
            options = {**student.options, "weights": source, **_frozen(section)}
            yield Start(
                mode,
                name,
                DistillRecipe(
                    data=recipe.data,
                    task=recipe.task,
                    metrics=recipe.metrics,
                    student=student.model_copy(update={"options": options}),
                    variants=("no_context",),
                    seeds=recipe.seeds,
                    train=_train(recipe.train, section, random=source is None),
                ),
            )


def _student(recipe: TransferRecipe, data_typed: str | None) -> tuple[Model, dict[str, str | None]]:
    """The student without weights, and the weights of each start."""
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
    """The mode's own settings; a trunk that starts at random weights has nothing to be spared."""
    optimizer = train.optimizer
    if isinstance(section, Finetune) and not random:
        scale = {**optimizer.lr_scale, "trunk": section.trunk}
        optimizer = optimizer.model_copy(update={"lr_scale": scale})
    if section.lr is not None:
        optimizer = optimizer.model_copy(update={"lr": section.lr})
    return train.model_copy(
        update={"optimizer": optimizer, "epochs": section.epochs or train.epochs}
    )
