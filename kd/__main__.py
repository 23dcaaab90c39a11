"""The command line: `kd COMMAND ...` is `python -m kd.COMMAND ...`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from kd.cli import run_command
from kd.errors import UserError
from kd.registry import all_names

COMMANDS = {
    "train-teacher": "train a teacher",
    "distill": "train a student with a teacher, and its plain twin without",
    "evaluate": "evaluate a finished run, or compare several",
    "compare": "compare finished runs in tables and figures",
    "transfer": "start students from a teacher's trunk",
    "predict": "predict images with a trained model",
    "export": "export a trained model to ONNX and others, and check the file",
    "layers": "list a model's layers, with shapes and strides",
    "cache": "compute a teacher's outputs ahead of training",
    "imagine": "draw what a teacher expects in a region of a photograph",
    "rescore": "rescore a detector's results by their context",
    "out-of-context": "paste objects into probable and improbable scenes",
    "demo": "run everything in minutes",
    "data download": "download a public dataset",
    "data prepare": "make a resized copy of a dataset",
    "data scenes": "generate the synthetic scenes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names, or two of `kd data ...`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:  # as python -m does: for package.module:attribute
        sys.path.insert(0, os.getcwd())
    words = 2 if arguments[:1] == ["data"] else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if not arguments or name.split()[-1] in ("-h", "--help", "data"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command:{width}}  {text}" for command, text in COMMANDS.items()]
        sys.stdout.write("\n".join(["usage: kd COMMAND ...", "", *lines, ""]))
        return 0

    def run(_: Sequence[str] | None) -> int:
        if name not in COMMANDS:
            raise UserError(f"unknown command {name!r}{all_names(name, COMMANDS)}")
        module = importlib.import_module(f"kd.{name.replace(' ', '.').replace('-', '_')}")
        status: int = module.main(rest)
        return status

    return run_command(run)


if __name__ == "__main__":
    raise SystemExit(main())
