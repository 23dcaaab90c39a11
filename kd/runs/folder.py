"""Run folders: opened, checked against an earlier start, and finished."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kd.config.reader import read_yaml
from kd.engine.checkpoint import config_differences
from kd.errors import UserError
from kd.utils.io import PARTIAL, write_text

_CLASSES = "classes.json"
# These may differ when a run is resumed: they do not change the result.
_FREE = ("data.workers", "data.root", "data.prepared", "variants", "seeds", "starts",
         "train.log_every")  # fmt: skip


class RunFolder:
    """The files of one run, created where missing.

    `config` is the resolved recipe. A folder with another run, with the same run unless `resume`,
    or one that cannot be written, is a UserError.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.config = dict(config)
        try:
            path.mkdir(parents=True, exist_ok=True)
            files = {file.name for file in path.iterdir()}
        except OSError as error:
            raise UserError(f"{path}: cannot be created: {error}; choose another --out") from error
        if not os.access(path, os.W_OK):
            raise UserError(f"{path}: cannot be written; choose another folder with --out")
        for name in [name for name in files if name.endswith(PARTIAL)]:  # killed while writing it
            (path / name).unlink(missing_ok=True)
            files.remove(name)
        if "config.yaml" not in files and files & {"last.pt", "model.safetensors"}:
            raise UserError(
                f"{path}: has a run without its config.yaml; choose another folder with --out"
            )
        if "config.yaml" in files and len(files) > 1:  # alone: stopped before training began
            if not resume:
                raise UserError(
                    f"{path}: has a run already; continue it with --resume, or choose another "
                    "folder with --out"
                )
            check_same_config(path / "config.yaml", self.config)
        else:
            write_config(path, self.config)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that resuming reads."""
        return self.path / "last.pt"

    @property
    def model(self) -> Path:
        """The trained weights."""
        return self.path / "model.safetensors"

    @property
    def finished(self) -> bool:
        """Whether the run is complete; the summary is written last."""
        return (self.path / "summary.json").is_file()

    def summary(self) -> dict[str, Any]:
        """Read the summary of a finished run."""
        loaded: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
        return loaded


def check_current(config: Mapping[str, Any], file: Path) -> None:
    """Refuse a config in which `variants` are still called `arms`; `file` is for messages."""
    if old := sorted({"arm", "arms"} & config.keys()):
        raise UserError(
            f"{file}: a run of an earlier version ({old[0]!r} is now "
            f"{old[0].replace('arm', 'variant')!r}); train it again"
        )


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.yaml`, replacing an old one."""
    write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, width=100))


def write_class_names(folder: Path, names: Sequence[str]) -> None:
    """Write the file that `class_names` reads, for using a model without its data."""
    text = json.dumps({"names": list(names)}, indent=2, ensure_ascii=False) + "\n"
    write_text(folder / _CLASSES, text)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, which makes the folder a finished run."""
    write_text(folder / "summary.json", json.dumps(dict(summary), indent=2) + "\n")


def class_names(folder: Path) -> tuple[str, ...] | None:
    """Read a run's class names, in the order of its outputs; None where it has no such file."""
    file = folder / _CLASSES
    try:
        names = json.loads(file.read_text(encoding="utf-8"))["names"]
        if not (names and isinstance(names, list) and all(isinstance(n, str) for n in names)):
            raise ValueError("names must be a list of strings")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a run's class names: {error}") from error
    return tuple(names)


def check_same_config(written: Path, config: Mapping[str, Any]) -> None:
    """Refuse to resume a run with another config; the UserError names the differences."""
    there = read_yaml(written)
    check_current(there, written)
    differences = [
        line for line in config_differences(there, dict(config)) if not line.startswith(_FREE)
    ]
    if differences:
        raise UserError(
            f"{written.parent}: has a run with another config: {'; '.join(differences[:5])}. "
            "Undo the change, or choose another folder with --out"
        )
