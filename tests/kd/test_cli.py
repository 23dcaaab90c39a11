"""Flags that all commands share, and how mistakes end."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kd.cli import read_recipe, recipe_parser, run_command, set_up_logging
from kd.config.recipes import DistillRecipe, TeacherRecipe
from kd.errors import ConfigError, UserError
from kd.problems.recipes import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def teacher(argv: Sequence[str] | None = None) -> int:
    args = recipe_parser("prog", "teacher", "about").parse_args(argv)
    read_recipe(args, TeacherRecipe, "teacher")
    return 0


@pytest.fixture
def loggers() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("kd")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def test_a_users_mistake_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: Sequence[str] | None) -> int:
        raise UserError("x.json: cut off")

    assert run_command(fail, []) == 2
    assert capsys.readouterr().err == "error: x.json: cut off\n"


def test_several_mistakes_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: Sequence[str] | None) -> int:
        raise ConfigError("a: 1\nb: 2")

    assert run_command(fail, []) == 2
    assert capsys.readouterr().err == "error: a: 1\nerror: b: 2\n"


def test_our_own_mistakes_keep_their_traceback() -> None:
    def fail(argv: Sequence[str] | None) -> int:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_command(fail, [])


def test_an_interrupted_command_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: Sequence[str] | None) -> int:
        raise KeyboardInterrupt

    assert run_command(interrupted, []) == 130
    assert (
        capsys.readouterr().err == "interrupted; run it again to continue, training with --resume\n"
    )


def test_the_status_of_a_command_is_passed_on() -> None:
    assert run_command(lambda argv: 7, []) == 7


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = (
        "from kd.cli import run_command\n"
        "def main(argv):\n"
        "    while True: print('line', flush=True)\n"
        "raise SystemExit(run_command(main, []))\n"
    )
    command = f'set -o pipefail; {sys.executable} -c "{code}" | head -1'
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (141, "line\n", "")


@pytest.mark.parametrize(
    "argv", [[], ["--teacher", "cnn", "--config", "x.yaml"], ["--teacher", "cnn", "--epochs", "3"]]
)
def test_wrong_flags_end_with_usage_and_status_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(teacher, argv)
    assert ended.value.code == 2
    assert "usage: prog" in capsys.readouterr().err


def test_print_config_prints_a_recipe_that_reads_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["--teacher", "unet", "--data", "coco", "--set", "train.epochs=3", "--print-config"]
    assert run_command(teacher, argv) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    recipe = load_recipe(TeacherRecipe, printed)
    assert (recipe.train.epochs, recipe.data.name, recipe.teacher.options["width"]) == (
        3,
        "coco",
        64,
    )
    assert run_command(teacher, ["--config", str(printed), "--print-config"]) == 0
    assert capsys.readouterr().out == printed.read_text()


def test_schema_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(teacher, ["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    assert {"data", "per_data", "teacher", "train"} <= schema["properties"].keys()


def test_a_commands_own_settings_come_last() -> None:
    args = recipe_parser("prog", "distill", "about").parse_args(
        ["--student", "resnet18", "--set", "teacher.run=a"]
    )
    recipe = read_recipe(args, DistillRecipe, "distill", ["teacher.run=b"])
    assert recipe is not None
    assert recipe.teacher.run == "b"


def test_mistakes_in_settings_are_lines_too(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--teacher", "cnn", "--set", "train.epochs=true", "--set", "train.epohcs=3"]
    assert run_command(teacher, argv) == 2
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "error: --set train.epochs=true: train.epochs: input should be a valid integer, got True",
        "error: --set train.epohcs=3: train.epohcs: unknown key; did you mean 'epochs'?",
    ]


def test_what_was_said_is_not_said_again(loggers: None, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger().handlers.clear()
    set_up_logging()
    for name in ("train.json", "val.json", "train.json"):
        logging.getLogger("kd.data").info("%s: 3 images", name)
        logging.getLogger("kd.data").warning("beware")
    said = capsys.readouterr().err.splitlines()
    assert said == ["train.json: 3 images", "beware", "val.json: 3 images", "beware", "beware"]


@pytest.mark.parametrize(
    ("rank", "verbose", "level"),
    [(0, False, logging.INFO), (0, True, logging.DEBUG), (1, True, logging.ERROR)],
)
def test_other_ranks_stay_silent(loggers: None, rank: int, verbose: bool, level: int) -> None:
    set_up_logging(verbose=verbose, rank=rank)
    assert logging.getLogger("kd").level == level
