"""Read finished runs from their folders."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kd.errors import UserError
from kd.metrics.records import Records
from kd.metrics.registry import load_metrics
from kd.problems import problem_of_task
from kd.problems.results import Results
from kd.runs.folder import check_current, class_names

log = logging.getLogger(__name__)

_SEED = re.compile(r"seed(\d+)")


@dataclass(frozen=True)
class Run:
    """A finished run: a teacher, or one variant and seed of a distillation.

    Attributes:
        folder: Run folder.
        config: Content of `config.yaml`.
        summary: Content of `summary.json`.
        records: Predictions and ground truth from `predictions.npz`.
        results: Metrics and tables of the run's problem.
    """

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    records: Records
    results: Results

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class DistillRuns:
    """The finished runs of a distillation: for each variant, one run for each of `seeds`."""

    folder: Path
    seeds: tuple[int, ...]
    variants: dict[str, list[Run]]

    @property
    def results(self) -> Results:
        return next(iter(self.variants.values()))[0].results

    def records(self) -> dict[str, list[Records]]:
        """Return the predictions by variant, as a list with one entry for each seed."""
        return {variant: [run.records for run in runs] for variant, runs in self.variants.items()}


def read_run(folder: str | Path) -> Run:
    """Read `config.yaml`, `summary.json` and `predictions.npz` of a finished run.

    Raises:
        UserError: The folder is missing or not a run, or the run is unfinished or corrupt.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder{results_hint(path)}")
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: not a run, it has no config.yaml{_runs_below(path)}")
    for name in ("predictions.npz", "summary.json"):
        if not (path / name).is_file():
            raise UserError(
                f"{path}: not finished, it has no {name}; continue the run with --resume, "
                "or evaluate it with python -m kd.evaluate"
            )
    config = _read_mapping(path / "config.yaml")
    check_current(config, path / "config.yaml")
    results = results_of(config, path)
    records = read_predictions(path / "predictions.npz", results, class_names(path))
    return Run(path, config, _read_mapping(path / "summary.json"), records, results)


def results_of(config: Mapping[str, Any], run: Path) -> Results:
    """Return the metrics and tables of a run's problem, including the user's metrics.

    `config` is the content of the run's `config.yaml`. `run` is its folder, for error messages.
    """
    task = config.get("task")
    if not isinstance(task, dict) or "name" not in task:
        raise UserError(f"{run / 'config.yaml'}: not the config of a run, it names no task")
    metrics = load_metrics(config.get("metrics", ()))
    return problem_of_task(task["name"]).results(task["name"], metrics)


def results_hint(path: Path) -> str:
    """Return a hint for an error message if `path` is not a run but a detector's results file."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return ""
    how = f"python -m kd.evaluate {path} --annotations JSON"
    return f"; evaluate a detector's results in COCO format with their ground truth: {how}"


def find_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the finished runs in `folders`, each a run folder or a folder that contains runs.

    Subfolders are searched, except those of a run, such as a teacher's folds. Unfinished runs are
    skipped with a warning.
    """
    found: dict[Path, Run] = {}
    for folder in map(Path, folders):
        if not folder.is_dir() or _is_run(folder):
            found.setdefault(folder.resolve(), read_run(folder))
            continue
        places = _runs_in(folder)
        if not (whole := [place for place in places if (place / "summary.json").is_file()]):
            raise UserError(f"{folder}: no finished run in it or below it")
        for place in places:
            if place in whole:
                found.setdefault(place.resolve(), read_run(place))
            else:
                log.warning("%s: skipped, it is not finished", place)
    return list(found.values())


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and not is_distill(folder)


def _runs_in(folder: Path) -> list[Path]:
    if _is_run(folder):
        return [folder]
    below = sorted(place for place in folder.iterdir() if place.is_dir())
    return [run for place in below for run in _runs_in(place)]


