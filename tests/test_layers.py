"""Who may import whom, read from the syntax tree; docs/design.md, "Layers", says why.

An import points down the groups below. Inside a group, units (the rows of `PLACES`) may use each
other as long as no circle forms, except `teachers` and `students`, which keep to themselves.
Imports inside functions and under `TYPE_CHECKING` count like any other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kd", "teachers", "students")

COMMANDS = 1
FOUNDATION = 5

# unit -> group, 1 at the top. A unit is a module or a package with all that is in it.
PLACES = {
    "kd.train_teacher": COMMANDS,
    "kd.distill": COMMANDS,
    "kd.evaluate": COMMANDS,
    "kd.transfer": COMMANDS,
    "kd.compare": COMMANDS,
    "kd.cache": COMMANDS,
    "kd.rescore": COMMANDS,
    "kd.demo": COMMANDS,
    "kd.imagine": COMMANDS,
    # A command by its folder, where the issue of the data lies; no other module imports it.
    "kd.data.out_of_context": COMMANDS,
    "kd.context.pasting.make": COMMANDS,
    "kd.context.pasting.report": COMMANDS,
    "kd.runs.build": COMMANDS,
    "kd.problems.objects.baselines": COMMANDS,
    # What several commands share above the engine.
    "kd.runs.setup": COMMANDS,
    "kd.runs.train": COMMANDS,
    "kd.experiments.variants": COMMANDS,
    "kd.experiments.transfer": COMMANDS,
    "kd.runs.transfer_trunk": COMMANDS,
    "kd.experiments.teachers": COMMANDS,
    "kd.experiments.connect": COMMANDS,
    "kd.teacher_cache.cache": COMMANDS,
    "kd.teacher_cache.summary": COMMANDS,
    "kd.experiments.teacher": COMMANDS,
    "kd.problems.objects.data": COMMANDS,
    "kd.teacher_cache.teacher_view": COMMANDS,
    "kd.data.open_files": COMMANDS,
    "kd.problems.segmentation.data": COMMANDS,
    "kd.problems.detection.data": COMMANDS,
    "kd.problems.saliency.data": COMMANDS,
    "kd.experiments.validate": COMMANDS,
    "kd.teacher_cache.writer": COMMANDS,
    "kd.teacher_cache.equivariance": COMMANDS,
    "kd.runs.load_teacher": COMMANDS,
    "kd.context.query": COMMANDS,
    "kd.context.heatmap": COMMANDS,
    "kd.context.session": COMMANDS,
    "kd.runs.load_student": COMMANDS,
    "kd.problems.objects.draw": COMMANDS,
    "kd.evaluation.predict": COMMANDS,
    "kd.problems.objects.evaluation": COMMANDS,
    "kd.evaluation.write": COMMANDS,
    "kd.problems.segmentation.evaluation": COMMANDS,
    "kd.problems.saliency.evaluation": COMMANDS,
    "kd.problems.detection.evaluation": COMMANDS,
    "kd.evaluation.draw": COMMANDS,
    "kd.problems.saliency.draw": COMMANDS,
    "kd.evaluation.ask_network": COMMANDS,
    "kd.problems.detection.draw": COMMANDS,
    "kd.evaluation.cost": COMMANDS,
    "kd.report": COMMANDS,
    "kd.context.detections": COMMANDS,
    "kd.context.fit_rescore": COMMANDS,
    "kd.engine.loop": 2,
    "kd.engine.state": 2,
    "kd.engine.critic": 2,
    "kd.engine.optim": 2,
    "kd.engine.checkpoint": 2,
    "kd.engine.tracking": 2,
    "kd.engine.progress": 2,
    "kd.runs.folder": 2,
    "kd.problems": 3,
    "kd.distillation.targets": 3,
    "kd.distillation.student": 3,
    "kd.distillation.terms": 3,
    "kd.context.rescore": 3,
    "teachers": 3,
    "students": 3,
    "kd.losses": 4,
    "kd.metrics": 4,
    "kd.data": 4,
    "kd.distillation.adapters": 4,
    "kd.distillation.hooks": 4,
    "kd.nn": 4,
    "kd.interop": 4,
    # Flags and exit codes need no torch, and the commands inside kd.data share them.
    "kd.cli": FOUNDATION,
    "kd.registry": FOUNDATION,
    "kd.config.recipes": FOUNDATION,
    "kd.config.datasets": FOUNDATION,
    "kd.config.pyramid_levels": FOUNDATION,
    "kd.config.reader": FOUNDATION,
    "kd.config.json_schema": FOUNDATION,
    "kd.errors": FOUNDATION,
    "kd.utils.io": FOUNDATION,
    "kd.utils.malloc": FOUNDATION,
    "kd": FOUNDATION,  # the package's own __init__: a version, nothing else
}

MODELS = ("teachers", "students")
MODELS_MAY_IMPORT = {"kd.nn", "kd.errors", "kd.registry", "torch", "torchvision"}
HEAVY = ("torch", "torchvision", "accelerate", "torchdistill")


@dataclass(frozen=True)
class Import:
    """One import: the module that has it, its line, and the full dotted name imported."""

    importer: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.name}"


def unit_of(module: str) -> str | None:
    """The row of `PLACES` that a module belongs to, or None; `kd` stands for its __init__ alone."""
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((p for p in prefixes if p in PLACES and (p != "kd" or module == "kd")), None)


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the three packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def base_of(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """What stands before `import` in a from-import, with leading dots resolved."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, node.module] if node.module else kept)


