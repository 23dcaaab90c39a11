"""Detectors on half as wide trunks: a quarter of the parameters, everything else as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kd.config.reader import find_config
from kd.config.recipes import TeacherRecipe
from kd.errors import UserError
from kd.nn.networks import DETECTORS
from kd.problems.recipes import load_recipe

# The rest is small, so that the test is about the trunk.
SMALL = {"channels": 16, "hidden": 16, "region_size": 3, "sampled_anchors": 16,
         "sampled_regions": 16, "candidates": [20, 20], "proposals": [10, 10]}  # fmt: skip


def parameters(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


def body(model: nn.Module) -> Any:
    return model.get_submodule("network.backbone.body")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50", "fasterrcnn_resnet101"])
def test_half_of_a_trunk_has_a_quarter_of_its_parameters_and_finds_boxes(name: str) -> None:
    whole = DETECTORS[name].load()(num_classes=3, **SMALL)
    half = DETECTORS[name].load()(num_classes=3, width=0.5, **SMALL)
    assert 0.245 < parameters(body(half)) / parameters(body(whole)) < 0.26
    assert body(half).level_channels == tuple(c // 2 for c in body(whole).level_channels)
    assert body(half).level_strides == body(whole).level_strides == (2, 4, 8, 16, 32)
    heads = {key: tuple(one.shape) for key, one in whole.state_dict().items() if "body" not in key}
    ours = {key: tuple(one.shape) for key, one in half.state_dict().items() if "body" not in key}
    # But for what joins the trunk's levels to the pyramid.
    changed = {key for key in heads if heads[key] != ours[key]}
    joins = {f"network.backbone.fpn.inner_blocks.{level}.0.weight" for level in range(4)}
    assert heads.keys() == ours.keys() and changed == joins

    images, sizes = torch.randn(1, 3, 64, 64), torch.tensor([[64, 64]])
    boxes, labels = torch.tensor([[8.0, 8.0, 40.0, 44.0]]), torch.tensor([1])
    half.train()
    losses = half(images, sizes, boxes, labels, torch.tensor([0]))
    total = sum(losses[f"loss.{name}"] for name in half.loss_units)
    total.backward()
    first = next(body(half).parameters()).grad
    assert torch.isfinite(total) and first is not None and first.abs().sum() > 0
    found = half.eval()(images, sizes)
    assert found["detections"].shape == (1, 100, 6) and found["detections"].isfinite().all()
    assert [found[f"features.{level}"].shape[2:] for level in range(4)] == [
        (16, 16), (8, 8), (4, 4), (2, 2)]  # fmt: skip


def test_a_recipe_takes_it_and_a_file_of_the_whole_trunk_does_not_fit() -> None:
    path = find_config("teacher", "fasterrcnn_resnet50")
    changes = ["teacher.name=fasterrcnn_resnet101", "teacher.options.width=0.5"]
    model = load_recipe(TeacherRecipe, path, data="voc", settings=changes).teacher
    assert (model.name, model.options["width"]) == ("fasterrcnn_resnet101", 0.5)
    with pytest.raises(UserError, match=r"weights are for the full width; leave out width 0\.5"):
        DETECTORS[model.name].load()(num_classes=3, **model.options)
