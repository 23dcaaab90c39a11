"""Every recipe in configs/ loads and builds, for every dataset that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from kd.config.datasets import DatasetSection
from kd.config.reader import CONFIGS, find_config, known_configs, read_yaml, to_yaml
from kd.config.recipes import (
    DistillRecipe,
    Model,
    SoftTargets,
    TaskSection,
    TeacherRecipe,
    Train,
    TransferRecipe,
)
from kd.distillation.student import adapt_student
from kd.distillation.targets import LiveTeacher
from kd.distillation.terms import build_term, distillation_losses, layers_among
from kd.distillation.variants import Variant, variants_of
from kd.engine.optim import make_optimizer, make_schedule
from kd.experiments.distillation import train_section
from kd.experiments.transfer import starts
from kd.problems import problem_of_task
from kd.problems.base import Batch, Rows, Task
from kd.problems.detection.task import Detection
from kd.problems.objects.problem import PROBLEM
from kd.problems.objects.schema import ObjectsSection
from kd.problems.recipes import data_config, load_recipe
from kd.problems.saliency.schema import SaliencySection
from kd.problems.segmentation.schema import SegmentationSection
from kd.runs.setup import learns
from kd.transforms.augment import build_augment
from kd.transforms.crops import build_crops, build_flips

CLASSES = {"scenes": 12, "scenes_maps": 23, "camvid": 11, "cityscapes": 19, "ade20k": 150,
           "voc2012": 21, "scenes_gaze": 1, "osie": 1, "salicon": 1, "mit1003": 1,
           "cat2000": 1}  # fmt: skip
COCO = 80  # elsewhere
LOOKED_AT = {"scenes_gaze", "osie", "salicon", "mit1003", "cat2000"}
ON_PIXELS = CLASSES.keys() - {"scenes"}


def pairs(kind: str) -> list[tuple[str, str]]:
    """Each recipe with its own dataset and with each that it has a variant for."""
    found: list[tuple[str, str]] = []
    for name in known_configs(kind):
        content = read_yaml(find_config(kind, name))
        own = content.get("data", "scenes")
        own = own["name"] if isinstance(own, dict) else own
        found += [(name, data) for data in sorted({own, *content.get("per_data", {})})]
    return found


def offline(model: Model) -> Model:
    """The model with random weights where it would fetch some."""
    options = dict(model.options)
    if "weights" in options:
        options["weights"] = None
    return model.model_copy(update={"options": options})


def check_training(train: Train, data: DatasetSection, model: nn.Module) -> None:
    optimizer = make_optimizer(model, **train.optimizer.model_dump())
    make_schedule(optimizer, 100, **train.schedule.model_dump())
    if isinstance(data, SaliencySection):
        build_flips(data.augment)
    elif isinstance(data, SegmentationSection):
        build_crops(data.augment)
    elif isinstance(data, ObjectsSection) and data.augment is not None:
        build_augment(data.augment)


def batch_of(data: DatasetSection, classes: int) -> dict[str, torch.Tensor]:
    if isinstance(data, SegmentationSection):
        assert not any(side % 8 for side in data.crop)
        height, width = (min(side, 176) for side in data.crop)
        return {
            "images": torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8),
            "sizes": torch.tensor([[height, width]] * 2),
            "image_ids": torch.arange(2),
            "label_maps": torch.randint(classes, (2, height, width), dtype=torch.uint8),
            "own_sizes": torch.tensor([[height, width]] * 2),
        }
    if isinstance(data, SaliencySection):
        assert not any(side % 8 for side in data.size)
        height, width = (min(side, 96) for side in data.size)
        density = torch.rand(2, 1, height, width)
        return {
            "images": torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8),
            "sizes": torch.tensor([[height, width], [height - 9, width - 20]]),
            "own_sizes": torch.tensor([[150, 200]] * 2),
            "image_ids": torch.arange(2),
            "density": density / density.sum(dim=(2, 3), keepdim=True),
        }
    assert isinstance(data, ObjectsSection)
    size = min(data.size, 96)
    return {
        "images": torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8),
        "sizes": torch.tensor([[size, size]]),
        "boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0], [20.0, 8.0, 44.0, 50.0]]),
        "labels": torch.tensor([0, 1]),
        "image_of": torch.tensor([0, 0]),
        "object_ids": torch.tensor([1, 2]),
        "area_fractions": torch.tensor([0.1, 0.1]),
        "usable": torch.tensor([True, True]),
        "hidden": torch.tensor([0, 1]),
        "hide_fraction": torch.ones(2),
        "class_maps": torch.zeros(1, size, size, dtype=torch.uint8),
    }


def check_one_batch(
    task: Task, model: nn.Module, weights: dict[str, float], data: DatasetSection, classes: int
) -> None:
    """The model takes the task's inputs, and each of the task's losses has a weight."""
    batch = batch_of(data, classes)
    finds = isinstance(task, Detection)
    if finds:
        del batch["hidden"]
    # In training alone a segmentation network gives its auxiliary maps, a detector its losses.
    trains = finds or isinstance(data, SegmentationSection | SaliencySection)
    output: Any = model.train(trains)(*task.inputs(batch))
    output = {"logits": output} if isinstance(output, torch.Tensor) else output
    assert task.losses(output, batch).keys() == weights.keys()
    if finds:
        output = model.eval()(*task.inputs(batch))
    assert task.decode(output, batch).isfinite().all()


def task_of(
    section: TaskSection, data: DatasetSection, classes: int, model: nn.Module | None = None
) -> Task:
    """A recipe's task, where all classes are as common."""
    equal = np.full(classes, 1 / classes)
    by_pixel = {"pixel_fractions": equal} if isinstance(data, SegmentationSection) else {}
    fractions = {"prior": equal, **by_pixel}
    task: Task = problem_of_task(section.name).task(
        section, data, classes, model=model, fractions=fractions
    )
    return task


