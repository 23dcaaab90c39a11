"""Run the commands and recipes of a checkout, and translate names that a change has renamed.

For `same_losses.py`. A change that renames a recipe key, a run folder or a curve must add the name
to `RENAMED`, so that the losses of an older checkout can still be compared.
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

# Renamed items, old to new: paths of recipe keys, variants, recipes, datasets, run folders and
# losses. Recordings of older checkouts use the new names too.
RENAMED = {
    "arms": "variants",
    "bare": "no_context",
    "direct": "output_kd",
    "train.pictures": "train.images",
}
OLD_NAMES = {new: old for old, new in RENAMED.items()}
# For each folder of configs/: the command that trains its recipes, and the flag for a recipe.
COMMANDS = {
    "teacher": ("kd.train_teacher", "--teacher"),
    "distill": ("kd.distill", "--student"),
    "transfer": ("kd.transfer", "--task"),
}
# Datasets of recipes that their files do not name.
MORE_DATA = {
    "fasterrcnn_resnet18": ("coco_mini", "voc", "voc0712", "kitti"),
    "fasterrcnn_resnet18_context": ("coco_mini",),
    "retinanet_resnet18": ("coco_mini",),
    "fcos_resnet18": ("coco_mini",),
    "centernet_resnet18": ("coco_mini",),
    "pspnet_mobilenet_v2": ("cityscapes",),
}
ALL_VARIANTS = ("plain", "distilled", "no_context", "shuffled", "output_kd")
SECONDS = 1800  # time limit for a recipe

# Run commands one after the other, each in a fork of this process, which has imported all modules:
# importing takes longer than training. Report the exit status of each.
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
    own: bool = field(default=True, compare=False)  # whether `data` is the recipe's own dataset

    def __str__(self) -> str:
        return canonical(f"{self.kind}/{self.name}/{self.data}")

    @property
    def command(self) -> list[str]:
        """Return the training command without settings."""
        module, flag = COMMANDS[self.kind]
        return [module, flag, self.name, "--data", self.data]


def canonical(path: str) -> str:
    """Replace each part of a path or tag by its new name."""
    return "/".join(RENAMED.get(part, part) for part in path.split("/"))


def with_new_keys(values: Any, place: str = "") -> Any:
    """Replace the keys of nested settings by their new names."""
    if not isinstance(values, dict):
        return values
    return {
        RENAMED.get(f"{place}{key}", str(key)).rpartition(".")[2]: with_new_keys(
            value, f"{place}{key}."
        )
        for key, value in values.items()
    }


def places(values: Any, place: str = "") -> set[str]:
    """Return the dotted paths of all keys in nested settings."""
    if not isinstance(values, dict):
        return set()
    below = [places(value, f"{place}{key}.") for key, value in values.items()]
    return {f"{place}{key}" for key in values}.union(*below)


class Ended(NamedTuple):
    """Exit status and output of a finished command."""

    code: int
    out: str
    errors: str


class Server:
    """A process that has imported the commands and runs each in a fork, one at a time.

    Args:
        root: The checkout whose code runs.
        work: Existing working folder without any code in it.
        name: Name of the process's files in `work`.
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
        """End the process."""
        self._process.communicate()


class Checkout:
    """The code and recipes of a checkout, and the names that it uses.

    Args:
        root: The checkout's folder.
        work: Existing folder in which commands run and write.
        servers: Number of commands that run at a time.
    """

    def __init__(self, root: Path, work: Path, servers: int) -> None:
        self.root, self.work = root, work
        self.names: set[str] = set()  # new names that the checkout knows
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
        """List every recipe with its own dataset and with each dataset that it has settings for."""
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
        """Return the output of --print-config with new names, or the error message."""
        code, out, errors = self.run([*command, "--print-config"])
        if code:
            return errors
        values = yaml.safe_load(out)
        self.names |= OLD_NAMES.keys() & places(values)
        config: Config = with_new_keys(values)
        return config

    def find_names(self, student: Job) -> None:
        """Find the new variant names that this checkout knows, by trying them on a recipe."""
        self.printed(student.command)
        key, tried = self.spelled("variants"), [new for new in ALL_VARIANTS if new in OLD_NAMES]
        for new in tried:
            answer = self.printed([*student.command, "--set", f"{key}=[plain, {new}]"])
            self.names |= set() if isinstance(answer, str) else {new}

    def spelled(self, new: str) -> str:
        """Return this checkout's name for a new name, such as the path of a key."""
        parts = new.split(".")
        upwards = [".".join(parts[: number + 1]) for number in range(len(parts))]
        names = [one if one in self.names else OLD_NAMES.get(one, one) for one in upwards]
        return ".".join(name.rpartition(".")[2] for name in names)
