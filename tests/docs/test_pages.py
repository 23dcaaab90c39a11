"""What documents name is there: pages, sections, modules, options of commands, keys of a batch."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kd.config.reader import find_config
from kd.config.recipes import DistillRecipe, Recipe, TeacherRecipe, TransferRecipe
from kd.data.loader import collate
from kd.losses import kl_logits
from kd.problems import problem
from kd.problems.base import Sampling
from kd.problems.recipes import data_config, load_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAME = re.compile(r"`((?:kd|teachers|students)(?:\.\w+)+)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"python -m kd\.([\w.]+)(.*)")
# Names that our losses have in torchdistill's registry.
IN_TORCHDISTILL = {
    f"kd.{name}"
    for name in ("kl_logits", "pixel_wise", "pair_wise", "channel_wise", "hint", "imitation")
}
RECIPES: dict[str, tuple[str, type[Recipe]]] = {
    "train_teacher": ("teacher", TeacherRecipe),
    "distill": ("student", DistillRecipe),
    "transfer": ("task", TransferRecipe),
}
FOLDERS = {"teacher": "teacher", "student": "distill", "task": "transfer"}


def called(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """Ids of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", head.lower()) for head in heads)
    return {head.replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text("utf-8")):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_modules_and_functions_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # names what was, too
    names = set(NAME.findall(page.read_text("utf-8"))) - IN_TORCHDISTILL
    missing = sorted(name for name in names if not exists(name))
    assert missing == []


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """Every `python -m kd.NAME ...` of the documents: page, command, arguments."""
    for page in PAGES:
        for _, text in BLOCK.findall(page.read_text("utf-8")):
            for line in text.replace("\\\n", " ").splitlines():
                if found := COMMAND.search(line.split("#")[0]):
                    yield called(page), found[1], shlex.split(found[2])


def test_the_recipes_of_commands_are_valid() -> None:
    """Names and `--set` of what trains; what capitals stand for is taken as it is."""
    checked = 0
    for page, command, arguments in commands():
        if command not in RECIPES or "--config" in arguments or "train.epohcs=3" in arguments:
            continue
        flag, model = RECIPES[command]
        given = dict(itertools.pairwise(arguments))
        name = given[f"--{flag}"]
        data = given.get("--data", "")
        if name == "NAME" or data.endswith(".yaml"):  # files that a page writes
            continue
        settings = [b for a, b in itertools.pairwise(arguments) if a == "--set"]
        settings = [text.replace("seed=N", "seed=1") for text in settings]
        try:
            load_recipe(
                model, find_config(FOLDERS[flag], name), data=data or None, settings=settings
            )
        except Exception as error:
            raise AssertionError(f"{page}: {command} {arguments}") from error
        checked += 1
    assert checked > 40


def test_options_of_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    helps: dict[tuple[str, ...], str] = {}
    wrong = set()
    for page, command, arguments in commands():
        part = tuple(arguments[:1]) if command == "out_of_context" else ()
        if (command, *part) not in helps:
            with pytest.raises(SystemExit):
                importlib.import_module(f"kd.{command}").main([*part, "--help"])
            helps[command, *part] = capsys.readouterr().out
        options = {text for text in arguments if text.startswith("--")}
        known = set(re.findall(r"--[\w-]+", helps[command, *part]))
        wrong |= {(page, command, option) for option in options - known}
    assert wrong == set()


def test_the_readme_s_lines_of_python_run() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    there: dict[str, object] = {}
    exec(block, there)
    student, teacher, loss = there["student"], there["teacher"], there["loss"]
    assert isinstance(student, torch.Tensor) and isinstance(teacher, torch.Tensor)
    assert isinstance(loss, torch.Tensor) and student.grad is not None
    assert torch.equal(loss, kl_logits(student, teacher, temperature=4.0))


def documented(heading: str) -> dict[str, tuple[int, set[str]] | None]:
    """Number of dimensions and types of each key in a section of docs/batch.md."""
    text = (ROOT / "docs" / "batch.md").read_text("utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    keys: dict[str, tuple[int, set[str]] | None] = {}
    for names, shape in re.findall(r"^\| (`.*?) \| (.*?) \|", section, re.MULTILINE):
        found = re.fullmatch(r"\((.*?)\) (\w+)(?: or (\w+))?", shape)
        sizes = found and [size for size in found[1].split(",") if size.strip()]
        about = (len(sizes), {found[2], found[3]} - {None}) if found and sizes else None
        keys |= dict.fromkeys(re.findall(r"`(\w+)`", names), about)
    return keys


@pytest.mark.parametrize(
    "heading, data",
    [("Objects", "scenes"), ("Detection", "scenes"), ("Segmentation", "scenes_maps"),
     ("Saliency", "scenes_gaze")],
)  # fmt: skip
def test_the_keys_of_a_batch_are_as_documented(heading: str, data: str, small_scenes: Path) -> None:
    settings = ["generate={train: 24, val: 8, size: 64, seed: 0}", f"root={small_scenes}"]
    kind = problem(heading.lower())
    opened = kind.open(data_config(data, settings))
    objects = documented("Objects")  # other sections refer to it: "as for objects"
    known = {key: about or objects[key] for key, about in documented(heading).items()}
    for samples in (kind.training(opened, Sampling(seed=0)), kind.evaluation(opened)):
        batch = collate([samples[0, 0]])
        assert batch.keys() <= known.keys()
        for key, value in batch.items():
            about = known[key]
            assert about is not None, key
            assert value.ndim == about[0], key
            assert str(value.dtype).removeprefix("torch.") in about[1], key
