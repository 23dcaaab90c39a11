"""Flags shared by commands; user errors become one line each and exit status 2."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from kd.config.reader import find_config, known_configs, to_yaml
from kd.config.recipes import Model
from kd.config.recipes import Recipe as AnyRecipe
from kd.distillation.registry import ADAPTERS, TERMS, TORCHDISTILL, TermKind
from kd.errors import UserError
from kd.metrics.registry import METRICS, Metric
from kd.problems import PROBLEMS, spec_of_task, tasks
from kd.problems.recipes import load_recipe, recipe_schema
from kd.registry import Entry, check_problem, find, is_foreign
from students import STUDENTS
from teachers import TEACHERS

Recipe = TypeVar("Recipe", bound=AnyRecipe)
Main = Callable[[Sequence[str] | None], int]


def run_command(main: Main, argv: Sequence[str] | None = None) -> int:
    """Run a command; a `UserError` becomes lines on stderr and exit status 2."""
    try:
        return main(argv)
    except UserError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"error: {line}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run it again to continue, training with --resume\n")
        return 130
    except BrokenPipeError:  # `| head` has seen enough; Python must not complain when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class _Once(logging.Filter):
    """Drop repeated lines, such as those of a dataset that a command opens several times."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is a warning, or new."""
        text = record.getMessage()
        new = record.levelno > logging.INFO or text not in self._seen
        self._seen.add(text)
        return new


def set_up_logging(*, verbose: bool = False, rank: int = 0) -> None:
    """Log lines of `kd` to stderr; ranks other than 0 log errors only."""
    level = logging.ERROR if rank else logging.DEBUG if verbose else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Once())
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[handler])
    logging.getLogger("kd").setLevel(level)


class _List(argparse.Action):
    """Print the names that a command takes, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        sys.stdout.write(names(self.const))
        parser.exit()


def add_list(parser: argparse.ArgumentParser, *kinds: str) -> None:
    """Add the flag `--list`; `kinds` are keys of `registries`, or folders of configs/."""
    text = f"print the names of {', '.join(kinds)}, and stop"
    parser.add_argument("--list", action=_List, nargs=0, const=kinds, help=text)


def registries() -> dict[str, tuple[Mapping[str, Entry | TermKind | Metric], str]]:
    """Registries of the names in recipes, and the keys that take them."""
    return {
        "problems": (PROBLEMS, "package.module:SPEC of your own is a task"),
        "tasks": (tasks(), "task.name"),
        "students": (STUDENTS, "student.name"),
        "teachers": (TEACHERS, "teacher.name of configs/teacher"),
        "terms": (TERMS, "losses, or package.module:attribute"),
        "adapters": (ADAPTERS, "adapters.LAYER.kind"),
        "metrics": (METRICS, "metrics, or package.module:METRIC of your own"),
    }


def names(kinds: Sequence[str]) -> str:
    """Names with a line of help, one list for each kind."""
    blocks = []
    for kind in kinds:
        entries, where = registries().get(kind, ({}, f"configs/{kind}"))
        lines = {name: entry.help for name, entry in entries.items()}
        lines = lines or {name: _about(kind, name) for name in known_configs(kind)}
        width = max(map(len, lines))
        listed = [f"  {name:{width}}  {text}".rstrip() for name, text in lines.items()]
        blocks.append("\n".join([f"{kind} ({where}):", *listed]))
    return "\n\n".join(blocks) + "\n"


def _about(kind: str, name: str) -> str:
    """First sentence of the comment at the top of a file of configs/."""
    comment = []
    for line in find_config(kind, name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "yaml-language-server" in line:
            continue
        comment.append(line.removeprefix("#").strip())
    text = " ".join(comment).partition(". ")[0].partition(": ")[0]
    return f"{text[:76]}..." if len(text) > 79 else text


def recipe_parser(prog: str, kind: str, description: str) -> argparse.ArgumentParser:
    """Parser with the flags of a command that runs a recipe of configs/KIND."""
    model = {"distill": "student", "transfer": "task"}.get(kind, "teacher")
    parser = argparse.ArgumentParser(prog=prog, description=description)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        f"--{model}", metavar="NAME", dest="recipe", help=f"configs/{kind}/NAME.yaml"
    )
    which.add_argument("--config", type=Path, metavar="PATH", help="a recipe of your own")
    which.add_argument("--schema", action="store_true", help="print the recipes' JSON schema")
    more = ("teachers",) if kind == "teacher" else ("students", "terms", "adapters", "metrics")
    add_list(parser, kind, "data", "tasks", *more)
    parser.add_argument(
        "--data", metavar="NAME", help="configs/data/NAME.yaml, or a .yaml file (default: recipe's)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", dest="settings",
        help="change one value; repeatable",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: below runs/)")
    parser.add_argument("--resume", action="store_true", help="resume the run in --out")
    parser.add_argument("--print-config", action="store_true", help="print the recipe and stop")
    parser.add_argument("--verbose", action="store_true")
    return parser


def read_recipe(
    args: argparse.Namespace, model: type[Recipe], kind: str, settings: Sequence[str] = ()
) -> Recipe | None:
    """Read the recipe that the flags name, and check its keys and built-in names.

    Returns None if the recipe or its schema was only to be printed.

    Raises:
        UserError: One line per mistake.
    """
    if args.schema:
        sys.stdout.write(json.dumps(recipe_schema(model), indent=2) + "\n")
        return None
    path = args.config or find_config(kind, args.recipe)
    recipe = load_recipe(model, path, data=args.data, settings=[*args.settings, *settings])
    check_names(recipe)
    if args.print_config:
        sys.stdout.write(to_yaml(recipe))
        return None
    return recipe


def check_names(recipe: AnyRecipe) -> None:
    """Check names of built-in models, terms and adapters; the user's own are imported later."""
    problem, mistakes = spec_of_task(recipe.task.name).name, []

    def check(place: str, finds: Callable[..., object], *args: object, what: str) -> None:
        try:
            finds(*args, what=what)
        except UserError as error:
            mistakes.append(f"{place}: {error}")

    for what, registry in (("student", STUDENTS), ("teacher", TEACHERS)):
        model = getattr(recipe, what, None)
        if isinstance(model, Model):
            check(f"{what}.name", check_problem, registry, model.name, problem, what=what)
    for term in getattr(recipe, "all_losses", ()):
        if not term.name.startswith(TORCHDISTILL):
            check("losses", find, TERMS, term.name, what="distillation term")
    for layer, adapter in getattr(recipe, "adapters", {}).items():
        check(f"adapters.{layer}.kind", find, ADAPTERS, adapter.kind, what="adapter")
    mistakes += [
        f"metrics: {name!r}: expected package.module:METRIC; built-in metrics need no entry"
        for name in recipe.metrics
        if not is_foreign(name)
    ]
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)))


def numbers(flag: str, text: str | None) -> tuple[float, ...]:
    """Numbers of a flag, such as 0.75,1,1.25; empty if it is not given."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UserError(f"{flag} {text}: numbers are needed, such as 0.75,1,1.25") from None
