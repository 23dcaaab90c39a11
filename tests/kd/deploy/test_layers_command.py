"""kd.layers lists the paths that recipes can name, with the shapes that taps collect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kd import layers
from kd.config.reader import find_config
from kd.config.recipes import DistillRecipe
from kd.data.loader import collate
from kd.deploy.layers import layers_of, open_model
from kd.deploy.model import grey_sample
from kd.distillation.hooks import FeatureTaps
from kd.distillation.registry import term_kind
from kd.errors import UserError
from kd.problems.recipes import load_recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["espnet", "fasterrcnn_resnet18", "saliency_resnet18", "mobilenet_v2", "espnet_c"]
)
def test_every_layer_of_a_recipe_is_listed(name: str) -> None:
    title, model = open_model(name)
    assert title == f"student of configs/distill/{name}.yaml"
    found, outputs = layers_of(model)
    listed = {one.path for one in (*found, *outputs)}
    recipe = load_recipe(DistillRecipe, find_config("distill", name))
    read = {term.student or term_kind(term).student for term in recipe.all_losses} - {None}
    assert read and read <= listed | set(model.task.outputs)


@pytest.mark.slow
def test_shapes_are_those_that_taps_collect() -> None:
    _, model = open_model("centernet_resnet18")
    found, _ = layers_of(model)
    maps = [one for one in found if one.stride]
    assert {one.stride for one in maps} >= {4, 8}
    taps = FeatureTaps(model.model, [one.path for one in maps])
    with torch.no_grad():
        model.model(*model.task.inputs(collate([grey_sample(model)])))
    collected = taps.collect()
    for one in maps:
        assert tuple(collected[one.path].shape) == one.shape


class Tiny(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.head = nn.Conv2d(6, num_classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.body(images)
        logits: torch.Tensor = self.head(features)
        return logits


def test_a_module_of_the_user_s_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    command = [f"{__name__}:Tiny", "--task", "segmentation", "--data", "camvid", "--maps"]
    assert layers.main(command) == 0
    printed = capsys.readouterr().out
    assert "body" in printed and "1 x 6 x" in printed and "outputs, by name\n" in printed
    [line] = [line for line in printed.splitlines() if line.startswith("  body")]
    assert line.split()[-2:] == ["4", "168"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "no run folder, recipe or student; did you mean 'resnet18'"),
        ("collections:OrderedDict", "not a function or class that builds a model"),
        ("timm/resnet19", "resnet19"),
    ],
)
def test_a_wrong_name_is_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layers.main([name])


@pytest.mark.slow
def test_a_run_is_listed(students: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert layers.main([str(students["segmentation"]), "--depth", "1"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
