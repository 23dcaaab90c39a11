"""Count the files that an image and a distillation term pass through, as real commands run.

Two paths through the packages kd, teachers and students:

    image   from an image on disk to a teacher's loss: one batch of `kd.train_teacher`, from the
            first call of `fit` until its first `train_step` returns
    term    from a term in a recipe to its gradient: the functions of `kd.distill` that process the
            term, from the reader of the recipe to the backward pass (`TERM_STATIONS`)

A file is entered when one of its functions is called for the first time. A return is a call from a
file back into one that was entered earlier; each pair of files counts once.

With --whole, both commands are followed from their first line to the end of the first step,
including opening the dataset, the teacher's cache and building the models.

    python benchmarks/tour.py [--files] [--whole]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file, too
PACKAGES = tuple(str(ROOT / name) + os.sep for name in ("kd", "teachers", "students"))

SETTINGS = ("data.generate.train=16", "data.generate.val=8", "data.workers=0", "train.epochs=1",
            "train.batch_size=8")  # fmt: skip
SCENES = ["--data", "scenes", *(word for one in SETTINGS for word in ("--set", one))]
# Functions that process a term, by file and name; the functions they call count too.
TERM_STATIONS = {
    ("kd/problems/recipes.py", "load_recipe"),
    ("kd/distillation/terms.py", "build_term"),
    ("kd/distillation/student.py", "adapt_student"),
    ("kd/distillation/terms.py", "distillation_losses"),
    ("kd/distillation/terms.py", "weighted_sum"),
}


class Trip:
    """Records first calls of functions while it is active.

    Args:
        begins: Whether a call begins a recorded stretch.
        ends: Whether the return of a call ends the trip.
    """

    def __init__(
        self, begins: Callable[[CodeType], bool], ends: Callable[[CodeType], bool]
    ) -> None:
        self._begins, self._ends = begins, ends
        self._inside = 0  # active calls of functions that begin a stretch
        self._importing = 0  # modules being imported; calls during an import do not count
        self._over = False
        self.calls: dict[tuple[str, str], str] = {}  # caller's and called file: first function

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Handle an event of `sys.setprofile`."""
        if self._over or event not in ("call", "return"):
            return
        code = frame.f_code
        if code.co_name == "<module>":
            self._importing += 1 if event == "call" else -1
        if self._importing > 0 or not code.co_filename.startswith(PACKAGES):
            return
        if event == "return":
            self._inside -= self._begins(code) and self._inside > 0
            self._over = self._ends(code) and bool(self.calls)
            return
        self._inside += self._begins(code)
        if self._inside:
            self.calls.setdefault((caller_of(frame), file_of(code)), code.co_name)

    @property
    def files(self) -> list[str]:
        """Return the files in the order in which they were entered."""
        return list(dict.fromkeys(file for _, file in self.calls))

    @property
    def returns(self) -> list[str]:
        """Return the calls from a file back into one that was entered earlier."""
        place = {file: number for number, file in enumerate(self.files)}
        return [
            f"{caller} -> {file}: {function}"
            for (caller, file), function in self.calls.items()
            if place[file] < place.get(caller, -1)
        ]


def file_of(code: CodeType) -> str:
    """Return a function's file, relative to the project's root."""
    return Path(code.co_filename).relative_to(ROOT).as_posix()


def caller_of(frame: FrameType) -> str:
    """Return the file of the packages that a call comes from, or ""."""
    above = frame.f_back
    while above is not None and not above.f_code.co_filename.startswith(PACKAGES):
        above = above.f_back
    return "" if above is None else file_of(above.f_code)


def station(code: CodeType) -> bool:
    """Return whether a function processes the term."""
    return (file_of(code), code.co_name) in TERM_STATIONS


def is_named(file: str, name: str) -> Callable[[CodeType], bool]:
    """Return a test for one function."""
    return lambda code: code.co_name == name and file_of(code) == file


def travel(trip: Trip, main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> None:
    """Run a command and record its trip.

    Raises:
        RuntimeError: The command failed.
    """
    sys.setprofile(trip)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            status = main(arguments)
    finally:
        sys.setprofile(None)
    if status:
        raise RuntimeError(f"{main.__module__} {' '.join(arguments)} ended with {status}")


def main() -> None:
    """Record both trips and print their lengths."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", action="store_true", help="print each file and return")
    parser.add_argument("--whole", action="store_true", help="follow the whole commands")
    arguments = parser.parse_args()
    from kd import distill, train_teacher

    step = is_named("kd/engine/loop.py", "train_step")
    image = Trip(is_named("kd/engine/loop.py", "fit"), step)
    term = Trip(station, step)
    if arguments.whole:
        image = Trip(is_named("kd/train_teacher.py", "main"), step)
        term = Trip(is_named("kd/distill.py", "main"), step)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        travel(image, train_teacher.main, ["--teacher", "cnn", *SCENES])
        travel(term, distill.main,
               ["--student", "resnet18", *SCENES, "--set", "variants=[distilled]",
                "--set", "seeds=[0]"])  # fmt: skip
        os.chdir(ROOT)
    for name, trip in {"image to loss": image, "term to gradient": term}.items():
        print(f"{name}: {len(trip.files)} files, {len(trip.returns)} returns")
        if arguments.files:
            print("".join(f"  {file}\n" for file in trip.files), end="")
            print("".join(f"  back: {call}\n" for call in trip.returns), end="")


if __name__ == "__main__":
    main()