@pytest.mark.parametrize("name", known_configs("data"))
def test_every_dataset_loads(name: str) -> None:
    assert data_config(name).name == name


@pytest.mark.parametrize(("name", "data"), pairs("teacher"))
def test_every_teacher_recipe_builds(name: str, data: str) -> None:
    recipe = load_recipe(TeacherRecipe, find_config("teacher", name), data=data)
    classes = CLASSES.get(data, COCO)
    model = problem_of_task(recipe.task.name).build_teacher(offline(recipe.teacher), classes)
    task = task_of(recipe.task, recipe.data, classes, model)
    if learns(model):
        check_training(recipe.train, recipe.data, model)
    check_one_batch(task, model, recipe.task.weights, recipe.data, classes)


@pytest.mark.parametrize(("name", "data"), pairs("distill"))
def test_every_distill_recipe_builds(name: str, data: str) -> None:
    recipe = load_recipe(DistillRecipe, find_config("distill", name), data=data)
    classes = CLASSES.get(data, COCO)
    prior = np.full(classes, 1 / classes)
    problem = problem_of_task(recipe.task.name)
    names_objects = problem.spec.name == "objects"
    reads = names_objects or recipe.student.options.get("context", False)
    for variant in ("plain", "no_context") if reads else ("plain",):
        student, options = offline(recipe.student), dict[str, object]()
        if variant != "plain":
            options["context"] = False
        if problem.spec.name == "saliency":
            options["branches"] = "a"
        given = {"prior": prior.tolist()} if reads and variant == "plain" else {}
        model = problem.named_student(
            student.name, {**student.options, **options}, num_classes=classes, **given
        )
        task = task_of(recipe.task, recipe.data, classes, model)
        check_one_batch(task, model, recipe.task.weights, recipe.data, classes)
        check_training(
            train_section(recipe.train, variants_of(recipe)[variant]), recipe.data, model
        )
    built = [build_term(one) for one in recipe.all_losses]
    assert {term.name for term in built} == {term.label for term in recipe.all_losses}


