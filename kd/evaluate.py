"""Evaluate a finished run on its val split, or compare several.

    python -m kd.evaluate runs/teacher/cnn/scenes
    python -m kd.evaluate runs/teacher/cnn/scenes --data coco
    python -m kd.evaluate --all runs/teacher --data scenes --out teachers
    python -m kd.evaluate results.json --annotations instances_val.json --out DIR     # any detector

One run's model is evaluated again; tables and figures go to RUN/evaluation.
With --all, stored predictions of each RUN, or of every finished run below a folder, are read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd.cli import add_list, numbers, run_command, set_up_logging
from kd.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, and write them with figures and numbers."""
    args = _parser().parse_args(argv)
    set_up_logging()
    scales = numbers("--scales", args.scales)
    if args.all and (scales or args.flip):
        raise UserError("--scales, --flip: --all reads stored predictions, it runs no model")
    if len(args.runs) > 1 and not (args.all or args.annotations):
        raise UserError(f"{len(args.runs)} runs: --all compares several")
    return _run(args, scales)


def _run(args: argparse.Namespace, scales: Sequence[float]) -> int:
    # Torch takes seconds to import: not before the arguments are checked.
    from kd.evaluation.predict import predict_run, results_files, side_by_side, stored_predictions
    from kd.evaluation.write import write_evaluation
    from kd.report.tables import print_table
    from kd.runs.read import find_runs

    images: Iterable[Figure] = ()
    folder, step = args.out, 0
    if args.annotations:
        evaluation = results_files(args.annotations, args.runs)
    elif args.all:
        runs = stored_predictions(find_runs(args.runs), args.data)
        evaluation = side_by_side(runs, args.data, args.settings)
    else:
        [run] = args.runs
        predictions = predict_run(run, args.data, args.settings, scales=scales, mirror=args.flip)
        if predictions is None:  # another process writes
            return 0
        if not predictions.of_training:
            predictions.save()
        evaluation, folder = predictions.evaluation(run), folder or predictions.folder
        step, images = predictions.step, predictions.images(predictions.records)
    for table in evaluation.summary_tables():
        print_table(table)
    if args.per_class:
        print_table(evaluation.class_table())
    if folder is not None:
        write_evaluation(folder, evaluation, step=step, images=images)
        sys.stdout.write(f"tables, figures and numbers: {folder}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folder; with --all several")
    add("--all", action="store_true", help="compare finished runs of one dataset")
    add("--data", metavar="NAME", help="another dataset with the same classes")
    add("--set", action="append", default=[], dest="settings", metavar="data.a=value",
        help="override a value of the dataset")  # fmt: skip
    add("--per-class", action="store_true", help="also print every class")
    add("--annotations", type=Path, metavar="JSON", help="COCO ground truth; RUN is a results file")
    add("--scales", metavar="A,B", help="label maps: average over scales, e.g. 0.75,1,1.25")
    add("--flip", action="store_true", help="label maps: also average over mirrored images")
    out = "output folder (default: RUN/evaluation; none with --all or --annotations)"
    add("--out", type=Path, metavar="DIR", help=out)
    add_list(parser, "data", "metrics")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
