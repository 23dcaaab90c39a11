"""Evaluate a finished run on its val split, or set several side by side.

    python -m kd.evaluate runs/teacher/cnn/scenes
    python -m kd.evaluate runs/teacher/cnn/scenes --data coco
    python -m kd.evaluate --all runs/teacher --data scenes --out teachers
    python -m kd.evaluate results.json --annotations instances_val.json --out DIR     # any detector

Of one run the model is evaluated again; tables and figures go to RUN/evaluation.
With --all, stored predictions are read: of each RUN, or of every finished run below a folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kd.cli import numbers, run_command, set_up_logging
from kd.errors import UserError
from kd.evaluation.predict import (
    AnyEvaluation,
    Predictions,
    evaluation_of,
    predict_run,
    side_by_side,
    stored_predictions,
)
from kd.evaluation.write import write_evaluation, write_tables
from kd.problems.detection.evaluation import results_evaluation
from kd.problems.objects.evaluation import Scores
from kd.report.tables import print_table
from kd.runs.read import find_runs


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, and write them with figures and numbers."""
    args = _parser().parse_args(argv)
    set_up_logging()
    scales = numbers("--scales", args.scales)
    if args.annotations:
        return _show(results_evaluation(args.annotations, args.runs), args, args.out, None)
    if args.all:
        if scales or args.flip:
            raise UserError("--scales, --flip: --all reads what runs have answered, asks none")
        runs = stored_predictions(find_runs(args.runs), args.data)
        return _show(side_by_side(runs, args.data, args.settings), args, args.out, None)
    run, *more = args.runs
    if more:
        raise UserError(f"{len(args.runs)} runs: --all sets several side by side")
    asked = predict_run(run, args.data, args.settings, scales=scales, mirror=args.flip)
    if asked is None:  # another process writes
        return 0
    if not asked.of_training:
        asked.save()
    return _show(evaluation_of(asked, run), args, args.out or asked.folder, asked)


def _show(
    shown: AnyEvaluation, args: argparse.Namespace, folder: Path | None, asked: Predictions | None
) -> int:
    """Print, and write where a folder is named."""
    for table in shown.summary_tables():
        print_table(table)
    if args.per_class:
        print_table(shown.class_table())
    if folder is None:
        return 0
    if isinstance(shown, Scores):
        write_tables(folder, shown)
    elif asked is None:
        write_evaluation(folder, shown)
    else:
        write_evaluation(folder, shown, step=asked.step, pictures=asked.pictures())
    sys.stdout.write(f"tables, figures and numbers: {folder}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder, or with --all one of several"
    )
    add("--all", action="store_true", help="finished runs of one data set side by side")
    add("--data", metavar="NAME", help="another data set with the same classes")
    add("--set", action="append", default=[], dest="settings", metavar="data.a=value",
        help="change a value of the data set")  # fmt: skip
    add("--per-class", action="store_true", help="print every class, too")
    add("--annotations", type=Path, metavar="JSON", help="ground truth of COCO results files")
    add("--scales", metavar="A,B", help="label maps: average over these scales: 0.75,1,1.25")
    add("--flip", action="store_true", help="label maps: average over mirrored pictures, too")
    out = "output folder (default: RUN/evaluation; with --all and of results files: none)"
    add("--out", type=Path, metavar="DIR", help=out)
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
