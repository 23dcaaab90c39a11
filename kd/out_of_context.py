"""Paste objects into scenes where they are probable and improbable: does context help or harm?

    python -m kd.out_of_context make --data coco --out datasets/coco_context
    python -m kd.out_of_context check datasets/coco_context
    python -m kd.out_of_context report datasets/coco_context --runs RUN [RUN ...]

`make` cuts whole objects out and pastes each, at the same size and height, into a scene where the
co-occurrence statistics of the train images make it improbable, and into one where it is probable.
`in/`, `out/` and `original/` (the objects unpasted) are COCO-format datasets of which objects with
`"scored": true` are evaluated. `check` measures whether seams reveal the pastes; `report`
evaluates students, teachers and detectors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from kd.cli import add_list, run_command, set_up_logging
from kd.context.pasting import PasteOptions
from kd.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `make`, `check` or `report`."""
    args = _parser().parse_args(argv)
    set_up_logging()
    {"make": _make, "check": _check, "report": _report}[args.action](args)
    return 0


def _make(args: argparse.Namespace) -> None:
    options = PasteOptions(**{name: getattr(args, name) for name in vars(PasteOptions())})
    from kd.context.pasting.make import make_sets
    from kd.problems.context import object_scenes
    from kd.problems.recipes import data_config
    from kd.runs.build import open_data

    data = open_data(data_config(args.data, args.settings, needs="context"))
    about = make_sets(object_scenes(data), args.out, options)
    lift = about["mean_log_lift"]
    sys.stdout.write(
        f"{args.out}: {about['pairs']} objects of {about['classes']} classes in {about['scenes']} "
        f"scenes\nmean of log p(class | scene) - log p(class): in {lift['in']:+.2f}, "
        f"out {lift['out']:+.2f}; examples: {args.out / 'pairs.png'}\n"
    )


def _check(args: argparse.Namespace) -> None:
    from kd.context.pasting.make import check_seams

    sys.stdout.writelines(f"{line}\n" for line in check_seams(args.folder))


def _report(args: argparse.Namespace) -> None:
    if not args.runs and not args.detections:
        raise UserError("report: expected runs (--runs) or results files (--detections)")
    from kd.evaluation.out_of_context import report_detections, report_runs
    from kd.report.tables import print_table

    if args.runs:
        for table in report_runs(args.folder, args.runs, args.settings, variants=args.variants):
            print_table(table)
    if args.detections:
        print_table(report_detections(args.folder, *args.detections))


def _parser() -> argparse.ArgumentParser:
    name, raw = "python -m kd.out_of_context", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=raw)
    actions = parser.add_subparsers(dest="action", required=True)
    make = actions.add_parser("make", help="choose pairs and write the datasets")
    make.add_argument("--data", required=True, metavar="NAME", help="configs/data/NAME.yaml")
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    add_list(make, "data")
    make.add_argument("--split", choices=("train", "val"), default="val")
    for option in fields(PasteOptions)[1:]:
        make.add_argument(f"--{option.name.replace('_', '-')}", type=type(option.default),
                          default=option.default, metavar="N", **option.metadata)  # fmt: skip
    check = actions.add_parser("check", help="measure whether seams reveal the pastes")
    report = actions.add_parser("report", help="accuracy in and out of context")
    check.add_argument("folder", type=Path, metavar="DIR")
    report.add_argument("folder", type=Path, metavar="DIR")
    report.add_argument("--runs", nargs="+", type=Path, default=[], metavar="RUN",
                        help="teachers, seed<k>/<variant> folders, or distillations")  # fmt: skip
    report.add_argument("--variants", nargs="+", metavar="NAME", help="only these (default: all)")
    report.add_argument("--detections", nargs=2, type=Path, metavar=("IN", "OUT"),
                        help="COCO results of a detector on in/ and out/")  # fmt: skip
    for action in (make, report):
        action.add_argument("--set", action="append", default=[], dest="settings",
                            metavar="data.a=value", help="change the dataset")  # fmt: skip
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
