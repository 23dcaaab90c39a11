"""Check that a change of the code leaves the training losses of every recipe as they were.

    python benchmarks/same_losses.py record OUT.json [--root DIR] [--recipe NAME ...]
    python benchmarks/same_losses.py compare BEFORE.json AFTER.json [--tolerance 1e-6]

`record` trains every recipe of configs/ for about twenty steps with the real commands, on every
dataset that it has settings for, with tiny images, random data and weights, one thread and fixed
seeds. It records each `loss/*` of each step and variant, resumes after an interruption, and retries
failed recipes. --root is the checkout whose code and recipes run (default: this file's). Teachers
that a recipe needs are trained and recorded first. `compare` prints a line per variant and exits
with 1 if a loss differs or is missing. Only recordings from the same machine and version of PyTorch
are comparable.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, too

from benchmarks._checkout import Checkout, Config, Job
from benchmarks._small_recipes import (
    Losses,
    is_trained,
    teachers_of,
    train,
    trunks_of,
    weights_file,
)
from benchmarks._tiny_data import LAYOUTS

ROOT = Path(__file__).resolve().parent.parent


class Recording:
    """The file of recorded losses, rewritten after each recipe.

    Args:
        path: File to write; read first if it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipes: dict[str, Any] = {}
        if path.is_file():
            self.recipes = json.loads(path.read_text(encoding="utf-8"))["recipes"]

    def holds(self, job: Job) -> bool:
        """Return whether a recipe's losses have been recorded."""
        return "variants" in self.recipes.get(str(job), {})

    def add(self, job: Job, entry: dict[str, Any]) -> None:
        """Record a recipe's losses, or the error, and print a line."""
        self.recipes[str(job)] = entry
        versions = {
            "python": sys.version.split()[0], "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__), "numpy": np.__version__,
        }  # fmt: skip
        content = {"versions": versions, "recipes": dict(sorted(self.recipes.items()))}
        partly = self.path.with_suffix(".partial")
        partly.write_text(json.dumps(content) + "\n", encoding="utf-8")
        partly.replace(self.path)
        variants = entry.get("variants", {})
        steps = [len(next(iter(losses.values()), [])) for losses in variants.values()]
        outcome = entry.get("error") or f"variants: {len(variants)}, steps: {steps}"
        print(f"{job}  {entry['seconds']:.0f} s  {outcome}", flush=True)


def record(args: argparse.Namespace) -> int:
    """Train all recipes that are not recorded yet; return 1 if one failed."""
    out, started = args.out.resolve(), time.perf_counter()
    work = out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    checkout, recording = Checkout(args.root.resolve(), work, args.jobs), Recording(out)
    configs = find_recipes(checkout, args.recipe)
    pending = {job for job in configs if not recording.holds(job)}
    needed = {t for job in pending for t in teachers_of(job, configs[job]).values()}
    pending |= {teacher for teacher in needed if not is_trained(teacher, work)}
    make_data(work, {job.data for job in pending})
    make_weights(work, {trunk for job in pending for trunk in trunks_of(configs[job]).values()})
    failed = 0
    for teachers in (True, False):  # all of them before the first student
        jobs = [job for job in configs if job in pending and (job.kind == "teacher") is teachers]
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = {pool.submit(train, job, configs[job], checkout): job for job in jobs}
            for one in as_completed(runs):
                recording.add(runs[one], one.result())
                failed += "error" in one.result()
    checkout.close()
    if not args.keep:
        shutil.rmtree(work)
    spent, minutes = os.times(), (time.perf_counter() - started) / 60
    processor = (spent.children_user + spent.children_system) / 60
    print(f"{len(pending)} recipes, {failed} failed, {minutes:.1f} minutes", end=", ")
    print(f"{processor:.1f} of them of a processor")
    return int(failed > 0)


def find_recipes(checkout: Checkout, wanted: list[str]) -> dict[Job, Config | str]:
    """Return the selected recipes and their teachers, each with its config or the error."""
    every = checkout.recipes()
    jobs = [job for job in every if not wanted or matches(str(job), wanted)]
    if not jobs:
        raise SystemExit(f"no recipe {', '.join(wanted)} in {checkout.root / 'configs'}")
    checkout.find_names(next(job for job in every if job.kind == "distill"))
    configs = {job: checkout.printed(job.command) for job in jobs}
    needed = {t for job in jobs for t in teachers_of(job, configs[job]).values()}
    more = sorted(needed - configs.keys(), key=str)
    return configs | {job: checkout.printed(job.command) for job in more}


def matches(recipe: str, patterns: Iterable[str]) -> bool:
    """Return whether a pattern matches KIND/NAME/DATA, KIND/NAME or NAME."""
    kind, name, _ = recipe.split("/")
    forms = (recipe, f"{kind}/{name}", name)
    return any(fnmatch.fnmatch(form, pattern) for form in forms for pattern in patterns)


