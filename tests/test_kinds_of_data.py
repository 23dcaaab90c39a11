"""Outside of kd/problems no code asks what kind of data it has, read from the syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from kd.problems import PROBLEMS

ROOT = Path(__file__).resolve().parent.parent
PROBLEM_FOLDERS = sorted(
    path.name for path in (ROOT / "kd" / "problems").iterdir() if (path / "__init__.py").is_file()
)
# Keys that only batches of some problems have, and arrays that only some predictions.npz hold.
BATCH_KEYS = {"hidden", "boxes", "labels", "label_maps", "fixations", "image_of", "labelled"}
ARRAYS = {"log_probs", "confusion", "found_boxes", "fixation_counts", "object_ids"}


def names_of_kinds() -> set[str]:
    """Names of problems and of their tasks."""
    specs = [entry.load() for entry in PROBLEMS.values()]
    return {*PROBLEMS, *(task for spec in specs for task in spec.tasks)}


def classes_of_problems(root: Path) -> set[str]:
    """Classes that are defined in the folder of a problem."""
    return {
        node.name
        for folder in PROBLEM_FOLDERS
        for path in (root / "kd" / "problems" / folder).rglob("*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef)
    }


def strings_in(node: ast.AST) -> set[str]:
    """String constants of an expression."""
    return {
        one.value
        for one in ast.walk(node)
        if isinstance(one, ast.Constant) and isinstance(one.value, str)
    }


def names_in(node: ast.AST) -> set[str]:
    """Identifiers of an expression."""
    found = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
    return found | {one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)}


def questions(tree: ast.AST, kinds: set[str], classes: set[str]) -> Iterator[tuple[int, str]]:
    """Line and description of each place that asks what kind of data there is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            base = getattr(node, "module", None) or ""
            modules = [f"{base}.{one.name}" if base else one.name for one in node.names]
            for module in modules:
                parts = module.split(".")
                if parts[:2] == ["kd", "problems"] and parts[2:3] and parts[2] in PROBLEM_FOLDERS:
                    yield node.lineno, f"imports {module}"
        elif isinstance(node, ast.Compare):
            told = strings_in(node)
            if asked := told & kinds:
                yield node.lineno, f"compares with {sorted(asked)}"
            if any(isinstance(one, ast.In | ast.NotIn) for one in node.ops):
                first = strings_in(node.left)
                if first & BATCH_KEYS or first & ARRAYS:
                    yield node.lineno, f"looks for key {sorted(first)}"
        elif isinstance(node, ast.MatchValue) and strings_in(node) & kinds:
            yield node.value.lineno, f"matches {sorted(strings_in(node))}"
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
            and len(node.args) == 2
            and (named := names_in(node.args[1]) & classes)
        ):
            yield node.lineno, f"isinstance of {sorted(named)}"


def test_no_code_outside_of_the_problems_asks_what_kind_of_data_it_has() -> None:
    kinds, classes = names_of_kinds(), classes_of_problems(ROOT)
    found = [
        f"{path.relative_to(ROOT)}:{line} {what}"
        for package in ("kd", "teachers", "students")
        for path in sorted((ROOT / package).rglob("*.py"))
        if "problems" not in path.relative_to(ROOT).parts
        for line, what in questions(ast.parse(path.read_text("utf-8")), kinds, classes)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("from kd.problems.detection.task import Detection", "imports kd.problems.detection"),
        ("import kd.problems.saliency.data", "imports kd.problems.saliency"),
        ("recipe.task.name == 'detection'", "compares with ['detection']"),
        ("section.name in ('segmentation', 'saliency')", "compares with"),
        ("match name:\n    case 'context':\n        pass", "matches ['context']"),
        ("'hidden' in batch", "looks for key ['hidden']"),
        ("'log_probs' not in records", "looks for key ['log_probs']"),
        ("isinstance(data, base.Special)", "isinstance of ['Special']"),
    ],
)
def test_a_question_is_found(source: str, told: str) -> None:
    kinds = {"detection", "segmentation", "context"}
    found = list(questions(ast.parse(source), kinds, {"Special"}))
    assert len(found) == 1
    assert told in found[0][1]


def test_what_is_no_question_is_passed_over() -> None:
    source = "name == 'adam'\nisinstance(x, int)\nfrom kd.problems.base import Task\n'a' in batch"
    assert list(questions(ast.parse(source), {"detection"}, {"Special"})) == []
