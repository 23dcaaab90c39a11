"""Modes and starts become recipes: what is frozen, at which rate, from which weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.config.recipes import TransferRecipe
from kd.data.loader import collate
from kd.distillation.student import AdaptedStudent
from kd.engine.loop import train_step
from kd.engine.state import Objective
from kd.errors import ConfigError, UserError
from kd.experiments.transfer import Start, starts
from kd.problems.base import Sampling
from kd.problems.objects.problem import PROBLEM
from kd.problems.recipes import load_recipe
from kd.runs.build import make_accelerator, open_data
from kd.runs.setup import start_training

RECIPE = """
task: {name: scene_labels, weights: {binary: 1.0}}
student: {name: transferred, options: {region_size: 1}}
probe: {lr: 0.1, epochs: 2, remember: true}
finetune: {trunk: 0.25}
train: {epochs: 3, batch_size: 8, optimizer: {lr: 0.01}, precision: fp32}
"""


@pytest.fixture
def recipe_of(tmp_path: Path, small_data: list[str], small_teacher: Path) -> Any:
    def read(*settings: str, text: str = RECIPE) -> TransferRecipe:
        (tmp_path / "mine.yaml").write_text(text)
        flags = [*small_data[1::2], f"teacher.run={small_teacher}", *settings]
        return load_recipe(TransferRecipe, tmp_path / "mine.yaml", settings=flags)

    return read


def rows_of(recipe: TransferRecipe) -> dict[tuple[str, str], Start]:
    return {(row.mode, row.name): row for row in starts(recipe)}


def test_every_mode_starts_from_everything(recipe_of: Any, small_teacher: Path) -> None:
    rows = rows_of(recipe_of())
    assert list(rows) == [
        ("probe", "random"), ("probe", "context"), ("finetune", "random"), ("finetune", "context"),
    ]  # fmt: skip
    options = {key: row.recipe.student.options for key, row in rows.items()}
    assert [one["weights"] for one in options.values()] == [None, str(small_teacher)] * 2
    assert [one.get("frozen") for one in options.values()] == ["all", "all", None, None]
    assert len({str(one["like"]) for one in options.values()}) == 1
    trains = {key: row.recipe.train for key, row in rows.items()}
    assert [(one.epochs, one.optimizer.lr) for one in trains.values()] == [(2, 0.1)] * 2 + [
        (3, 0.01)
    ] * 2
    scales = [one.optimizer.lr_scale for one in trains.values()]
    assert scales == [{}, {}, {}, {"trunk": 0.25}]  # a random trunk has nothing to be spared
    assert rows["probe", "random"].path == Path("probe/random")


def test_a_mode_can_be_left_out(recipe_of: Any) -> None:
    assert [key[0] for key in rows_of(recipe_of("probe=null"))] == ["finetune", "finetune"]


def step(row: Start) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The student's state before and after one step of training."""
    data = open_data(row.recipe.data)
    torch.manual_seed(0)
    student = data.problem.build_student(row.recipe.student, data.num_classes, context=False)
    dataset = data.problem.training(data, Sampling(seed=0))
    batch = collate([dataset[0, place] for place in range(4)])
    task = data.problem.task(row.recipe.task, row.recipe.data, data.num_classes)
    training = start_training(
        make_accelerator("fp32"), AdaptedStudent(student), row.recipe.train, 1
    )
    before = copy.deepcopy(student.state_dict())
    training.model.train()
    train_step(training, [batch], Objective(task, {"binary": 1.0}), {"binary": 1.0})
    return before, dict(student.state_dict())


def test_a_probe_changes_the_head_alone_and_fine_tuning_all(recipe_of: Any) -> None:
    for (mode, _), row in rows_of(recipe_of()).items():
        before, after = step(row)
        changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
        assert "appearance.1.weight" in changed
        inside = {name for name in changed if name.startswith("trunk.")}
        assert bool(inside) == (mode == "finetune"), (mode, inside)
        if mode == "finetune":
            assert any(name.endswith("running_mean") for name in inside)


def test_fine_tuning_spares_a_trunk_that_knows_something(recipe_of: Any) -> None:
    row = rows_of(recipe_of())["finetune", "context"]
    student = AdaptedStudent(PROBLEM.build_student(row.recipe.student, 22, context=False))
    training = start_training(make_accelerator("fp32"), student, row.recipe.train, 10)
    trunk = {id(parameter) for parameter in student.student.get_submodule("trunk").parameters()}
    for group in training.optimizer.param_groups:
        own = {id(parameter) in trunk for parameter in group["params"]}
        assert group["initial_lr"] == pytest.approx(0.0025 if own == {True} else 0.01)
        assert len(own) == 1


def test_what_cannot_be_is_said(recipe_of: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"starts\.mine: nowhere: no such run folder or file"):
        list(starts(recipe_of("starts.mine=nowhere")))
    with pytest.raises(ConfigError, match="student: options weights: set by `starts`, `probe` and"):
        recipe_of("student.options.weights=null")
    with pytest.raises(ConfigError, match="at least one is needed"):
        recipe_of("probe=null", "finetune=null")
    with pytest.raises(ConfigError, match=r"seeds .* must be one or more different numbers"):
        recipe_of("seeds=[1, 1]")
    with pytest.raises(UserError, match=r"no trained teacher at .* --teacher unet --data scenes"):
        list(starts(recipe_of("teacher={run: null, name: unet}")))
