"""Write an evaluation: tables, numbers, figures and an event file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from kd.engine.tracking import Tracker
from kd.problems.results import Evaluation
from kd.report.style import figure_image, save_image
from kd.utils.io import write_text

_DPI = 160
_EVENTS = "events.out.tfevents.*"  # of an earlier evaluation


def write_evaluation(
    folder: Path, evaluation: Evaluation, *, step: int = 0, images: Iterable[Figure] = ()
) -> None:
    """Write `table.md`, `metrics.json`, a PNG for each figure, and the same for TensorBoard.

    Args:
        folder: Created if missing; an earlier evaluation in it is replaced.
        evaluation: Tables, figures and numbers.
        step: Training step, TensorBoard's axis.
        images: Figures of single images, written as `hidden_scene_0.png` and so on.
    """
    markdown = "\n".join(table.to_markdown() for table in evaluation.all_tables())
    numbers = json.dumps(evaluation.numbers(), indent=2) + "\n"
    write_text(folder / "table.md", markdown)
    write_text(folder / "metrics.json", numbers)
    tracker = fresh_tracker(folder)
    tracker.text("evaluation/table", markdown)
    for name, figure in evaluation.figures():
        write_figure(figure, folder / f"{name}.png", tracker, f"evaluation/{name}", step)
    for number, figure in enumerate(images):
        file = folder / f"{evaluation.results.image_name}_{number}.png"
        write_figure(figure, file, tracker, f"images/{number}", step)
    runs = [one for one in evaluation.scored if one.name in evaluation.runs]
    for one in runs:
        tail = f"/{one.name}" if len(runs) > 1 else ""
        tracker.scalars({f"eval/{name}{tail}": n for name, n in one.values.items()}, step)
    tracker.close()


def fresh_tracker(folder: Path) -> Tracker:
    """Open a tracker, deleting the event files of earlier ones."""
    for events in folder.glob(_EVENTS):
        events.unlink()
    return Tracker(folder)


def write_figure(figure: Figure, file: Path, tracker: Tracker, tag: str, step: int) -> None:
    """Write a figure to a file and to TensorBoard; rendering takes up to a second, so only once."""
    image = figure_image(figure, dpi=_DPI)
    save_image(image, file)
    tracker.image(tag, image, step)
