"""Names and options that users type."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from kd.errors import ConfigError, UserError
from kd.registry import (
    Entry,
    build,
    check_options,
    check_problem,
    find,
    load_target,
    look_up,
    nearest,
    resolve,
)


def example(
    size: int,
    *,
    width: int = 4,
    rate: float = 0.1,
    kind: Literal["max", "average"] = "max",
    deep: bool = False,
    margins: tuple[float, float] = (0.5, 1.5),
    path: str | None = None,
) -> dict[str, object]:
    return {"size": size, "width": width, "rate": rate, "kind": kind, "deep": deep, "path": path}


def needs(*, classes: int, prior: float) -> tuple[int, float]:
    return classes, prior


class Layer:
    def __init__(self, *, width: int = 1) -> None:
        self.width = width


def test_a_known_name_gives_its_entry() -> None:
    assert look_up({"unet": 1, "cnn": 2}, "cnn", what="teacher") == 2


def test_an_unknown_name_lists_the_nearest_and_then_the_others() -> None:
    with pytest.raises(UserError) as caught:
        look_up({"unet": 1, "cnn": 2, "prior": 3}, "unett", what="teacher")
    message = "unknown teacher 'unett'; did you mean 'unet'? The others are cnn, prior"
    assert str(caught.value) == message


def test_an_unknown_name_with_nothing_near_lists_what_is_known() -> None:
    with pytest.raises(UserError, match="unknown teacher 'zzz'; known: cnn, unet"):
        look_up({"unet": 1, "cnn": 2}, "zzz", what="teacher")


@pytest.mark.parametrize("name", ["zzz", "model1"])
def test_every_name_of_a_long_registry_is_listed(name: str) -> None:
    catalog = {f"model{number:02d}": number for number in range(60)}
    with pytest.raises(UserError) as caught:
        look_up(catalog, name, what="student")
    assert all(known in str(caught.value) for known in catalog)


def test_nearest_overlooks_capitals_and_puts_the_best_first() -> None:
    assert nearest("RESNET18", ["resnet34", "resnet18", "vgg11"])[0] == "resnet18"


def test_good_options_pass_and_a_list_fits_a_tuple() -> None:
    options = {"width": 8, "rate": 1, "kind": "average", "deep": True, "margins": [1, 2.5]}
    check_options(example, options | {"path": None}, what="model 'example'")
    built = build({"example": example}, "example", options, what="model", size=3)
    assert built == {
        "size": 3,
        "width": 8,
        "rate": 1,
        "kind": "average",
        "deep": True,
        "path": None,
    }


def test_all_mistakes_come_at_once_with_the_nearest_keyword() -> None:
    options = {"widht": 3, "rate": "fast", "kind": "min", "deep": 1, "margins": [1.0]}
    with pytest.raises(ConfigError) as caught:
        check_options(example, options, what="model 'example'")
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert lines[0] == "model 'example': unknown option 'widht'; did you mean 'width'?"
    assert lines[1] == "model 'example': option 'rate' must be a valid number, got 'fast' (str)"
    assert "must be 'max' or 'average'" in lines[2]
    assert "must be a valid boolean, got 1 (int)" in lines[3]
    assert "must have more items, got [1.0] (list)" in lines[4]


def test_true_is_not_an_integer() -> None:
    with pytest.raises(ConfigError, match="'width' must be a valid integer, got True"):
        check_options(example, {"width": True}, what="x")


def test_a_positional_parameter_is_not_an_option() -> None:
    with pytest.raises(ConfigError, match="'size': options are keyword-only"):
        check_options(example, {"size": 3}, what="x")


def test_missing_options_are_mistakes_unless_the_program_gives_them() -> None:
    with pytest.raises(ConfigError, match="option 'prior' is missing"):
        check_options(needs, {}, what="x", given=["classes"])
    with pytest.raises(ConfigError, match="unknown option 'classes'"):
        check_options(needs, {"classes": 2, "prior": 0.5}, what="x", given=["classes"])


def test_partials_and_classes_have_options_too() -> None:
    check_options(partial(example, 3), {"width": 2}, what="x")
    with pytest.raises(ConfigError, match="must be a valid integer"):
        check_options(partial(example, 3), {"width": "2"}, what="x")
    with pytest.raises(ConfigError, match="must be a valid integer"):
        check_options(Layer, {"width": 1.5}, what="x")


def test_build_calls_the_builder_with_what_is_given_and_what_is_chosen() -> None:
    built = build({"example": example}, "example", {"width": 9}, what="model", size=2)
    assert built["size"] == 2 and built["width"] == 9


def test_build_names_the_entry_in_its_message() -> None:
    with pytest.raises(ConfigError, match="model 'example': unknown option 'deeep'"):
        build({"example": example}, "example", {"deeep": True}, what="model", size=2)


REGISTRY = {
    "example": Entry(f"{__name__}:example", "a function", "objects", options={"width": 8}),
    "layer": Entry(f"{__name__}:Layer", "a class", "detection"),
    "timm/NAME": Entry(f"{__name__}:example", "a family", args=("timm/NAME",)),
}


def test_an_entry_is_imported_with_what_its_name_stands_for() -> None:
    built = build(REGISTRY, "example", {"rate": 0.5}, what="model", size=2)
    assert built == example(2, width=8, rate=0.5)
    assert build(REGISTRY, "example", {"width": 9}, what="model", size=2)["width"] == 9


def test_a_builder_gets_those_given_arguments_that_it_has_a_parameter_for() -> None:
    assert build(REGISTRY, "layer", {}, what="model", size=2, prior=[1.0]).width == 1


def test_a_member_of_a_family_is_built_with_its_own_name() -> None:
    assert build(REGISTRY, "timm/resnet18", {}, what="model")["size"] == "timm/resnet18"
    for name in ("timm/", "timm", "torchvision/resnet18"):
        with pytest.raises(UserError, match=f"unknown model '{name}'"):
            find(REGISTRY, name, what="model")


def test_a_users_own_builder_is_named_by_its_module_and_attribute() -> None:
    assert resolve({}, f"{__name__}:example", what="model") is example
    assert build({}, f"{__name__}:Layer", {"width": 3}, what="model").width == 3


def test_a_foreign_name_is_found_without_importing_it() -> None:
    assert find({}, "no.such.module:thing", what="model") == Entry("no.such.module:thing", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:thing", "model 'no_such_module:thing': no module 'no_such_module'"),
        ("kd.nowhere:thing", "no module 'kd.nowhere'"),
        ("kd.errors:UserErr", r"kd.errors has no 'UserErr'; did you mean 'UserError'\?"),
        ("kd:__version__", "expected a builder or a class"),
    ],
)
def test_what_is_wrong_with_a_foreign_name_is_said(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build({}, name, {}, what="model")


def test_a_mistake_inside_of_the_users_module_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("import not_installed_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        load_target("broken_module:thing")


def test_a_name_of_another_kind_of_problem_is_refused_with_those_that_fit() -> None:
    check_problem(REGISTRY, "example", "objects", what="student")
    check_problem(REGISTRY, "timm/resnet18", "detection", what="student")
    with pytest.raises(
        UserError, match="'layer' is for detection, not objects; students for objects: example"
    ):
        check_problem(REGISTRY, "layer", "objects", what="student")