def make_data(work: Path, names: set[str]) -> None:
    """Write the datasets that no command generates."""
    for name in sorted(names & LAYOUTS.keys()):
        folder = work / "data" / name
        if not folder.is_dir():
            partly = folder.with_suffix(".partial")
            shutil.rmtree(partly, ignore_errors=True)
            partly.mkdir(parents=True)
            LAYOUTS[name](partly)
            partly.replace(folder)


def make_weights(work: Path, trunks: set[str]) -> None:
    """Write random weights of torchvision's models, with batch norms fitted to random images.

    Without fitted batch norms, a frozen trunk would give nearly the same map for every image.
    """
    torch.set_num_threads(1)
    for name in sorted(trunks):
        file = work / weights_file(name)
        if file.is_file():
            continue
        torch.manual_seed(len(name))
        model = torchvision.models.get_model(name, weights=None)
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.momentum = None  # the mean of all
            torch.nn.init.normal_(norm.bias, std=0.2)
        with torch.no_grad():
            model(torch.randn(16, 3, 64, 64))
        state = model.state_dict()
        features = {name: value for name, value in state.items() if "classifier" not in name}
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(features, file)


def compare(args: argparse.Namespace) -> int:
    """Print a line per variant; return 1 if one differs by more than the tolerance."""
    before, after = (Recording(path).recipes for path in (args.before, args.after))
    if args.recipe:
        before, after = ({name: entry for name, entry in one.items()
                          if matches(name, args.recipe)} for one in (before, after))  # fmt: skip
    equal = different = 0
    for recipe in sorted(before.keys() | after.keys()):
        first, second = before.get(recipe, {}), after.get(recipe, {})
        if "error" in first or "error" in second:
            lines = [("", False, f"failed: {first.get('error') or second.get('error')}")]
        else:
            ours, theirs = first.get("variants", {}), second.get("variants", {})
            names = [*ours, *(name for name in theirs if name not in ours)]
            lines = [
                (name, *verdict(ours.get(name), theirs.get(name), args.tolerance)) for name in names
            ]
        for name, same, outcome in lines:
            equal, different = equal + same, different + (not same)
            print(f"{f'{recipe} {name}':<72} {outcome}")
    print(f"{equal} equal, {different} not")
    return int(different > 0 or not equal)


def verdict(before: Losses | None, after: Losses | None, tolerance: float) -> tuple[bool, str]:
    """Return whether a variant's losses are equal, and how they differ."""
    if before is None:
        return False, "missing before"
    if after is None:
        return False, "missing after"
    if odd := sorted(before.keys() ^ after.keys()):
        return False, f"missing in one of the two: {', '.join(odd)}"
    largest, where = 0.0, ""
    for tag, losses in before.items():
        if len(losses) != len(after[tag]):
            return False, f"{tag}: {len(losses)} steps before, {len(after[tag])} after"
        for step, pair in enumerate(zip(losses, after[tag], strict=True), start=1):
            if (difference := relative(*pair)) > largest:
                largest, where = difference, f"{tag}, step {step}"
    if not largest:
        return True, "equal"
    word = "equal within tolerance" if largest <= tolerance else "DIFFERENT"
    return largest <= tolerance, f"{word}: by {largest:.1e} at most ({where})"


def relative(before: float | None, after: float | None) -> float:
    """Return the difference as a fraction of the larger number; infinite if one is missing."""
    if before == after:
        return 0.0
    if before is None or after is None:
        return math.inf
    return abs(before - after) / max(abs(before), abs(after))


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    one = commands.add_parser("record", help="train every recipe and keep its losses")
    one.add_argument("out", type=Path, metavar="OUT.json")
    one.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: this one)")
    one.add_argument("--jobs", type=int, default=2, help="recipes at a time")
    one.add_argument("--keep", action="store_true", help="keep data and teachers for another time")
    one.set_defaults(run=record)
    two = commands.add_parser("compare", help="hold two recordings against each other")
    two.add_argument("before", type=Path, metavar="BEFORE.json")
    two.add_argument("after", type=Path, metavar="AFTER.json")
    two.add_argument("--tolerance", type=float, default=1e-6, help="relative")
    two.set_defaults(run=compare)
    for command in (one, two):
        command.add_argument(
            "--recipe", nargs="+", default=[], metavar="NAME",
            help="resnet18, distill/resnet18, 'distill/*/scenes', ...",
        )  # fmt: skip
    args = parser.parse_args()
    if args.command is None:  # run with every other benchmark
        parser.print_help()
        return 0
    return int(args.run(args))


if __name__ == "__main__":
    raise SystemExit(main())
