"""Flags that all commands share, and how a user's mistake ends: one line each, exit status 2."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from kd.config.reader import find_config, to_yaml
from kd.config.recipes import Recipe as AnyRecipe
from kd.errors import UserError
from kd.problems.recipes import load_recipe, recipe_schema

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
        sys.stderr.write("interrupted; started again it goes on, training with --resume\n")
        return 130
    except BrokenPipeError:  # `| head` has seen enough; Python must not complain when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class _Once(logging.Filter):
    """What was said is not said again: several runs of a command may open the same data set."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is a warning, or new."""
        text = record.getMessage()
        new = record.levelno > logging.INFO or text not in self._said
        self._said.add(text)
        return new


def set_up_logging(*, verbose: bool = False, rank: int = 0) -> None:
    """Log lines of `kd` to stderr; ranks other than 0 stay silent below errors."""
    level = logging.ERROR if rank else logging.DEBUG if verbose else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Once())
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[handler])
    logging.getLogger("kd").setLevel(level)


def recipe_parser(prog: str, kind: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags of a command that runs a recipe of configs/KIND."""
    model = {"distill": "student", "transfer": "task"}.get(kind, "teacher")
    parser = argparse.ArgumentParser(prog=prog, description=description)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        f"--{model}", metavar="NAME", dest="recipe", help=f"configs/{kind}/NAME.yaml"
    )
    which.add_argument("--config", type=Path, metavar="PATH", help="a recipe of your own")
    which.add_argument("--schema", action="store_true", help="print the recipes' JSON schema")
    parser.add_argument(
        "--data", metavar="NAME", help="configs/data/NAME.yaml, or a .yaml file (default: recipe's)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", dest="settings",
        help="change one value; repeatable",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: below runs/)")
    parser.add_argument("--resume", action="store_true", help="go on where --out stopped")
    parser.add_argument("--print-config", action="store_true", help="print the recipe and stop")
    parser.add_argument("--verbose", action="store_true")
    return parser


def read_recipe(
    args: argparse.Namespace, model: type[Recipe], kind: str, settings: Sequence[str] = ()
) -> Recipe | None:
    """The recipe that the flags ask for; None where it or its schema was only to be printed."""
    if args.schema:
        sys.stdout.write(json.dumps(recipe_schema(model), indent=2) + "\n")
        return None
    path = args.config or find_config(kind, args.recipe)
    recipe = load_recipe(model, path, data=args.data, settings=[*args.settings, *settings])
    if args.print_config:
        sys.stdout.write(to_yaml(recipe))
        return None
    return recipe


def numbers(flag: str, text: str | None) -> tuple[float, ...]:
    """The numbers of a flag, such as 0.75,1,1.25; none where it is not given."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UserError(f"{flag} {text}: numbers are needed, such as 0.75,1,1.25") from None
