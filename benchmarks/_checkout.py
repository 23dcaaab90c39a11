"""A checkout's recipes and commands, and what things are called there, before a change or after.

For `same_losses.py`. A change that renames a recipe key, a run folder or a curve adds it to
`RENAMED`; losses of an older checkout can then still be compared.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

# What has another name now: old to new. A name is a key's place in recipes, a variant, a recipe, a
# dataset, a folder of runs or a loss. Recordings of older checkouts have the new names too.
RENAMED = {
    "arms": "variants",
    "bare": "no_context",
    "direct": "output_kd",
    "train.pictures": "train.images",
}
OLD_NAMES = {new: old for old, new in RENAMED.items()}
# Of each folder of configs/: the command that trains its recipes, and the flag that names one.
COMMANDS = {
    "teacher": ("kd.train_teacher", "--teacher"),
    "distill": ("kd.distill", "--student"),
    "transfer": ("kd.transfer", "--task"),
}
# Datasets of recipes beside those that their files name.
MORE_DATA = {
    "fasterrcnn_resnet18": ("coco_mini", "voc", "voc0712", "kitti"),
    "fasterrcnn_resnet18_context": ("coco_mini",),
    "retinanet_resnet18": ("coco_mini",),
    "fcos_resnet18": ("coco_mini",),
    "centernet_resnet18": ("coco_mini",),
    "pspnet_mobilenet_v2": ("cityscapes",),
}
ALL_VARIANTS = ("plain", "distilled", "no_context", "shuffled", "output_kd")
SECONDS = 1800  # at most for a recipe

# Runs one command after the other, each in a process of its own, a copy of this one that has
# imported all it needs: importing takes longer than training. Says how each has ended.
SERVER = """
import atexit, gc, importlib, json, os, runpy, signal, sys, traceback
import kd
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    del sys.modules[name]
gc.freeze()
print(kd.__file__, flush=True)
for line in sys.stdin:
    argv, seconds, files = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.alarm(seconds)
    sys.argv, code = argv, 0
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # taking all modules down would take seconds
"""
Config = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A recipe on a dataset."""

    kind: str
    name: str
    data: str
    own: bool = field(default=True, compare=False)  # whether that is the recipe's own dataset

    def __str__(self) -> str:
        return canonical(f"{self.kind}/{self.name}/{self.data}")

    @property
    def command(self) -> list[str]:
        """The command that trains it, without settings."""
        module, flag = COMMANDS[self.kind]
        return [module, flag, self.name, "--data", self.data]


def canonical(path: str) -> str:
    """A path or tag, its parts by their new names."""
    return "/".join(RENAMED.get(part, part) for part in path.split("/"))


def with_new_keys(values: Any, place: str = "") -> Any:
    """Nested settings, their keys by their new names."""
    if not isinstance(values, dict):
        return values
    return {
        RENAMED.get(f"{place}{key}", str(key)).rpartition(".")[2]: with_new_keys(
            value, f"{place}{key}."
        )
        for key, value in values.items()
    }


def places(values: Any, place: str = "") -> set[str]:
    """The places of all keys of nested settings."""
    if not isinstance(values, dict):
        return set()
    below = [places(value, f"{place}{key}.") for key, value in values.items()]
    return {f"{place}{key}" for key in values}.union(*below)


class Ended(NamedTuple):
    """How a command has ended, and what it wrote."""

    code: int
    out: str
    errors: str


class Server:
    """A process that has the commands imported, and runs one at a time in a copy of itself.

    Args:
        root: The checkout whose code runs.
        work: An existing folder where it runs, and which has no code in it.
        name: Of its files there.
    """

    def __init__(self, root: Path, work: Path, name: str) -> None:
        self._files = [work / f"{name}.out", work / f"{name}.err"]
        environment = {
            **os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg",
            "KD_CACHE": str(work / "cache"),
        }  # fmt: skip
        modules = json.dumps([module for module, _ in COMMANDS.values()])
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, modules], cwd=work, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        where = self._line()
        if not Path(where).is_relative_to(root):
            raise SystemExit(f"{where}: imported in place of the code in {root}")

    def run(self, argv: list[str]) -> Ended:
        """Run a command: the module's name and its arguments."""
        assert self._process.stdin is not None
        line = json.dumps([argv, SECONDS, [str(file) for file in self._files]])
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        code = int(self._line())
        out, errors = (file.read_text(encoding="utf-8") for file in self._files)
        return Ended(code, out, errors)

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit("the process that runs the commands has ended")
        return line

    def close(self) -> None:
        """End it."""
        self._process.communicate()


class Checkout:
    """The code and the recipes of a folder, and what things are called there.

    Args:
        root: The folder.
        work: An existing folder where commands run and write.
        servers: How many run at a time.
    """

    def __init__(self, root: Path, work: Path, servers: int) -> None:
        self.root, self.work = root, work
        self.names: set[str] = set()  # new names that are known there
        self._free: queue.Queue[Server] = queue.Queue()
        for number in range(servers):
            self._free.put(Server(root, work, f"server{number}"))

    def run(self, argv: list[str]) -> Ended:
        """Run a command when it is its turn."""
        server = self._free.get()
        try:
            return server.run(argv)
        finally:
            self._free.put(server)

    def close(self) -> None:
        """End the processes."""
        while not self._free.empty():
            self._free.get().close()

    def recipes(self) -> list[Job]:
        """Every recipe with its own dataset and with each that it has settings for."""
        found = []
        for kind in COMMANDS:
            for path in sorted((self.root / "configs" / kind).glob("*.yaml")):
                content = with_new_keys(yaml.safe_load(path.read_text(encoding="utf-8")))
                own = content.get("data", "scenes")
                own = own if isinstance(own, str) else own["name"]
                more = MORE_DATA.get(path.stem, ()) if kind == "distill" else ()
                for data in dict.fromkeys([own, *content.get("per_data", {}), *more]):
                    found.append(Job(kind, path.stem, data, data == own))
        return found

    def printed(self, command: list[str]) -> Config | str:
        """What --print-config says, by new names; a text where the command is refused."""
        code, out, errors = self.run([*command, "--print-config"])
        if code:
            return errors
        values = yaml.safe_load(out)
        self.names |= OLD_NAMES.keys() & places(values)
        config: Config = with_new_keys(values)
        return config

    def find_names(self, student: Job) -> None:
        """Try which of the variants' names are the new ones, on a recipe of a student."""
        self.printed(student.command)
        key, tried = self.spelled("variants"), [new for new in ALL_VARIANTS if new in OLD_NAMES]
        for new in tried:
            answer = self.printed([*student.command, "--set", f"{key}=[plain, {new}]"])
            self.names |= set() if isinstance(answer, str) else {new}

    def spelled(self, new: str) -> str:
        """What something, a key's place for example, is called in this checkout."""
        parts = new.split(".")
        upwards = [".".join(parts[: number + 1]) for number in range(len(parts))]
        names = [one if one in self.names else OLD_NAMES.get(one, one) for one in upwards]
        return ".".join(name.rpartition(".")[2] for name in names)
