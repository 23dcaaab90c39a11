"""Recipes of detectors on photographs are trained as detectors usually are."""

from __future__ import annotations

import pytest
import torch

from kd.config.reader import find_config, known_configs, read_yaml
from kd.config.recipes import DistillRecipe, TeacherRecipe
from kd.distillation.registry import ADAPTERS
from kd.problems.objects.schema import ObjectsSection
from kd.problems.recipes import load_recipe
from kd.transforms.augment import build_augment

PHOTOGRAPHS = ("coco", "voc", "voc0712", "kitti")
KINDS: dict[str, type[DistillRecipe] | type[TeacherRecipe]] = {
    "distill": DistillRecipe,
    "teacher": TeacherRecipe,
}


def detectors() -> list[tuple[str, str]]:
    """Every recipe of a detector."""
    return [
        (kind, name)
        for kind in KINDS
        for name in known_configs(kind)
        if read_yaml(find_config(kind, name))["task"]["name"] == "detection"
    ]


def data_of(kind: str, name: str, data: str) -> ObjectsSection:
    recipe: DistillRecipe | TeacherRecipe = load_recipe(
        KINDS[kind], find_config(kind, name), data=data
    )
    section = recipe.data
    assert isinstance(section, ObjectsSection)
    return section


def test_there_are_recipes_of_every_family() -> None:
    families = {name.split("_")[0] for _, name in detectors()}
    assert families == {"centernet", "fasterrcnn", "fcos", "retinanet"} and len(detectors()) == 12


@pytest.mark.parametrize(("kind", "name"), detectors())
def test_photographs_are_mirrored_scaled_and_coloured_but_not_turned(kind: str, name: str) -> None:
    for data in PHOTOGRAPHS:
        section = data_of(kind, name, data)
        augment = build_augment(section.augment)
        assert augment is not None
        assert augment.rotate == augment.shuffle == augment.shift == augment.crop == 0
        assert augment.flip == 0.5 and augment.jitter > 0
        assert section.scales == (0.8, 1.25)


@pytest.mark.parametrize(("kind", "name"), detectors())
def test_the_embedded_scenes_keep_their_colours_and_size(kind: str, name: str) -> None:
    section = data_of(kind, name, "scenes")
    augment = build_augment(section.augment)
    assert augment is not None and augment.jitter == augment.rotate == 0
    assert section.scales == (1.0, 1.0)


@pytest.mark.parametrize("name", [name for kind, name in detectors() if kind == "distill"])
def test_what_imitates_a_pyramid_s_maps_can_be_negative_as_they_are(name: str) -> None:
    recipe = load_recipe(DistillRecipe, find_config("distill", name), data="coco")
    adapters = [one for one in recipe.adapters.values() if "network.backbone" in one.to]
    assert adapters
    for one in adapters:
        adapter = ADAPTERS[one.kind].load()(8, 8, **one.options)
        assert adapter(torch.randn(1, 8, 4, 4)).min() < 0
