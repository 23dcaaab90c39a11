"""An evaluation in its folder: tables, numbers, a PNG for each figure, and event files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from matplotlib.figure import Figure

from kd.engine.tracking import Tracker
from kd.metrics.records import Records
from kd.problems.objects.tables import Scored
from kd.report.style import figure_image, save_image
from kd.report.tables import Table
from kd.utils.io import write_text

_DPI = 160
_EVENTS = "events.out.tfevents.*"  # of an earlier evaluation


class Tabled(Protocol):
    """An evaluation that has tables."""

    def summary_tables(self) -> list[Table]:
        """What is printed."""
        ...

    def class_table(self) -> Table:
        """Class by class."""
        ...

    def all_tables(self) -> list[Table]:
        """What `table.md` holds."""
        ...

    def numbers(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        ...


class Drawn(Tabled, Protocol):
    """An evaluation that has figures as well."""

    @property
    def picture(self) -> str:
        """What files with single pictures are called, before their number."""
        ...

    @property
    def runs(self) -> Mapping[str, Records]:
        """Name -> predictions."""
        ...

    @property
    def scored(self) -> list[Scored]:
        """Metrics of the runs, and of what they are held against."""
        ...

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Every figure with its name."""
        ...


def write_evaluation(
    folder: Path,
    evaluation: Drawn,
    *,
    step: int = 0,
    pictures: Iterator[Figure] | Sequence[Figure] = (),
) -> None:
    """Write `table.md`, `metrics.json`, a PNG for each figure, and the same for TensorBoard.

    Args:
        folder: Made where it is missing; an earlier evaluation in it is replaced.
        evaluation: What is written.
        step: Of training, TensorBoard's axis.
        pictures: Figures of single pictures, `hidden_scene_0.png` and so on.

    Raises:
        UserError: The folder cannot be written.
    """
    markdown = write_tables(folder, evaluation)
    tracker = fresh_tracker(folder)
    tracker.text("evaluation/table", markdown)
    for name, figure in evaluation.figures():
        write_figure(figure, folder / f"{name}.png", tracker, f"evaluation/{name}", step)
    for number, figure in enumerate(pictures):
        file = folder / f"{evaluation.picture}_{number}.png"
        write_figure(figure, file, tracker, f"pictures/{number}", step)
    tracker.scalars(scalars(evaluation.scored, evaluation.runs), step)
    tracker.close()


def write_tables(folder: Path, evaluation: Tabled) -> str:
    """Write `table.md` and `metrics.json`; returns the former's text.

    Raises:
        UserError: The folder cannot be written.
    """
    markdown = "\n".join(table.to_markdown() for table in evaluation.all_tables())
    numbers = json.dumps(evaluation.numbers(), indent=2) + "\n"
    write_text(folder / "table.md", markdown)
    write_text(folder / "metrics.json", numbers)
    return markdown


def fresh_tracker(folder: Path) -> Tracker:
    """A tracker whose event file replaces those of earlier starts.

    Raises:
        UserError: The folder cannot be written.
    """
    for events in folder.glob(_EVENTS):
        events.unlink()
    return Tracker(folder)


def write_figure(figure: Figure, file: Path, tracker: Tracker, tag: str, step: int) -> None:
    """Draw once, which takes a second for many labels, and write to both places."""
    image = figure_image(figure, dpi=_DPI)
    save_image(image, file)
    tracker.image(tag, image, step)


def scalars(scored: Sequence[Scored], names: Collection[str]) -> dict[str, float]:
    """`eval/<metric>` as training writes them; with several runs, the run's name behind it."""
    runs = [one for one in scored if one.name in names]
    tails = {one.name: f"/{one.name}" if len(runs) > 1 else "" for one in runs}
    return {f"eval/{name}{tails[one.name]}": n for one in runs for name, n in one.values.items()}
