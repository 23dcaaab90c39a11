"""Names and options that users type."""

from __future__ import annotations

from functools import partial
from typing import Literal

import pytest

from kd.errors import ConfigError, UserError
from kd.registry import build, check_options, look_up, nearest


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


def test_an_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown teacher 'unett'; did you mean 'unet'\?"):
        look_up({"unet": 1, "cnn": 2}, "unett", what="teacher")


def test_an_unknown_name_with_nothing_near_lists_what_is_known() -> None:
    with pytest.raises(UserError, match="unknown teacher 'zzz'; known: cnn, unet"):
        look_up({"unet": 1, "cnn": 2}, "zzz", what="teacher")


def test_a_long_catalogue_is_not_listed_whole() -> None:
    catalog = {f"model{number:02d}": number for number in range(40)}
    with pytest.raises(UserError, match="and 28 more"):
        look_up(catalog, "zzz", what="student")


def test_nearest_overlooks_capitals_and_puts_the_best_first() -> None:
    assert nearest("RESNET18", ["resnet34", "resnet18", "vgg11"])[0] == "resnet18"


def test_good_options_pass_and_a_list_fits_a_tuple() -> None:
    options = {"width": 8, "rate": 1, "kind": "average", "deep": True, "margins": [1, 2.5]}
    check_options(example, options | {"path": None}, what="model 'example'")


def test_all_mistakes_come_at_once_with_the_nearest_keyword() -> None:
    options = {"widht": 3, "rate": "fast", "kind": "min", "deep": 1, "margins": [1.0]}
    with pytest.raises(ConfigError) as caught:
        check_options(example, options, what="model 'example'")
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert lines[0] == "model 'example': unknown option 'widht'; did you mean 'width'?"
    assert lines[1] == "model 'example': option 'rate' must be float, got 'fast' (str)"
    assert "one of 'max', 'average'" in lines[2]
    assert "must be bool, got 1 (int)" in lines[3]
    assert "a list of float, float" in lines[4]


def test_true_is_not_an_integer() -> None:
    with pytest.raises(ConfigError, match="'width' must be int, got True"):
        check_options(example, {"width": True}, what="x")


def test_a_positional_parameter_is_not_an_option() -> None:
    with pytest.raises(ConfigError, match="unknown option 'size'"):
        check_options(example, {"size": 3}, what="x")


def test_missing_options_are_mistakes_unless_the_program_gives_them() -> None:
    with pytest.raises(ConfigError, match="option 'prior' is missing"):
        check_options(needs, {}, what="x", given=["classes"])
    with pytest.raises(ConfigError, match="unknown option 'classes'"):
        check_options(needs, {"classes": 2, "prior": 0.5}, what="x", given=["classes"])


def test_partials_and_classes_have_options_too() -> None:
    check_options(partial(example, 3), {"width": 2}, what="x")
    with pytest.raises(ConfigError, match="must be int"):
        check_options(partial(example, 3), {"width": "2"}, what="x")
    with pytest.raises(ConfigError, match="must be int"):
        check_options(Layer, {"width": 1.5}, what="x")


def test_build_calls_the_builder_with_what_is_given_and_what_is_chosen() -> None:
    built = build({"example": example}, "example", {"width": 9}, what="model", size=2)
    assert built["size"] == 2 and built["width"] == 9


def test_build_names_the_entry_in_its_message() -> None:
    with pytest.raises(ConfigError, match="model 'example': unknown option 'deeep'"):
        build({"example": example}, "example", {"deeep": True}, what="model", size=2)
