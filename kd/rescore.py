"""Rescore a detector's results by how well each box fits its context.

A context teacher predicts each box's class from the rest of the image. The prediction's weight is
fitted to AP by cross-validation; with --fit-*, on another split. Without a clear gain, scores stay
unchanged, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kd.cli import run_command, set_up_logging
from kd.errors import UserError, at_least


def main(argv: Sequence[str] | None = None) -> int:
    """Query the teacher, fit, rescore, and report the change."""
    args = _parser().parse_args(argv)
    at_least("kd.rescore", **{"--folds": (args.folds, 2), "--most": (args.most, 1),
                              "--resamples": (args.resamples, 0)})  # fmt: skip
    fit = (args.fit_detections, args.fit_annotations, args.fit_images)
    if any(fit) and not all(fit):
        raise UserError("--fit-detections, --fit-annotations, --fit-images: give all three or none")
    set_up_logging()
    return _run(args, fit)


def _run(args: argparse.Namespace, fit: Sequence[Path]) -> int:
    from kd.context import rescore_report as report
    from kd.context.detections import QueryOptions
    from kd.context.rescore import Split, cross_fitted, fitted_elsewhere, settings_of
    from kd.formats.coco_results import write_detections
    from kd.report.style import save_figure
    from kd.report.tables import print_table
    from kd.runs.build import make_accelerator
    from kd.utils.io import write_text

    device = make_accelerator("fp32").device
    options = QueryOptions(most=args.most, same_place=args.same_place, sure=args.sure)

    def split(detections: Path, annotations: Path, images: Path) -> Split:
        return Split.open(args.teacher, detections, annotations, images, args.out.parent,
                          options=options, device=device, shuffled=args.shuffled)  # fmt: skip

    here = split(args.detections, args.annotations, args.images)
    how = (settings_of(args.rule), args.folds, args.per_class)
    result = fitted_elsewhere(here, split(*fit), *how) if all(fit) else cross_fitted(here, *how)
    write_detections(args.out, here.found.entries, result.scores.tolist())
    names = here.truth.class_names
    changes = report.changes_of(here.meter, here.known.scores, result.scores, names, args.resamples)
    title = f"{args.detections.name}: {len(names)} classes, context from {args.teacher}"
    print_table(report.change_table(*changes, title, result.notes(names)))
    fitted = [one.setting for one in result.fits]
    curves = report.curves_of(here.meter, here.known, fitted)
    content = report.changes_json(*changes) | result.to_json(names)
    content |= {"a": report.CURVE, "curves": curves}
    metrics = args.out.with_name(f"{args.out.stem}-metrics.json")
    write_text(metrics, json.dumps(content, indent=2) + "\n")
    if args.figures:
        save_figure(report.curve_figure(curves, fitted, title), args.figures / "strength.png")
    sys.stdout.write(f"{args.out}, {metrics}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kd.rescore", description=__doc__)
    add = parser.add_argument
    add("--teacher", required=True, type=Path, help="a context teacher's run folder or checkpoint")
    add("--detections", required=True, type=Path, help="COCO results to rescore, scores in 0..1")
    add("--annotations", required=True, type=Path, help="COCO JSON of the same images")
    add("--images", required=True, type=Path, help="folder of these images")
    add("--out", required=True, type=Path, help="file to write; predictions are cached beside it")
    add("--fit-detections", type=Path, help="results on other images, to fit the parameters on")
    add("--fit-annotations", type=Path, help="COCO JSON of those other images")
    add("--fit-images", type=Path, help="folder of those other images")
    add("--folds", type=int, default=5, metavar="N", help="cross-validation folds (default: 5)")
    add("--rule", choices=("auto", "plain", "competing"), default="auto",
        help="plain: add a * evidence to a score's logit; competing: evidence also counts against "
        "the box's other classes; auto: the better in cross-validation (default)")  # fmt: skip
    add("--per-class", action="store_true", help="fit each class of 20 objects or more by itself")
    add("--most", type=int, default=100, metavar="N", help="queries per image (default: 100)")
    add("--same-place", type=float, default=0.7, metavar="IOU",
        help="least IoU of detections queried together, as one box (default: 0.7)")  # fmt: skip
    add("--sure", type=float, default=0.3, metavar="SCORE",
        help="least score of detections read as known objects (default: 0.3)")  # fmt: skip
    add("--shuffled", action="store_true", help="control: use predictions for other detections")
    add("--resamples", type=int, default=400, metavar="N", help="for intervals (default: 400)")
    add("--figures", type=Path, help="folder for strength.png, AP over the weight of the context")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
