"""Show which objects a context teacher expects in parts of an image: `python -m kd.imagine IMAGE`.

Each region is hidden in turn, and the most probable classes are printed and drawn. With --class, a
hidden region slides over the image instead, and a heat map shows where the class is expected.
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
    """Process the images one after the other; the exit status is 2 if any of them failed."""
    args = _parser().parse_args(argv)
    set_up_logging()
    random = 1 if args.random is None else args.random
    at_least("kd.imagine", **{"--top": (args.top, 1), "--random": (random, 1)})
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    from kd.context.photo import KnownObjects, open_photograph
    from kd.context.session import Imagination
    from kd.runs.load_teacher import latest_teacher
    from kd.utils.io import output_names

    teacher = args.teacher
    if teacher is None:
        teacher = latest_teacher()
        _log.info("using teacher %s, the latest one", teacher)
    imagination = Imagination.open(teacher, args)
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
                        help="annotations of the images, found by file name, for teachers that "
                        "read other objects; those covered by a region are left out")  # fmt: skip
    what = parser.add_argument_group("regions, hidden one at a time; options are repeatable")
    what.add_argument("--box", action="append", default=[], metavar="x1,y1,x2,y2",
                      help="corners in pixels")  # fmt: skip
    what.add_argument("--polygon", action="append", default=[], metavar="x1,y1,x2,y2,x3,y3,...",
                      help="corners in pixels")  # fmt: skip
    what.add_argument("--mask", action="append", default=[], type=Path, metavar="FILE",
                      help="image of the same size whose non-zero pixels are hidden")  # fmt: skip
    what.add_argument("--random", type=int, metavar="N",
                      help="N random boxes, of 1 %% of the image up to the largest object in the "
                      "teacher's training (default: 3 if no region is given)")  # fmt: skip
    what.add_argument("--seed", type=int, default=0, help="seed of the random boxes (default: 0)")
    what.add_argument("--top", type=int, default=10, help="classes to list (default: 10)")
    where = parser.add_argument_group("heat maps of where a class is expected")
    where.add_argument("--class", action="append", default=[], dest="classes", metavar="NAME",
                       help="draw a heat map of this class; repeatable")  # fmt: skip
    where.add_argument("--region", nargs="+", default=["0.2x0.2", "0.4x0.4"], metavar="WxH",
                       help="sizes of the sliding region as fractions of width and height; the "
                       "mean over the sizes is drawn (default: 0.2x0.2 0.4x0.4)")  # fmt: skip
    where.add_argument("--stride", type=float, default=0.5,
                       help="step as a fraction of the region's sides (default: 0.5)")  # fmt: skip
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
