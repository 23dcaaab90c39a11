"""Settings of stored outputs where none are stored, or none are measured."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from kd.config.reader import find_config, known_configs, read_yaml
from kd.config.recipes import DistillRecipe, TermSection
from kd.distillation.terms import build_term
from kd.errors import UserError
from kd.experiments.validate import check_terms
from kd.problems.base import Dataset
from kd.problems.recipes import load_recipe
from kd.runs.build import open_data


@pytest.fixture(scope="module")
def maps(small_scenes: Path) -> Dataset:
    """Label maps of the small scenes."""
    settings = [
        f"data.root={small_scenes}",
        "data.generate={train: 24, val: 8, size: 64, seed: 0}",
    ]
    recipe = load_recipe(DistillRecipe, find_config("distill", "espnet"), settings=settings)
    return open_data(recipe.data)


def check(recipe: DistillRecipe, sections: Sequence[TermSection], data: Dataset) -> None:
    task = data.problem.task(recipe.task, data.section, data.num_classes)
    check_terms(recipe, (), [build_term(section) for section in sections], task, data)


def warned(
    caplog: pytest.LogCaptureFixture, data: Dataset, name: str, on: str | None, *settings: str
) -> list[str]:
    """What a shipped recipe's checks warn of on a dataset."""
    recipe = load_recipe(DistillRecipe, find_config("distill", name), data=on, settings=settings)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="kd"):
        check(recipe, recipe.all_losses, data)
    return [record.getMessage() for record in caplog.records]


def test_settings_of_stored_maps_are_named_where_the_teacher_is_live(
    maps: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    assert warned(caplog, maps, "espnet", "camvid") == []
    (line,) = warned(caplog, maps, "espnet", "camvid", "soft_targets.kind=live")
    assert line.startswith("soft_targets.score_stride, soft_targets.size: for stored outputs")
    assert "a live teacher sees the student's own images" in line


def test_one_stored_teacher_is_enough_for_them(
    maps: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    more = [
        "soft_targets={kind: live, stride: 16}",
        "more_teachers={other: {run: RUN, kind: stored}}",
        "ablations={}",
        "more_losses=[]",
    ]
    losses = "losses=[{name: pixel_wise, weight: 1.0}, {name: channel_wise, weight: 1.0, teacher: "
    assert warned(caplog, maps, "espnet", None, *more, f"{losses}other.logits}}]") == []
    (line,) = warned(caplog, maps, "espnet", None, *more, f"{losses}logits}}]")
    assert line.startswith("soft_targets.stride: for stored outputs")


SEGMENTATION = [
    name
    for name in known_configs("distill")
    if read_yaml(find_config("distill", name))["task"]["name"] == "segmentation"
]


@pytest.mark.parametrize("name", SEGMENTATION)
def test_no_shipped_recipe_says_what_has_no_effect(
    maps: Dataset, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    for on in (None, *read_yaml(find_config("distill", name))["per_data"]):
        assert warned(caplog, maps, name, on) == []


def test_an_error_that_is_not_measured_on_label_maps_is_refused(maps: Dataset) -> None:
    path = find_config("distill", "espnet")
    for kind in ("stored", "live"):
        settings = ["soft_targets.equivariance_error=0.02", f"soft_targets.kind={kind}"]
        recipe = load_recipe(DistillRecipe, path, settings=settings)
        with pytest.raises(
            UserError, match=r"equivariance_error: .* cached maps of scenes_maps .*mirrored=true"
        ):
            check(recipe, recipe.losses, maps)
