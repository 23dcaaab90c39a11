"""Objects pasted where they belong and where they do not, to see context help and harm.

    python -m kd.data.out_of_context make --data coco --out datasets/coco_context
    python -m kd.data.out_of_context check datasets/coco_context
    python -m kd.data.out_of_context report datasets/coco_context --runs RUN [RUN ...]

`make` cuts whole objects of a split out along their outlines and pastes each into a scene where
the co-occurrence of objects in the train images (no teacher has a say) makes it improbable, and
into one where it is probable: same object, same size, same height in the picture, and the same
scenes in both sets. Each of `in/`, `out/` and `original/` (the same objects unpasted) is a data set
in COCO's layout; only the object with `"asked": true` is scored. `check` measures whether the seams
give the pastes away, `report` asks students, teachers and detectors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kd.cli import run_command, set_up_logging
from kd.config.reader import objects_config
from kd.context.pasting.make import Wanted, check_seams, make_sets
from kd.context.pasting.report import report_detections, report_runs
from kd.errors import UserError, at_least
from kd.problems.objects.data import open_objects
from kd.report.tables import print_table


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the three."""
    args = _parser().parse_args(argv)
    set_up_logging()
    {"make": _make, "check": _check, "report": _report}[args.action](args)
    return 0


def _make(args: argparse.Namespace) -> None:
    at_least("make", **{"--count": (args.count, 1), "--margin": (args.margin, 0.0),
                        "--scenes": (args.scenes, 2), "--seed": (args.seed, 0)})  # fmt: skip
    if not 0 <= args.harmony <= 1:
        raise UserError(f"--harmony: got {args.harmony}, expected 0 to 1")
    if not 0 <= args.min_share < args.max_share <= 1:
        raise UserError(f"--min-share {args.min_share} is not below --max-share {args.max_share}")
    wanted = Wanted(**{name: getattr(args, name) for name in Wanted.__dataclass_fields__})
    about = make_sets(open_objects(objects_config(args.data, args.settings)), args.out, wanted)
    lift = about["mean_log_lift"]
    sys.stdout.write(
        f"{args.out}: {about['pairs']} objects of {about['classes']} classes in {about['scenes']} "
        f"scenes\nlog p(class | scene) - log p(class), mean: in {lift['in']:+.2f}, "
        f"out {lift['out']:+.2f}; some are shown in {args.out / 'pairs.png'}\n"
    )


def _check(args: argparse.Namespace) -> None:
    for one, other, ring, outline in check_seams(args.folder):
        sys.stdout.write(
            f"{one} against {other}: AUC {ring.auc:.3f} (standard error {ring.error:.3f}) from the "
            f"ring around the outline, {outline.auc:.3f} ({outline.error:.3f}) given the outline\n"
        )
    sys.stdout.write(".5: cannot be told apart by the seam\n")


def _report(args: argparse.Namespace) -> None:
    if not args.runs and not args.detections:
        raise UserError("report: name runs with --runs, or results files with --detections")
    if args.runs:
        for table in report_runs(args.folder, args.runs, args.settings, variants=args.variants):
            print_table(table)
    if args.detections:
        print_table(report_detections(args.folder, *args.detections))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd.data.out_of_context", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    actions = parser.add_subparsers(dest="action", required=True)
    make = actions.add_parser("make", help="choose pairs and write the sets")
    make.add_argument("--data", required=True, metavar="NAME", help="configs/data/NAME.yaml")
    make.add_argument("--set", action="append", default=[], dest="settings",
                      metavar="data.a=value", help="change a value of the data set")  # fmt: skip
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    make.add_argument("--split", choices=("train", "val"), default="val")
    for name, kind, text in (
        ("count", int, "pairs"),
        ("margin", float, "nats above and below the class's share"),
        ("min_share", float, "smallest box, as a share of the picture"),
        ("max_share", float, "largest"),
        ("scenes", int, "most scenes tried"),
        ("harmony", float, "how far an object takes on its new scene's light, 0 to 1"),
        ("seed", int, "of everything random"),
    ):
        default = getattr(Wanted, name)
        make.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default,
                          metavar="N", help=f"{text} (default {default})")  # fmt: skip
    check = actions.add_parser("check", help="whether seams alone tell the sets apart")
    check.add_argument("folder", type=Path, metavar="SET")
    report = actions.add_parser("report", help="accuracy in and out of context")
    report.add_argument("folder", type=Path, metavar="SET")
    report.add_argument("--runs", nargs="+", type=Path, default=[], metavar="RUN",
                        help="teachers, seed<k>/<variant>, or whole distillations")  # fmt: skip
    report.add_argument("--variants", nargs="+", metavar="VARIANT",
                        help="of distillations, only these (default: all)")  # fmt: skip
    report.add_argument("--set", action="append", default=[], dest="settings",
                        metavar="data.a=value",
                        help="change a value of the runs' data set")  # fmt: skip
    report.add_argument("--detections", nargs=2, type=Path, metavar=("IN", "OUT"),
                        help="a detector's results on both sets, in COCO's format")  # fmt: skip
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