class Kept:
    """A teacher's outputs as they come with crops: each on a grid of so many pixels a place."""

    def __init__(self, live: LiveTeacher, settings: SoftTargets) -> None:
        self.live, self.settings = live, settings

    def __call__(self, batch: Batch, rows: Rows) -> dict[str, torch.Tensor]:
        found = {}
        for name, maps in self.live(batch).items():
            stride = self.settings.stride_of(layer=name not in self.live.task.outputs)
            grid = [-(-side // stride) for side in batch["images"].shape[2:]]
            found[name] = F.interpolate(maps, grid)
        return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data"), [pair for pair in pairs("distill") if pair[1] in ON_PIXELS]
)
def test_every_term_of_a_recipe_on_pixels_computes(name: str, data: str) -> None:
    """The layers that terms name are there, on grids that can be compared."""
    recipe = load_recipe(DistillRecipe, find_config("distill", name), data=data)
    teaches = load_recipe(TeacherRecipe, find_config("teacher", recipe.teacher.name), data=data)
    classes, terms = CLASSES[data], [build_term(one) for one in recipe.all_losses]
    task = task_of(recipe.task, recipe.data, classes)
    section = offline(recipe.student)
    options = {"branches": "b"} if data in LOOKED_AT else {}
    problem = problem_of_task(recipe.task.name)
    student = problem.named_student(
        section.name, {**section.options, **options}, num_classes=classes
    )
    teacher = problem.build_teacher(offline(teaches.teacher), classes)
    batch = batch_of(recipe.data, classes)
    layers = layers_among([term.teacher for term in terms], task)
    with torch.no_grad(), LiveTeacher(teacher, task, layers, posterior=False) as live:
        runs = recipe.soft_targets.kind == "live"
        source = live if runs else Kept(live, recipe.soft_targets)
        model, terms = adapt_student(student, terms, recipe.adapters, source, task, batch)
        output, features = model.eval()(*task.inputs(batch))
        known = source(batch, task.rows(batch))
    every = {**output, **features}
    losses = distillation_losses(terms, every, known, task, batch, task.masks(batch))
    assert losses.keys() == {term.label for term in recipe.all_losses}
    assert all(loss.value.isfinite() for loss in losses.values())


@pytest.mark.parametrize(("name", "data"), pairs("transfer"))
def test_every_transfer_recipe_builds(name: str, data: str, tmp_path: Path) -> None:
    path = find_config("transfer", name)
    recipe = load_recipe(TransferRecipe, path, data=data, settings=[f"teacher.run={tmp_path}"])
    teacher = load_recipe(TeacherRecipe, find_config("teacher", recipe.teacher.name), data=data)
    (tmp_path / "config.yaml").write_text(to_yaml(teacher))
    classes = CLASSES.get(data, COCO)
    task = PROBLEM.task(recipe.task, recipe.data, classes)
    rows = list(starts(recipe))
    assert len(rows) == 2 * len(recipe.starts)
    for row in rows:
        model = PROBLEM.build_student(offline(row.recipe.student), classes, context=False)
        check_one_batch(task, model, recipe.task.weights, recipe.data, classes)
        check_training(
            train_section(row.recipe.train, Variant("no_context", context_head=False)),
            recipe.data,
            model,
        )


@pytest.mark.parametrize("kind", ["teacher", "distill", "transfer"])
def test_every_recipe_tells_editors_its_schema(kind: str) -> None:
    for name in known_configs(kind):
        path = find_config(kind, name)
        first = path.read_text().splitlines()[0]
        word, _, target = first.partition("$schema=")
        assert word == "# yaml-language-server: ", path
        assert (path.parent / target).resolve() == CONFIGS / "schema" / f"{kind}.json"


def test_there_is_nothing_else_in_configs() -> None:
    known = {"data", "distill", "schema", "task", "teacher", "transfer"}
    assert {path.name for path in CONFIGS.iterdir()} <= known
    for path in Path(CONFIGS).rglob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)
