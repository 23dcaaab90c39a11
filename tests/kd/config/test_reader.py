"""Reading recipes: files, datasets, variants and --set, with every mistake at its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kd.config.datasets import Split
from kd.config.reader import Merged, find_config, known_configs, read_yaml, to_yaml
from kd.config.recipes import DistillRecipe, TeacherRecipe
from kd.errors import ConfigError
from kd.problems.objects.schema import ObjectsSection
from kd.problems.recipes import data_config, load_recipe, recipe_from
from kd.problems.saliency.schema import SaliencySection
from kd.problems.segmentation.schema import SegmentationSection

RECIPE = """\
data: scenes
task: {name: context, weights: {cross_entropy: 1.0}}
teacher: {name: cnn}
train: {epochs: 3}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


def mistakes_of(path: Path, *settings: str, data: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(TeacherRecipe, path, data=data, settings=settings)
    return str(caught.value).splitlines()


def test_a_recipe_takes_its_dataset_from_configs(recipe: Callable[[str], Path]) -> None:
    read: Any = load_recipe(TeacherRecipe, recipe(RECIPE))
    assert read.data.name == "scenes"
    assert read.data.generate is not None
    assert read.train.epochs == 3


def test_data_can_be_a_name_with_changes(recipe: Callable[[str], Path]) -> None:
    text = RECIPE.replace("data: scenes", "data: {name: coco, size: 128}")
    read: Any = load_recipe(TeacherRecipe, recipe(text))
    assert (read.data.name, read.data.size, read.data.workers) == ("coco", 128, 4)


def test_changes_without_a_name_are_to_the_default_data_set(
    recipe: Callable[[str], Path],
) -> None:
    read: Any = load_recipe(
        TeacherRecipe, recipe(RECIPE.replace("data: scenes", "data: {size: 32}"))
    )
    assert (read.data.name, read.data.size) == ("scenes", 32)


def test_a_dataset_of_the_users_own_is_the_path_of_its_file(
    recipe: Callable[[str], Path], tmp_path: Path
) -> None:
    own = tmp_path / "birds.yaml"
    own.write_text("train: {annotations: t.json, images: t}\nval: {annotations: v.json, images: v}")
    read: Any = load_recipe(TeacherRecipe, recipe(RECIPE), data=str(own))
    assert read.data.name == "birds"
    assert read.data.val == Split(annotations="v.json", images="v")
    section: Any = data_config(str(own), ["data.size=64"])
    assert section.size == 64


def test_variants_lie_between_the_recipe_and_set(recipe: Callable[[str], Path]) -> None:
    text = RECIPE + "per_data: {coco: {train: {epochs: 7, batch_size: 4}, data: {size: 96}}}\n"
    path = recipe(text)
    assert load_recipe(TeacherRecipe, path).train.epochs == 3
    read: Any = load_recipe(TeacherRecipe, path, data="coco", settings=["train.batch_size=2"])
    assert (read.train.epochs, read.train.batch_size, read.data.size) == (7, 2, 96)


def test_what_a_task_starts_from_gives_way_to_the_dataset_and_the_recipe(
    recipe: Callable[[str], Path], tmp_path: Path
) -> None:
    text, own = RECIPE.replace("name: context", "name: detection"), tmp_path / "birds.yaml"
    own.write_text(
        "train: {annotations: t.json, images: t}\nval: {annotations: v.json, images: v}\n"
        "augment: {flip: 0.0}"
    )

    def read(text: str, data: str) -> tuple[tuple[float, float], dict[str, Any]]:
        section = load_recipe(TeacherRecipe, recipe(text), data=data).data
        assert isinstance(section, ObjectsSection) and section.augment is not None
        return section.scales, section.augment

    scales, augment = read(text, str(own))
    assert scales == (0.8, 1.25)
    assert (augment["flip"], augment["jitter"], augment["rotate"]) == (0, 0.5, 0)
    scales, augment = read(text, "scenes")
    assert scales == (1.0, 1.0) and augment["jitter"] == 0
    scales, augment = read(text + "per_data: {coco: {data: {scales: [1.0, 1.0]}}}\n", "coco")
    assert scales == (1.0, 1.0) and augment["jitter"] == 0.5
    assert "jitter" not in read(RECIPE, "coco")[1]  # another task


def test_a_variant_for_a_mistyped_dataset_is_a_mistake(recipe: Callable[[str], Path]) -> None:
    lines = mistakes_of(recipe(RECIPE + "per_data: {scnes: {seed: 1}, birds: {seed: 2}, coco: 3}"))
    assert [line.split("mine.yaml: ")[1] for line in lines] == [
        "per_data.scnes: unknown data; did you mean 'scenes'?",
        "per_data.coco: expected a mapping, got 3",
    ]


def test_all_mistakes_come_at_once_each_with_its_own_file(recipe: Callable[[str], Path]) -> None:
    text = RECIPE.replace("epochs: 3", "epohcs: 3, compile: 1") + (
        "per_data: {scenes: {train: {optimizer: {name: adamx}}}}\n"
    )
    path = recipe(text)
    lines = mistakes_of(path, "data.size=true", "teacher.nme=cnn", "seed=x")
    assert sorted(lines) == sorted(
        [
            f"{path}: train.epohcs: unknown key; did you mean 'epochs'?",
            f"{path}: train.compile: input should be a valid boolean, got 1",
            f"{path} (per_data.scenes): train.optimizer.name: input should be 'adamw', 'adam' or "
            "'sgd', got 'adamx'",
            "--set data.size=true: data.size: input should be a valid integer, got True",
            "--set teacher.nme=cnn: teacher.nme: unknown key; did you mean 'name'?",
            "--set seed=x: seed: input should be a valid integer, got 'x'",
        ]
    )


def test_a_mistake_in_the_data_file_names_the_data_file(
    recipe: Callable[[str], Path], tmp_path: Path
) -> None:
    own = tmp_path / "birds.yaml"
    own.write_text("train: {annotations: t.json, imags: t}\nval: {annotations: v.json, images: v}")
    lines = mistakes_of(recipe(RECIPE), data=str(own))
    assert lines == [
        f"{own}: data.train.images: missing key",
        f"{own}: data.train.imags: unknown key; did you mean 'images'?",
    ]


def test_a_missing_section_is_looked_for_in_the_recipe(recipe: Callable[[str], Path]) -> None:
    path = recipe(RECIPE.replace("teacher: {name: cnn}", "teacher: {}"))
    assert mistakes_of(path) == [f"{path}: teacher.name: missing key"]


def test_an_unknown_key_far_from_all_lists_those_there_are(recipe: Callable[[str], Path]) -> None:
    [line] = mistakes_of(recipe(RECIPE), "teacher.zzz=1")
    assert line.endswith("teacher.zzz: unknown key; known keys: name, options")


def test_keys_inside_lists_and_optional_sections_have_near_ones_too(tmp_path: Path) -> None:
    path = find_config("distill", "resnet18")
    term = "losses=[{name: context_logits, wieght: 1.0}]"
    with pytest.raises(ConfigError) as caught:
        load_recipe(DistillRecipe, path, settings=[term, "data.generate.trian=1"])
    text = str(caught.value)
    assert "losses.0.wieght: unknown key; did you mean 'weight'?" in text
    assert "losses.0.weight: missing key" in text
    assert "data.generate.trian: unknown key; did you mean 'train'?" in text


def test_a_section_that_is_no_mapping_lists_its_keys(recipe: Callable[[str], Path]) -> None:
    [line] = mistakes_of(recipe(RECIPE), "teacher=unet")
    assert line == (
        "--set teacher=unet: teacher: expected a mapping with name, options, got 'unet'"
    )


def test_a_rule_across_sections_names_the_file_of_its_section() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(DistillRecipe, find_config("distill", "resnet18"), settings=["seeds=[1, 1]"])
    assert str(caught.value) == (
        "--set seeds=[1, 1]: seeds [1, 1] must be one or more different numbers"
    )


def test_set_below_a_plain_value_is_blamed_on_set(recipe: Callable[[str], Path]) -> None:
    [line] = mistakes_of(recipe(RECIPE), "train.epochs.x=1")
    assert line.startswith("--set train.epochs.x=1: train.epochs: input should be a valid integer")


@pytest.mark.parametrize(
    "setting", ["train.epochs", "=3", "train..epochs=3", "a=[1", "a={b: 1, b: 2}"]
)
def test_a_setting_that_cannot_be_read_is_named(
    recipe: Callable[[str], Path], setting: str
) -> None:
    [line] = mistakes_of(recipe(RECIPE), setting)
    assert line.startswith(f"--set {setting}: ")


def test_several_settings_that_cannot_be_read_are_named_at_once(
    recipe: Callable[[str], Path],
) -> None:
    assert len(mistakes_of(recipe(RECIPE), "train.epochs", "a=[1")) == 2


def test_a_key_given_twice_is_refused_with_its_line(recipe: Callable[[str], Path]) -> None:
    path = recipe(RECIPE + "train: {epochs: 4}\n")
    assert mistakes_of(path) == [f"{path}: key 'train' occurs twice in the mapping at line 1"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E5", 1e5), ("-2e-4", -2e-4), (".5e1", 5.0), ("3", 3), ("e3", "e3")],
)
def test_a_number_with_an_exponent_is_a_number(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"lr: {text}\n")
    read = read_yaml(path)["lr"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not YAML"),
        ("- 1", "expected a mapping at the top"),
        ("", "expected a mapping at the top, got None"),
        ("a: !!python/object/apply:os.system ['exit 1']", "not YAML"),
        ("a: \x00", "not YAML"),
    ],
)
def test_a_file_that_is_no_mapping_of_yaml_is_named(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "x.yaml")
    (tmp_path / "y.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "y.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)


