"""A run's folder: opened, checked against what is already there, and finished."""

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
# These may change between a start and its resumption: they do not change the result.
_FREE = ("data.workers", "data.root", "data.prepared", "variants", "seeds", "starts",
         "train.log_every")  # fmt: skip


class RunFolder:
    """The files of one run.

    Args:
        path: The folder; made where it is missing.
        config: The resolved recipe, plain values.
        resume: Whether a run that is there already goes on.

    Raises:
        UserError: The folder holds another run, or one and `resume` is false, or cannot be written.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.config = dict(config)
        written = path / "config.yaml"
        try:
            path.mkdir(parents=True, exist_ok=True)
            held = {file.name for file in path.iterdir()}
        except OSError as error:
            raise UserError(f"{path}: cannot be made: {error}; name another --out") from error
        if not os.access(path, os.W_OK):
            raise UserError(f"{path}: cannot be written; name another folder with --out")
        for name in held:
            if name.endswith(PARTIAL):  # a kill came while it was written
                (path / name).unlink(missing_ok=True)
                held = held - {name}
        if "config.yaml" not in held and held & {"last.pt", "model.safetensors"}:
            raise UserError(
                f"{path}: a run without its config.yaml is there; name another folder with --out"
            )
        if held == {"config.yaml"}:  # stopped before anything was trained
            held = set()
        if "config.yaml" in held:
            if not resume:
                raise UserError(
                    f"{path}: there is a run already; --resume resumes it, "
                    "--out DIR names another folder"
                )
            check_same_config(written, self.config)
        else:
            write_config(path, self.config)

    @property
    def checkpoint(self) -> Path:
        """What resuming reads."""
        return self.path / "last.pt"

    @property
    def model(self) -> Path:
        """The result."""
        return self.path / "model.safetensors"

    @property
    def finished(self) -> bool:
        """Whether all of the run was written; the summary comes last."""
        return (self.path / "summary.json").is_file()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary."""
        write_summary(self.path, summary)

    def name_classes(self, names: Sequence[str]) -> None:
        """Write the class names, which a model can then be used with where its data are not."""
        write_class_names(self.path, names)

    def summary(self) -> dict[str, Any]:
        """The summary of a finished run."""
        loaded: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
        return loaded


def check_current(config: Mapping[str, Any], file: Path) -> None:
    """Refuse the config of a run that was trained before `arms` became `variants`.

    Args:
        config: As read from the file.
        file: Where messages say that the config is.

    Raises:
        UserError: The run is of an earlier version.
    """
    if old := sorted({"arm", "arms"} & config.keys()):
        raise UserError(
            f"{file}: a run of an earlier version ({old[0]!r} is now "
            f"{old[0].replace('arm', 'variant')!r}); train it again"
        )


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.yaml`, over an old one."""
    text = yaml.safe_dump(dict(config), sort_keys=False, width=100)
    write_text(folder / "config.yaml", text)


def write_class_names(folder: Path, names: Sequence[str]) -> None:
    """Write what `class_names` reads."""
    text = json.dumps({"names": list(names)}, indent=2, ensure_ascii=False) + "\n"
    write_text(folder / _CLASSES, text)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`; the folder is a finished run then."""
    text = json.dumps(dict(summary), indent=2) + "\n"
    write_text(folder / "summary.json", text)


def class_names(folder: Path) -> tuple[str, ...] | None:
    """The class names of a run, in the order of its outputs; None if it did not write them.

    Raises:
        UserError: The file is not what `name_classes` writes.
    """
    file = folder / _CLASSES
    try:
        names = json.loads(file.read_text(encoding="utf-8"))["names"]
        if not (names and isinstance(names, list) and all(isinstance(n, str) for n in names)):
            raise ValueError("names must be a list of texts")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a run's class names: {error}") from error
    return tuple(names)


def check_same_config(written: Path, config: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of another config; the differing places are named."""
    there = read_yaml(written)
    check_current(there, written)
    differences = [
        line for line in config_differences(there, dict(config)) if not line.startswith(_FREE)
    ]
    if differences:
        raise UserError(
            f"{written.parent}: a run with another config is there: {'; '.join(differences[:5])}. "
            "Undo the change, or name another folder with --out"
        )
