"""Rescore a detector's results by the context of each of its boxes.

The weight of the context is fitted by cross-validation on AP: each image uses the parameters of the
other folds' images. Without a clear gain, the scores stay bit-equal. With --fit-* the parameters
are fitted on another split.
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
    from kd.context.detections import QueryOptions
    from kd.context.fit_rescore import Split, cross_fitted, fitted_elsewhere
    from kd.context.rescore import STRENGTHS, settings_of
    from kd.context.rescore_report import change_of, change_table, curve_figure, curve_of
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
    settings = settings_of(args.rule)
    if all(fit):
        result = fitted_elsewhere(here, split(*fit), settings, args.folds, args.per_class)
    else:
        result = cross_fitted(here, settings, args.folds, args.per_class)
    write_detections(args.out, here.found.entries, result.scores.tolist())
    names = here.truth.class_names
    change = change_of(here.meter, here.known.scores, result.scores, names, samples=args.resamples)
    title = f"{args.detections.name}: {len(names)} classes, context from {args.teacher}"
    print_table(change_table(change, title, result.notes(names)))
    strengths = (0.0, *STRENGTHS)
    rules = dict.fromkeys([None, 0.0, *(one.setting.alone for one in result.fits)])
    curves = curve_of(here.meter, here.known, strengths, list(rules))
    report = {**change.to_json(), **result.to_json(names), "a": strengths, "curves": curves}
    metrics = args.out.with_name(f"{args.out.stem}-metrics.json")
    write_text(metrics, json.dumps(report, indent=2) + "\n")
    if args.figures:
        marks = [one.setting for one in result.fits]
        save_figure(curve_figure(strengths, curves, marks, title), args.figures / "strength.png")
    sys.stdout.write(f"{args.out}, {metrics}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kd.rescore", description=__doc__)
    add = parser.add_argument
    add("--teacher", required=True, type=Path, help="a teacher's run folder or checkpoint")
    add("--detections", required=True, type=Path, help="a detector's COCO results, scores in 0..1")
    add("--annotations", required=True, type=Path, help="COCO JSON of these images")
    add("--images", required=True, type=Path, help="their folder")
    add("--out", required=True, type=Path, help="results to write, beside cached predictions")
    add("--fit-detections", type=Path, help="results on other images, to fit parameters on")
    add("--fit-annotations", type=Path, help="COCO JSON of those")
    add("--fit-images", type=Path, help="their folder")
    add("--folds", type=int, default=5, metavar="N", help="of images; default 5")
    add("--rule", choices=("auto", "plain", "competing"), default="auto",
        help="plain: logit(s) + a evidence; competing: with the other classes of a box; "
        "auto: the folds choose (default)")  # fmt: skip
    add("--per-class", action="store_true", help="parameters for classes of 20 objects or more")
    add("--most", type=int, default=100, metavar="N", help="queries per image; default 100")
    add("--same-place", type=float, default=0.7, metavar="IOU", help="least IoU in a query; 0.7")
    add("--sure", type=float, default=0.3, metavar="SCORE", help="least score of inputs; 0.3")
    add("--shuffled", action="store_true", help="control: predictions for other detections")
    add("--resamples", type=int, default=400, metavar="N", help="for the intervals; default 400")
    add("--figures", type=Path, help="folder for AP over the strength (strength.png)")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
