"""Imports point down the list of rooms; docs/architecture.md says why."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kd", "teachers", "students")

# From the top floor to the ground. Rooms on one line may not import each other.
ROOMS = """
commands
evaluation
deploy experiments
context
teacher_cache
runs
engine
distillation
problems
data
scenes
teachers students
formats
nn
storage
report
interop
transforms
metrics losses
config
utils
registry
errors version
"""
FLOORS = [line.split() for line in ROOMS.split("\n") if line]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

MODELS_MAY_IMPORT = {"kd.nn", "kd.errors", "kd.registry", "torch", "torchvision", "timm"}
# Answered before torch is imported.
WITHOUT_TORCH = ("config", "registry", "errors")
HEAVY = ("torch", "torchvision", "accelerate", "torchdistill", "timm")


class Import(NamedTuple):
    """One import: the module that has it, its line, and the full dotted name imported."""

    importer: str
    line: int
    name: str


def room_of(module: str) -> str:
    """The room of a module; what lies at the root of kd is a command, but for a few."""
    top, _, rest = module.partition(".")
    if top != "kd":
        return top
    first = rest.partition(".")[0]
    return first if first in FLOOR else "commands"


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the three packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """Every import of a file, at any depth; `from a import b` is `a.b` where that is a module."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + (path.name == "__init__.py")]
                base = ".".join([*kept, base] if base else kept)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield Import(module, node.lineno, whole if whole in known else base)


def all_imports(root: Path) -> list[Import]:
    """Every import of the three packages below `root`."""
    known = modules(root)
    return [found for name, path in known.items() for found in imports_of(name, path, known)]


def mistake_in(found: Import) -> str | None:
    """What is wrong with one import, or None."""
    here, top = room_of(found.importer), found.name.partition(".")[0]
    where = f"{found.importer}:{found.line} imports {found.name}"
    if here in WITHOUT_TORCH and top in HEAVY:
        return f"{where}: {here} does without {top}"
    models = here in ("teachers", "students")
    if models and top not in (here, *sys.stdlib_module_names):
        short = ".".join(found.name.split(".")[:2]) if top == "kd" else top
        if short not in MODELS_MAY_IMPORT:
            return f"{where}: {here} may import only {', '.join(sorted(MODELS_MAY_IMPORT))}"
    if top not in PACKAGES:
        return f"{where}: packages do not import {top}" if top in ("tests", "benchmarks") else None
    there = room_of(found.name)
    if here == there:
        return None
    if FLOOR[there] <= FLOOR[here]:
        return f"{where}: up, from {here} to {there}"
    return None


def circle_among(imports: list[Import]) -> list[str]:
    """A circle of files that import each other: its modules, the first again at the end."""
    edges: dict[str, set[str]] = {}
    for found in imports:
        if found.name.partition(".")[0] in PACKAGES and found.name != found.importer:
            edges.setdefault(found.importer, set()).add(found.name)
    finished: set[str] = set()

    def walk(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in finished:
            return []
        for following in sorted(edges.get(node, ())):
            if circle := walk(following, [*trail, node]):
                return circle
        finished.add(node)
        return []

    return next((circle for start in sorted(edges) if (circle := walk(start, []))), [])


def test_every_import_points_down() -> None:
    assert [text for found in all_imports(ROOT) if (text := mistake_in(found))] == []


def test_every_room_has_a_floor() -> None:
    rooms = {path.name for path in (ROOT / "kd").iterdir() if (path / "__init__.py").is_file()}
    assert rooms - set(FLOOR) == set()


def test_files_do_not_import_each_other_in_a_circle() -> None:
    assert circle_among(all_imports(ROOT)) == []


def plant(root: Path, **files: str) -> Path:
    """Write a small source tree; `kd__data__coco="..."` is kd/data/coco.py."""
    for package in PACKAGES:
        (root / package).mkdir(exist_ok=True)
    for name, text in files.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("importer", "source", "told"),
    [
        ("kd__losses__logits", "def late():\n    from kd.engine.loop import fit\n",
         "kd.losses.logits:2 imports kd.engine.loop: up, from losses to engine"),
        ("kd__data__hide", "from ..engine import loop\n", "up, from data to engine"),
        ("kd__nn__x", "import typing\nif typing.TYPE_CHECKING:\n    import kd.distill\n",
         "up, from nn to commands"),
        ("teachers__cnn", "import numpy\n", "teachers may import only"),
        ("students__net", "from teachers import cnn\n", "students may import only"),
        ("kd__config__recipes", "import torch\n", "config does without torch"),
        ("kd__nn__y", "import tests\n", "packages do not import tests"),
    ],
)  # fmt: skip
def test_an_import_that_is_wrong_is_told(
    importer: str, source: str, told: str, tmp_path: Path
) -> None:
    root = plant(tmp_path, kd__engine__loop="", kd__distill="", **{importer: source})
    found = [text for one in all_imports(root) if (text := mistake_in(one))]
    assert len(found) == 1
    assert told in found[0]


def test_a_circle_is_found(tmp_path: Path) -> None:
    root = plant(tmp_path, kd__nn__a="from kd.nn import b\n", kd__nn__b="import kd.nn.a\n")
    assert circle_among(all_imports(root)) == ["kd.nn.a", "kd.nn.b", "kd.nn.a"]
