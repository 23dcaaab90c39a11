"""Rules of the project that no tool checks: sizes, words, files that must be there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
# `make test` hands its own flags and variables down, which these runs of make must not see.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
PACKAGES = ("kd", "teachers", "students")

FILE_LINES = 600
FUNCTION_LINES = 60
COMMAND_LINES = 100
COMMANDS = ("train_teacher", "distill", "transfer", "evaluate", "compare", "cache", "imagine")

# path -> why the file is longer; "path::function" -> why the function is.
LONGER: dict[str, str] = {
    "students/classifiers.py::build_student": "a parameter and a line of words for each option",
    "teachers/scene_transformer.py::scene_transformer": "a parameter and its words for each option",
}

# What a command is asked to show is printed; everything else is logged.
MAY_PRINT = {f"kd/{name}.py" for name in (*COMMANDS, "demo", "cli")}
MAY_PRINT |= {f"kd/data/{name}.py" for name in ("scenes", "download", "prepare")}

# Put together here so that this file does not hold the words it looks for.
UNFINISHED = re.compile(
    r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX"]) + r")\b(?!\(#\d+\))"
)
TEXT = {".py", ".md", ".yaml", ".toml"}

DOCUMENT_COLUMNS = 120
URL = re.compile(r"https?://[^\s)>|]+")


def python_files(*folders: str) -> list[Path]:
    """The Python files of some folders of the project."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """A path as it is written from the project's root."""
    return path.relative_to(ROOT).as_posix()


def lines_of(path: Path) -> int:
    """The number of lines of a file."""
    return len(path.read_text("utf-8").splitlines())


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    """Each function of a file, at any depth: "path::name" and its lines from `def` to its end."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name_of(path)}::{node.name}", (node.end_lineno or 0) - node.lineno + 1


def too_long() -> dict[str, int]:
    """What exceeds its length outside the tests, by name."""
    files = [*python_files(*PACKAGES, "benchmarks"), ROOT / "setup.py"]
    found = {name_of(path): lines_of(path) for path in files if lines_of(path) > FILE_LINES}
    for path in files:
        found |= {name: lines for name, lines in functions_of(path) if lines > FUNCTION_LINES}
    return found


def test_files_and_functions_are_short_unless_defended() -> None:
    assert {name: lines for name, lines in too_long().items() if name not in LONGER} == {}


def test_every_defence_of_a_long_file_is_still_needed() -> None:
    assert set(LONGER) - set(too_long()) == set()


def test_commands_stay_under_a_hundred_lines() -> None:
    paths = [ROOT / "kd" / f"{name}.py" for name in COMMANDS]
    lengths = {name_of(path): lines_of(path) for path in paths if path.is_file()}
    assert {name: n for name, n in lengths.items() if n >= COMMAND_LINES} == {}


def test_only_commands_print() -> None:
    offenders = [
        f"{name_of(path)}:{node.lineno}"
        for path in python_files(*PACKAGES)
        if name_of(path) not in MAY_PRINT
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert offenders == []


def test_nothing_is_left_for_later_without_an_issue() -> None:
    folders = (*PACKAGES, "tests", "benchmarks", "configs", "docs", ".ci")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    paths += [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile"]
    offenders = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in paths
        if path.suffix in TEXT or path.name in {"Makefile", "run"}
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if UNFINISHED.search(line)
    ]
    assert offenders == []


def test_no_line_of_a_document_is_too_long() -> None:
    paths = [*ROOT.glob("*.md"), ROOT / "CITATION.cff", *(ROOT / "docs").rglob("*.md")]
    offenders = [
        f"{name_of(path)}:{number}: {len(line)}"
        for path in sorted(paths)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if len(URL.sub("", line)) > DOCUMENT_COLUMNS
    ]
    assert offenders == []


def test_the_citation_names_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])


def test_every_module_says_what_it_is_for() -> None:
    def words(path: Path) -> int:
        return len((ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split())

    files = [*python_files(*PACKAGES, "benchmarks"), *python_files("tests")]
    assert [name_of(path) for path in files if words(path) < 3] == []


def test_the_version_is_the_same_everywhere() -> None:
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    version = metadata["project"]["version"]
    assert f'__version__ = "{version}"' in (ROOT / "kd" / "version.py").read_text("utf-8")
    assert f"## {version} " in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=name_of)
def test_a_config_is_a_yaml_mapping(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text("utf-8")), dict)


def test_configs_have_one_suffix() -> None:
    files = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    assert [name_of(path) for path in files if path.suffix not in {".yaml", ".json", ".md"}] == []


def test_hooks_fetch_nothing() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert {repo["repo"] for repo in hooks["repos"]} == {"local"}
    assert {hook["language"] for repo in hooks["repos"] for hook in repo["hooks"]} == {"system"}


def test_ci_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_make_without_a_target_lists_the_targets() -> None:
    shown = subprocess.run(
        ["make"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    listed = {line.split()[0] for line in shown.stdout.splitlines() if line.startswith("  ")}
    targets = "help install demo test test-versions lint types bench clean"
    assert listed == set(targets.split())
    assert shown.stderr == ""


def test_make_refuses_an_old_python_in_words(tmp_path: Path) -> None:
    old = tmp_path / "python2"
    old.write_text('#!/bin/sh\necho "kd needs Python 3.11 or newer" >&2\nexit 1\n')
    old.chmod(0o755)
    for python, message in (
        (str(old), "needs Python 3.11"),
        ("no-such-python", "no 'no-such-python'"),
    ):
        made = subprocess.run(
            ["make", "install", f"PYTHON={python}", f"VENV={tmp_path / 'env'}"],
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert made.returncode != 0
        assert message in made.stderr
        assert not (tmp_path / "env").exists()