def named_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """Return the runs by the names that `distinct_names` gives their folders."""
    return dict(zip(distinct_names([run.folder for run in runs]), runs, strict=True))


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each folder: its path without the common beginning and end.

    For example, `seed0/plain` and `seed1/plain` become `seed0` and `seed1`.
    """
    parts = [folder.parts for folder in folders]

    def common(paths: list[tuple[str, ...]]) -> int:
        same = (len(set(names)) == 1 for names in zip(*paths, strict=False))
        return len(list(takewhile(bool, same)))

    first = common([path[:-1] for path in parts])
    last = common([path[:first:-1] for path in parts])
    return [str(Path(*path[first : len(path) - last])) for path in parts]


def is_distill(folder: str | Path) -> bool:
    """Return whether a folder contains `seed<k>` folders, as that of a distillation does."""
    return bool(_seed_folders(Path(folder)))


def read_distill(folder: str | Path, variants: Collection[str] | None = None) -> DistillRuns:
    """Read the runs `seed<k>/<variant>/` of a distillation.

    Besides `plain`, read `variants`, or all variants that any seed has if None. Seeds with an
    unfinished run among these are skipped with a warning.

    Raises:
        UserError: All seeds are skipped, or the runs were evaluated on different objects.
    """
    path = Path(folder)
    found = _seed_folders(path)
    if not found:
        raise UserError(f"{path}: no distillation, it has no seed<k> folder{_runs_below(path)}")
    if variants is None:
        runs_of = (place.glob("*/config.yaml") for place in found.values())
        variants = {file.parent.name for files in runs_of for file in files}
    variants = _in_order({"plain", *variants}, path / "config.yaml")
    unfinished = {seed: _unfinished(place, variants) for seed, place in found.items()}
    if all(unfinished.values()):
        first = next(iter(found))
        raise UserError(f"{found[first]}: not finished, it has no run {unfinished[first]!r}")
    for seed, variant in unfinished.items():
        if variant:
            log.warning("%s: skipped, its run %r is not finished", found.pop(seed), variant)
    runs = {
        variant: [read_run(place / variant) for place in found.values()] for variant in variants
    }
    check_same_objects([run for column in runs.values() for run in column])
    return DistillRuns(path, tuple(found), runs)


def _unfinished(place: Path, variants: Sequence[str]) -> str | None:
    return next(
        (variant for variant in variants if not (place / variant / "summary.json").is_file()), None
    )


def check_same_objects(runs: Sequence[Run]) -> None:
    """Raise a UserError if runs were evaluated on different objects or ground truth."""
    first = runs[0]
    for run in runs[1:]:
        pair, own, others = f"{run.folder} and {first.folder}", run.results, first.results
        if type(own) is not type(others):
            raise UserError(f"{pair} predict different things: {own.things} and {others.things}")
        own.check_same(run.records, first.records, pair)


def read_predictions(
    path: str | Path, results: Results, names: Sequence[str] | None = None
) -> Records:
    """Read and check a `predictions.npz`; rows are sorted by id.

    `results` defines the arrays of the file. `names` are class names, for per-class metrics.

    Raises:
        UserError: The file is missing or corrupt, or an id occurs twice.
    """
    path = Path(path)
    try:
        # Opened here, because numpy leaves its own handle of a truncated file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            records = {name: stored[name] for name in stored.files}
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: corrupt, or no predictions: {error}") from error
    named = results.named(records, names)
    results.check(named, str(path))
    ids, order = np.unique(named[results.ids], return_index=True)
    if twice := len(named[results.ids]) - len(ids):
        raise UserError(f"{path}: {twice} {results.things} occur twice")
    return {n: part if n in results.not_by_id else part[order] for n, part in named.items()}


def read_scalars(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Read the curves of a run: lists of (step, value) pairs by tag.

    An incomplete last line of `metrics.jsonl` is skipped, because the run may still be training.
    """
    path = Path(folder) / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    curves: dict[str, list[tuple[int, float]]] = {}
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            point = (int(entry["step"]), float(entry["value"]))
            curves.setdefault(str(entry["tag"]), []).append(point)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a scalar: {line[:60]!r}") from error
    return curves


def ceilings(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of the exact posterior, which a summary calls `ceiling_<metric>`."""
    return {
        key.removeprefix("ceiling_"): float(number)
        for key, number in summary.items()
        if key.startswith("ceiling_") and isinstance(number, int | float)
    }


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: corrupt: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: corrupt: expected a mapping, got {type(content).__name__}")
    return content


def _seed_folders(path: Path) -> dict[int, Path]:
    if not path.is_dir():
        return {}
    named = [(_SEED.fullmatch(place.name), place) for place in path.iterdir() if place.is_dir()]
    return dict(sorted((int(name[1]), place) for name, place in named if name))


def _in_order(variants: Collection[str], config: Path) -> list[str]:
    """Sort variants by name, after those of the recipe and of its ablations in their order."""
    recipe = _read_mapping(config) if config.is_file() else {}
    known = ["plain", *recipe.get("variants", ("distilled",))]
    known += [variant for ablation in recipe.get("ablations", {}).values() for variant in ablation]
    return sorted(
        variants,
        key=lambda variant: (known.index(variant) if variant in known else len(known), variant),
    )


def _runs_below(path: Path, *, show: int = 4) -> str:
    """Return the end of an error message that lists runs in a folder, up to `show` of them."""
    found = sorted(
        {str(file.parent) for depth in ("*", "*/*") for file in path.glob(f"{depth}/config.yaml")}
        | {str(place) for place in path.iterdir() if place.is_dir() and is_distill(place)}
    )
    if not found:
        return ""
    rest = f" and {len(found) - show} more" if len(found) > show else ""
    return f"; below it are {', '.join(found[:show])}{rest}"
