"""Run folders: create them, check them before resuming, and write their files."""

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
from kd.version import __version__

_CLASSES = "classes.json"
# These may differ when a run is resumed: they do not change the result.
_FREE = ("data.workers", "data.root", "data.prepared", "variants", "seeds", "starts",
         "train.log_every")  # fmt: skip


class RunFolder:
    """The folder of one run, created with its `config.yaml` if missing.

    Args:
        path: The folder.
        config: The resolved recipe.
        resume: Whether the folder may contain an earlier part of the same run.
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
        """Path of the checkpoint from which training resumes."""
        return self.path / "last.pt"

    @property
    def model(self) -> Path:
        """Path of the trained weights."""
        return self.path / "model.safetensors"

    @property
    def finished(self) -> bool:
        """Whether the run is complete, which its summary shows, because it is written last."""
        return (self.path / "summary.json").is_file()

    def summary(self) -> dict[str, Any]:
        """Read the summary of a finished run."""
        loaded: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
        return loaded


def check_current(config: Mapping[str, Any], file: Path) -> None:
    """Raise a UserError if `config`, read from `file`, has the outdated format with `arms`."""
    if old := sorted({"arm", "arms"} & config.keys()):
        raise UserError(
            f"{file}: a run of an earlier version ({old[0]!r} is now "
            f"{old[0].replace('arm', 'variant')!r}); train it again"
        )


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.yaml` to a folder; an existing one is replaced."""
    write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, width=100))


def write_class_names(folder: Path, names: Sequence[str]) -> None:
    """Write class names to `classes.json`, so that the model can be used without its dataset."""
    text = json.dumps({"names": list(names)}, indent=2, ensure_ascii=False) + "\n"
    write_text(folder / _CLASSES, text)


def model_metadata(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Return the metadata of a `model.safetensors`, with which the file can be used by itself."""
    return {
        "format": "kd-model-1",
        "kd": __version__,
        "config": json.dumps(dict(config)),
        "classes": json.dumps(list(names), ensure_ascii=False),
    }


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, which marks the run as finished."""
    write_text(folder / "summary.json", json.dumps(dict(summary), indent=2) + "\n")


def class_names(folder: Path) -> tuple[str, ...] | None:
    """Read a run's class names in the order of the model's outputs; None without `classes.json`."""
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
    """Raise a UserError if a resumed run's config differs in keys that change results.

    `written` is the run's `config.yaml`, and `config` is the recipe to resume with.
    """
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
