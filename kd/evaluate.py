"""Evaluate a finished run on its val split, or set several side by side.

    python -m kd.evaluate runs/teacher/cnn/scenes
    python -m kd.evaluate runs/teacher/cnn/scenes --data coco      # into evaluation/coco/
    python -m kd.evaluate --all runs/teacher --data scenes --out teachers

Of one run the model is asked again, and tables, figures and numbers go into RUN/evaluation.
With --all what runs have answered is read: each RUN, or every finished run below a folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kd.answers import ask_run, data_of, stored_answers
from kd.cli import run_command, set_up_logging
from kd.errors import UserError
from kd.evaluation import Evaluation, Scores, about, write_evaluation, write_tables
from kd.opened import of_objects
from kd.references import on_data, references
from kd.report.runs import check_same_objects, find_runs, named_runs
from kd.report.table import print_table


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, and write them with figures and numbers."""
    args = _parser().parse_args(argv)
    set_up_logging()
    if args.all:
        return _side_by_side(args)
    if len(args.runs) > 1:
        raise UserError(f"{len(args.runs)} runs: --all sets several side by side")
    asked = ask_run(args.runs[0], args.data, args.settings)
    if asked is None:  # another process writes
        return 0
    folder = args.out or asked.folder
    if args.data:  # what a run answers about its own data is in its folder already
        asked.save_predictions()
    evaluation: Evaluation | Scores
    if asked.records is None:
        title = f"{args.runs[0]} on {asked.data.section.name} val"
        evaluation = Scores(title, asked.data, asked.metric)
        _print(evaluation, per_class=args.per_class)
        write_tables(folder, evaluation)
    else:
        data = of_objects(asked.data)
        title = f"{args.runs[0]} on {about(data, asked.records)}"
        known = references(data, asked.records)
        evaluation = Evaluation(title, data, {asked.name: asked.records}, known)
        _print(evaluation, per_class=args.per_class)
        write_evaluation(folder, evaluation, step=asked.step, pictures=asked.pictures())
    sys.stdout.write(f"tables, figures and numbers: {folder}\n")
    return 0


def _side_by_side(args: argparse.Namespace) -> int:
    runs = stored_answers(find_runs(args.runs), args.data)
    check_same_objects(runs)
    data = of_objects(data_of(runs[0], args.data, args.settings))
    named = named_runs(runs)
    records = {name: on_data(data, run.records, str(run.folder)) for name, run in named.items()}
    first = next(iter(records.values()))
    evaluation = Evaluation(about(data, first), data, records, references(data, first))
    _print(evaluation, per_class=args.per_class)
    if args.out:
        write_evaluation(args.out, evaluation)
        sys.stdout.write(f"tables, figures and numbers: {args.out}\n")
    return 0


def _print(evaluation: Evaluation | Scores, *, per_class: bool) -> None:
    for table in evaluation.summary_tables():
        print_table(table)
    if per_class:
        print_table(evaluation.class_table())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    runs = "a teacher's or one arm's run folder; with --all also folders that hold some"
    add("runs", nargs="+", type=Path, metavar="RUN", help=runs)
    add("--all", action="store_true", help="finished runs of one data set side by side")
    add("--data", metavar="NAME", help="another data set with the same classes")
    add("--set", action="append", default=[], dest="settings", metavar="data.a=value",
        help="change a value of the data set")  # fmt: skip
    add("--per-class", action="store_true", help="print every class, too")
    out = "where files go (default: RUN/evaluation; with --all: none)"
    add("--out", "--figures", type=Path, metavar="DIR", dest="out", help=out)
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