def test_an_unknown_name_lists_the_nearest_and_all_others() -> None:
    with pytest.raises(ConfigError, match=r"scens.yaml; did you mean 'scenes' or .*--data") as data:
        data_config("scens")
    assert all(name in str(data.value) for name in known_configs("data"))
    with pytest.raises(ConfigError, match=r"did you mean 'unet'.*--config PATH") as teacher:
        find_config("teacher", "une")
    assert all(name in str(teacher.value) for name in known_configs("teacher"))


def test_an_unknown_dataset_of_a_recipe_is_named(recipe: Callable[[str], Path]) -> None:
    [line] = mistakes_of(recipe(RECIPE), data="coco_min")
    assert "coco_mini" in line


@pytest.mark.parametrize("name", known_configs("teacher"))
def test_a_printed_teacher_recipe_reads_back_as_itself(name: str, tmp_path: Path) -> None:
    first = load_recipe(
        TeacherRecipe, find_config("teacher", name), settings=["train.optimizer.lr=1e-5"]
    )
    printed = tmp_path / "printed.yaml"
    printed.write_text(to_yaml(first))
    assert load_recipe(TeacherRecipe, printed) == first
    assert recipe_from(TeacherRecipe, yaml.safe_load(to_yaml(first)), "x") == first


@pytest.mark.parametrize("data", known_configs("data"))
def test_a_printed_distill_recipe_reads_back_as_itself(data: str, tmp_path: Path) -> None:
    recipe, own = {
        SegmentationSection: ("espnet_c", "data.crop=[64, 32]"),
        SaliencySection: ("saliency_resnet18", "data.size=[64, 32]"),
        ObjectsSection: ("resnet18", "data.partial={start: 0.5}"),
    }[type(data_config(data))]
    path = find_config("distill", recipe)
    settings = ["data.augment=null", "seeds=[3, 1]", own]
    first: Any = load_recipe(DistillRecipe, path, data=data, settings=settings)
    assert first.data.augment is None
    printed = tmp_path / "printed.yaml"
    printed.write_text(to_yaml(first))
    assert load_recipe(DistillRecipe, printed) == first


def test_a_resolved_config_can_be_read_with_changes() -> None:
    first = load_recipe(TeacherRecipe, find_config("teacher", "cnn"))
    plain = first.model_dump(mode="json")
    assert recipe_from(TeacherRecipe, plain, "run", ["train.epochs=2"]).train.epochs == 2
    with pytest.raises(ConfigError, match=r"^--set train.epochs=two: train.epochs: "):
        recipe_from(TeacherRecipe, plain, "run", ["train.epochs=two"])
    with pytest.raises(ConfigError, match=r"^run: train.epochs: "):
        recipe_from(TeacherRecipe, {**plain, "train": {"epochs": -1}}, "run")


def test_an_empty_mapping_replaces_what_was_there() -> None:
    merged = Merged()
    merged.merge({"options": {"width": 16}}, "first")
    merged.merge({"options": {"depth": 2}}, "second")
    assert merged.values == {"options": {"width": 16, "depth": 2}}
    assert merged.source_of(("options", "width")) == "first"
    merged.merge({"options": {}}, "third")
    assert merged.values == {"options": {}}
