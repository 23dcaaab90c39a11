"""Print and draw what a context teacher expects in parts of an image: `python -m kd.imagine IMAGE`.

Each region is hidden by itself. With --class a hidden region slides over the image instead, and a
heat map shows where the class is expected.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from kd.cli import run_command, set_up_logging
from kd.errors import UserError, at_least

_log = logging.getLogger("kd")


def main(argv: Sequence[str] | None = None) -> int:
    """Process the images one after the other; exit status 2 if any failed."""
    args = _parser().parse_args(argv)
    set_up_logging()
    random = 1 if args.random is None else args.random
    at_least("kd.imagine", **{"--top": (args.top, 1), "--random": (random, 1)})
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    from kd.context.photo import KnownObjects, open_photograph
    from kd.context.session import Imagination, output_names, read_options
    from kd.runs.load_teacher import latest_teacher

    teacher = args.teacher
    if teacher is None:
        teacher = latest_teacher()
        _log.info("%s: using this teacher", teacher)
    imagination = Imagination.open(teacher, read_options(args), args.out, top=args.top)
    known = None
    if args.annotations is not None:
        known = KnownObjects(args.annotations, imagination.names)
    imagination.check_annotations(known is not None)
    failed = 0
    for path, output in zip(args.images, output_names(args.images), strict=True):
        try:
            photo = open_photograph(path, imagination.size, known)
            sys.stdout.write(imagination(photo, output))
        except UserError as error:
            failed += 1
            for line in str(error).splitlines():
                _log.error("error: %s", line)
    if failed and len(args.images) > 1:
        _log.error("%d of %d images failed", failed, len(args.images))
    return 2 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd.imagine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="JPEG, PNG, ...")
    parser.add_argument("--teacher", type=Path, metavar="RUN",
                        help="a context teacher's run folder or checkpoint (default: the latest "
                        "in runs/teacher)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/imagine"), metavar="DIR",
                        help="output folder (default: %(default)s)")  # fmt: skip
    parser.add_argument("--annotations", type=Path, metavar="COCO.json",
                        help="objects that the teacher may know, by the images' file names; "
                        "those that a region covers stay hidden")  # fmt: skip
    what = parser.add_argument_group("regions, each hidden by itself; repeatable")
    what.add_argument("--box", action="append", default=[], metavar="x1,y1,x2,y2", help="pixels")
    what.add_argument("--polygon", action="append", default=[], metavar="x1,y1,x2,y2,x3,y3,...",
                      help="corners in pixels")  # fmt: skip
    what.add_argument("--mask", action="append", default=[], type=Path, metavar="FILE",
                      help="image of the same size, not 0 where hidden")  # fmt: skip
    what.add_argument("--random", type=int, metavar="N", 
                      help="N random boxes, of 1 %% of the image up to the largest object of the "
                      "teacher's training (default: 3 if nothing else is given)")  # fmt: skip
    what.add_argument("--seed", type=int, default=0, help="of the random ones (default: 0)")
    what.add_argument("--top", type=int, default=10, help="classes to list (default: 10)")
    where = parser.add_argument_group("where a class is expected")
    where.add_argument("--class", action="append", default=[], dest="classes", metavar="NAME",
                       help="draw a heat map of this class; repeatable")  # fmt: skip
    where.add_argument("--region", nargs="+", default=["0.2x0.2", "0.4x0.4"], metavar="WxH",
                       help="sizes of the sliding region, fractions of width and height; the "
                       "mean over them is drawn (default: 0.2x0.2 0.4x0.4)")  # fmt: skip
    where.add_argument("--stride", type=float, default=0.5,
                       help="step, as a fraction of its sides (default: 0.5)")  # fmt: skip
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