def named_call(node: ast.Call) -> str | None:
    """The module that `import_module("x")` or `__import__("x")` loads; "?" if it is computed."""
    function = node.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if called not in {"import_module", "__import__"}:
        return None
    first = node.args[0] if node.args else None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else "?"


def imports_of(module: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """Every import of a file, at any depth; `from a import b` is `a.b` where that is a module."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = base_of(node, module, path.name == "__init__.py")
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield Import(module, node.lineno, whole if whole in known else base)
        elif isinstance(node, ast.Call) and (name := named_call(node)):
            yield Import(module, node.lineno, name)


def all_imports(root: Path) -> list[Import]:
    """Every import of the three packages below `root`."""
    known = modules(root)
    return [found for name, path in known.items() for found in imports_of(name, path, known)]


def complaint(found: Import) -> str | None:
    """What is wrong with one import, or None."""
    here, there = unit_of(found.importer), unit_of(found.name)
    top = found.name.partition(".")[0]
    if found.name == "?":
        return f"{found}: a name computed at run time; use a dict literal of the modules"
    if here is None or here == there:
        return None  # the former is test_every_module_has_a_place's to report
    if (
        here in MODELS
        and top not in sys.stdlib_module_names
        and (there or top) not in MODELS_MAY_IMPORT
    ):
        return f"{found}: {here} may import only {', '.join(sorted(MODELS_MAY_IMPORT))}, stdlib"
    if there in MODELS and PLACES[here] != COMMANDS:
        return f"{found}: only kd.runs.build and the commands import {there}"
    if PLACES[here] == FOUNDATION and top in HEAVY:
        return f"{found}: group {FOUNDATION} does without {top}"
    if top in PACKAGES and there is None:
        return f"{found}: {found.name} has no place in PLACES"
    if top in {"tests", "benchmarks"}:
        return f"{found}: packages do not import {top}"
    if there is not None and PLACES[there] < PLACES[here]:
        return f"{found}: up, from group {PLACES[here]} to group {PLACES[there]}"
    return None


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle in a directed graph: its nodes in order, the first again at the end; [] if none."""
    finished: set[str] = set()

    def walk(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in finished:
            return []
        for following in sorted(edges.get(node, ())):
            if found := walk(following, [*trail, node]):
                return found
        finished.add(node)
        return []

    return next((found for start in sorted(edges) if (found := walk(start, []))), [])


def unit_edges(imports: list[Import]) -> dict[str, set[str]]:
    """Map each unit to the other units that it imports."""
    edges: dict[str, set[str]] = {}
    for found in imports:
        here, there = unit_of(found.importer), unit_of(found.name)
        if here and there and here != there:
            edges.setdefault(here, set()).add(there)
    return edges


def complaints(root: Path) -> list[str]:
    """Everything wrong with the imports below `root`."""
    imports = all_imports(root)
    wrong = [text for found in imports if (text := complaint(found))]
    wrong += [f"{name} has no place in PLACES" for name in modules(root) if unit_of(name) is None]
    if found_circle := circle(unit_edges(imports)):
        wrong.append("a circle: " + " -> ".join(found_circle))
    return wrong


def test_every_module_has_a_place() -> None:
    assert [name for name in modules(ROOT) if unit_of(name) is None] == []


def test_every_import_points_down() -> None:
    assert [text for found in all_imports(ROOT) if (text := complaint(found))] == []


def test_units_do_not_import_each_other_in_a_circle() -> None:
    assert circle(unit_edges(all_imports(ROOT))) == []


def plant(root: Path, **files: str) -> Path:
    """Write a small source tree; `kd__data__coco="..."` is kd/formats/coco.py."""
    for package in PACKAGES:
        (root / package).mkdir(exist_ok=True)
    for name, text in files.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def only(found: list[str]) -> str:
    """The single complaint."""
    assert len(found) == 1, found
    return found[0]


def test_an_import_upwards_is_found_inside_a_function_too(tmp_path: Path) -> None:
    source = "import math\ndef late():\n    from kd.engine.loop import fit\n"
    root = plant(tmp_path, kd__engine="", kd__losses__logits=source)
    assert only(complaints(root)) == (
        "kd.losses.logits:3 imports kd.engine.loop: up, from group 4 to group 2"
    )


def test_a_relative_import_is_resolved(tmp_path: Path) -> None:
    source = "from .. import engine\nfrom . import coco\nfrom .coco import read\n"
    root = plant(tmp_path, kd__engine="", kd__data__coco="", kd__data__hide=source)
    assert only(complaints(root)).startswith("kd.transforms.hide:1 imports kd.engine.loop: up")


def test_a_type_checking_import_counts(tmp_path: Path) -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kd.runs.build\n"
    root = plant(tmp_path, kd__build="", kd__tasks__base=source)
    assert "kd.problems.base:3 imports kd.runs.build: up" in only(complaints(root))


def test_a_dynamic_import_is_read_where_it_can_be_and_refused_where_not(tmp_path: Path) -> None:
    source = "import importlib\nimportlib.import_module('kd.distill')\nimportlib.import_module(n)\n"
    found = complaints(plant(tmp_path, kd__distill="", kd__engine=source))
    assert "kd.engine.loop:2 imports kd.distill: up" in found[0]
    assert "run time" in found[1]


def test_a_module_without_a_place_is_found(tmp_path: Path) -> None:
    assert only(complaints(plant(tmp_path, kd__utils=""))) == "kd.utils has no place in PLACES"


def test_models_import_only_what_both_sides_share(tmp_path: Path) -> None:
    good = "import math\nimport torch\nfrom torchvision import models\n"
    good += "from kd.nn.saliency import Aspp\n"
    good += "from teachers.cnn import Cnn\n"
    bad = "from kd.losses import logits\nimport numpy\nfrom students import vgg\n"
    found = complaints(plant(tmp_path, kd__nn__aspp="", teachers__unet=good, teachers__cnn=bad))
    assert [text.split(":")[0] for text in found[:2]] == ["teachers.cnn"] * 2
    assert all("may import only" in text for text in found)
    assert len(found) == 3


def test_only_commands_import_models(tmp_path: Path) -> None:
    files = {"kd__build": "import teachers\n", "kd__engine": "from students import STUDENTS\n"}
    assert only(complaints(plant(tmp_path, **files))) == (
        "kd.engine.loop:1 imports students: only kd.runs.build and the commands import students"
    )


def test_the_foundation_does_without_torch(tmp_path: Path) -> None:
    root = plant(tmp_path, kd__config="from torch import nn\n", kd__data__scenes="import kd.cli\n")
    assert only(complaints(root)) == "kd.config.recipes:1 imports torch: group 5 does without torch"


def test_a_circle_inside_a_group_is_found(tmp_path: Path) -> None:
    files = {"kd__engine": "import kd.engine.tracking\n", "kd__tracking": "import kd.engine.loop\n"}
    assert only(complaints(plant(tmp_path, **files))) == (
        "a circle: kd.engine.loop -> kd.engine.tracking -> kd.engine.loop"
    )
