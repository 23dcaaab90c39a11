"""List the layers of a model with their output shapes, to choose those that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd.config.reader import find_config, known_configs
from kd.config.recipes import DistillRecipe, Model, TaskSection, TeacherRecipe
from kd.data.loader import collate
from kd.deploy.model import TrainedModel, grey_sample, load
from kd.errors import UserError
from kd.problems import problem_of_task
from kd.problems.base import named, stride_of
from kd.problems.recipes import data_config, load_recipe
from kd.registry import all_names, is_foreign
from kd.runs.build import without_weights
from students import STUDENTS

CLASSES = 10  # of models that are built without their dataset; only heads depend on it


class Layer(NamedTuple):
    """One output of a module.

    Attributes:
        path: Name for `student:` or `teacher:` of a term; `path.key` for an entry of a dict.
        kind: Class of the module.
        shape: Shape of the output for a batch of one image.
        stride: Pixels per cell of a feature map; None for other outputs.
        parameters: Number of the module's parameters.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    stride: int | None
    parameters: int


def open_model(
    name: str, data: str | None = None, task: str = "classification"
) -> tuple[str, TrainedModel]:
    """Build or load the model that a name stands for, and describe what was found.

    Args:
        name: A run folder, a recipe of configs/distill or configs/teacher, or a student's name:
            `timm/NAME`, `torchvision/NAME`, `package.module:attribute`.
        data: Dataset whose image size is used; by default that of the recipe.
        task: Task of a student that has no recipe.

    Raises:
        UserError: There is no such model, or it cannot be built.
    """
    if Path(name).exists():
        model = load(name, device="cpu")
        return f"{model.where}", model
    if name in known_configs("distill"):
        distill = load_recipe(DistillRecipe, find_config("distill", name), data=data)
        built = _built(distill.student, distill.task, distill.data, "student")
        return f"student of configs/distill/{name}.yaml", built
    if name in known_configs("teacher"):
        recipe = load_recipe(TeacherRecipe, find_config("teacher", name), data=data)
        built = _built(recipe.teacher, recipe.task, recipe.data, "teacher")
        return f"teacher of configs/teacher/{name}.yaml", built
    if name in STUDENTS or is_foreign(name) or "/" in name:
        section = TaskSection(name=task, weights={})
        problem = problem_of_task(task)
        dataset = data_config(data or problem.spec.example)
        return f"student {name}", _built(Model(name=name), section, dataset, "student")
    known = {*known_configs("distill"), *known_configs("teacher"), *STUDENTS}
    raise UserError(f"{name}: no run folder, recipe or student{all_names(name, sorted(known))}")


def _built(model: Model, task: TaskSection, data: Any, role: str) -> TrainedModel:
    """Build a model with random weights and `CLASSES` classes."""
    problem = problem_of_task(task.name)
    model = without_weights(model, remember=False)
    network = (
        problem.build_teacher(model, CLASSES)
        if role == "teacher"
        else problem.build_student(problem.resolve_student(model), CLASSES)
    )
    names = [f"class {number}" for number in range(CLASSES)]
    built = problem.task(task, data, CLASSES, model=network)
    return TrainedModel(
        network.eval(), built, problem.inference(task.name, data, names), {}, Path()
    )


def layers_of(model: TrainedModel) -> tuple[list[Layer], list[Layer]]:
    """Run one grey image and return the layers that ran, and the model's named outputs."""
    found: dict[str, Layer] = {}
    batch = collate([grey_sample(model)])
    side = batch["images"].shape[2]
    inner = {path: module for path, module in model.model.named_modules() if path}

    def add(path: str, module: nn.Module, output: object) -> None:
        if isinstance(output, Mapping):
            for key, part in output.items():
                add(f"{path}.{key}", module, part)
        elif isinstance(output, Tensor):
            found[path] = _layer(path, module, output, side)

    def hook_of(path: str) -> Any:
        def hook(module: nn.Module, _: object, output: object) -> None:
            add(path, module, output)

        return hook

    handles = [module.register_forward_hook(hook_of(path)) for path, module in inner.items()]
    try:
        with torch.no_grad():
            output = named(model.model(*model.task.inputs(batch)))
    finally:
        for handle in handles:
            handle.remove()
    outputs = [
        _layer(name, model.model, one, side) for name, one in output.items()
        if isinstance(one, Tensor)
    ]  # fmt: skip
    order = {path: place for place, path in enumerate(inner)}
    ran = sorted(found.values(), key=lambda one: order.get(one.path, order.get(
        one.path.rpartition(".")[0], 0)))  # fmt: skip
    return ran, outputs


def _layer(path: str, module: nn.Module, output: Tensor, side: int) -> Layer:
    shape = tuple(output.shape)
    stride = stride_of(side, shape[2]) if len(shape) == 4 and shape[2] > 1 else None
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Layer(path, type(module).__name__, shape, stride, parameters)
