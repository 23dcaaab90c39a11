"""Paste objects into scenes where they are probable and improbable: does context help or harm?

    python -m kd.out_of_context make --data coco --out datasets/coco_context
    python -m kd.out_of_context check datasets/coco_context
    python -m kd.out_of_context report datasets/coco_context --runs RUN [RUN ...]

`make` cuts whole objects of a split out along their outlines and pastes each into a scene where
the co-occurrence statistics of the train images (no teacher is involved) make it improbable, and
into one where it is probable: same object, size and height in the image, and the same scenes in
both. `in/`, `out/` and `original/` (the same objects unpasted) are COCO-format datasets in which
only objects with `"scored": true` are evaluated. `check` measures whether seams give the pastes
away; `report` evaluates students, teachers and detectors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kd.cli import run_command, set_up_logging
from kd.context.pasting import PasteOptions
from kd.errors import UserError, at_least


def main(argv: Sequence[str] | None = None) -> int:
    """Run `make`, `check` or `report`."""
    args = _parser().parse_args(argv)
    set_up_logging()
    {"make": _make, "check": _check, "report": _report}[args.action](args)
    return 0


def _make(args: argparse.Namespace) -> None:
    at_least("make", **{"--count": (args.count, 1), "--margin": (args.margin, 0.0),
                        "--scenes": (args.scenes, 2), "--seed": (args.seed, 0)})  # fmt: skip
    if not 0 <= args.harmony <= 1:
        raise UserError(f"--harmony: got {args.harmony}, expected 0 to 1")
    low, high = args.min_fraction, args.max_fraction
    if not 0 <= low < high <= 1:
        raise UserError(f"--min-fraction {low} must be below --max-fraction {high}, both in 0..1")
    from kd.context.pasting.make import make_sets
    from kd.problems.context import object_scenes
    from kd.problems.recipes import data_config
    from kd.runs.build import open_data

    options = PasteOptions(**{name: getattr(args, name) for name in vars(PasteOptions())})
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

    for one, other, ring, outline in check_seams(args.folder):
        sys.stdout.write(
            f"{one} vs. {other}: AUC {ring.auc:.3f} (standard error {ring.error:.3f}) from the "
            f"ring around the outline, {outline.auc:.3f} ({outline.error:.3f}) given the outline\n"
        )
    sys.stdout.write("An AUC of 0.5 means that seams do not give the pastes away.\n")


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
    parser = argparse.ArgumentParser(
        prog="python -m kd.out_of_context", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    actions = parser.add_subparsers(dest="action", required=True)
    make = actions.add_parser("make", help="choose pairs and write the datasets")
    make.add_argument("--data", required=True, metavar="NAME", help="configs/data/NAME.yaml")
    make.add_argument("--set", action="append", default=[], dest="settings",
                      metavar="data.a=value", help="change a value of the dataset")  # fmt: skip
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    make.add_argument("--split", choices=("train", "val"), default="val")
    for name, kind, text in (
        ("count", int, "number of pairs"),
        ("margin", float, "nats above and below the class's prior"),
        ("min_fraction", float, "smallest box area, as a fraction of the image"),
        ("max_fraction", float, "largest box area"),
        ("scenes", int, "largest number of scenes to try"),
        ("harmony", float, "how far colours are moved towards the new scene's, 0 to 1"),
        ("seed", int, "random seed"),
    ):
        default = getattr(PasteOptions, name)
        make.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default,
                          metavar="N", help=f"{text} (default {default})")  # fmt: skip
    check = actions.add_parser("check", help="measure whether seams reveal the pastes")
    check.add_argument("folder", type=Path, metavar="DIR")
    report = actions.add_parser("report", help="accuracy in and out of context")
    report.add_argument("folder", type=Path, metavar="DIR")
    report.add_argument("--runs", nargs="+", type=Path, default=[], metavar="RUN",
                        help="teachers, seed<k>/<variant> folders, or distillations")  # fmt: skip
    report.add_argument("--variants", nargs="+", metavar="VARIANT",
                        help="of distillations, only these (default: all)")  # fmt: skip
    report.add_argument("--set", action="append", default=[], dest="settings",
                        metavar="data.a=value",
                        help="change a value of the runs' dataset")  # fmt: skip
    report.add_argument("--detections", nargs=2, type=Path, metavar=("IN", "OUT"),
                        help="a detector's COCO results on in/ and out/")  # fmt: skip
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
