"""Export a trained model to ONNX, torch.export or TorchScript, and compare the file with the model.

    python -m kd.export runs/distill/resnet18/scenes --out student.onnx
    python -m kd.export RUN --format torch-export --out student.pt2
    python -m kd.export RUN --int8 static --out student.onnx      # also writes student.int8.onnx

The exported file has normalisation, decoding and suppression inside and takes any number of images.
It is run on val images: the largest difference from the model and the metrics of both are printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd.cli import run_command, set_up_logging
from kd.errors import UserError, at_least

if TYPE_CHECKING:
    from kd.deploy.export import Check
    from kd.deploy.model import TrainedModel

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt"}


def main(argv: Sequence[str] | None = None) -> int:
    """Export, compare, and print; the exit status is 1 if the file differs from the model."""
    args = _parser().parse_args(argv)
    set_up_logging()
    at_least("kd.export", **{"--images": (args.images, 1)})
    if args.int8 and args.format != "onnx":
        raise UserError(f"--int8: only for --format onnx, not {args.format}")
    if args.int8 and args.no_check:
        raise UserError("--int8: needs the dataset; leave out --no-check")
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    from kd.deploy import export as deploy
    from kd.deploy.model import load
    from kd.problems.recipes import section_from
    from kd.runs.build import open_data

    if args.format == "onnx":
        deploy.need_onnx()
    model = load(args.run, variant=args.variant, seed=args.seed, device="cpu")
    out = args.out or model.where.with_name(f"student{SUFFIXES[args.format]}")
    data = None
    if not args.no_check:  # opened first, since exporting takes longer
        section = section_from(dict(model.config), str(model.where), args.settings)
        data = open_data(section, model.config["task"]["name"])
    deploy.export(model, out, args.format)
    sys.stdout.write(f"{out}: {out.stat().st_size / 1e6:.1f} MB, from {model.where}\n")
    if data is None:
        return 0
    graph = deploy.graph_of(model)
    check = deploy.compare(model, deploy.runner(out, args.format, graph), data, images=args.images)
    right = _report(model, check, args.format)
    if not right:
        out.unlink()
        sys.stderr.write(f"error: {out}: removed, since it differs from the model\n")
        return 1
    if args.int8:
        small = out.with_suffix(f".int8{out.suffix}")
        deploy.quantise(out, small, model, data, args.int8)
        sys.stdout.write(f"{small}: {small.stat().st_size / 1e6:.1f} MB, int8 ({args.int8})\n")
        quantised = deploy.compare(
            model, deploy.runner(small, "onnx", graph), data, images=args.images
        )
        _report(model, quantised, "int8")
    return 0


def _report(model: TrainedModel, check: Check, name: str) -> bool:
    """Print the comparison; return whether the differences are within the tolerance."""
    from kd.deploy.export import TOLERANCE
    from kd.problems import problem_of_task

    results = problem_of_task(model.config["task"]["name"]).results(model.config["task"]["name"])
    rows: list[tuple[str, str, str]] = [
        (results.metric(key).label, results.metric(key).text(check.model[key]),
         results.metric(key).text(check.exported[key]))
        for key in results.rows if key in check.model
    ]  # fmt: skip
    ours, theirs = (f"{1000 * seconds:.1f}" for seconds in check.seconds)
    rows.append(("time of a batch (ms)", ours, theirs))
    width = max(len(row[0]) for row in rows)
    lines = [f"  {'':{width}}  {'model':>10}  {name:>12}"]
    lines += [f"  {label:{width}}  {one:>10}  {other:>12}" for label, one, other in rows]
    worst = max(check.differences.values(), default=0.0)
    parts = ", ".join(f"{key} {value:.1e}" for key, value in check.differences.items())
    verdict = "" if worst <= TOLERANCE or name == "int8" else f"; more than {TOLERANCE:g}"
    lines.append(f"  {check.images} val images, largest relative difference: {parts}{verdict}")
    sys.stdout.write("\n".join(lines) + "\n")
    return worst <= TOLERANCE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder, or a model's .safetensors file")
    add("--format", choices=tuple(SUFFIXES), default="onnx", help="default: %(default)s")
    add("--out", type=Path, metavar="FILE", help="file to write (default: in the run folder)")
    add("--variant", metavar="NAME", help="variant of a distillation (default: distilled)")
    add("--seed", type=int, metavar="N", help="seed of a distillation (default: the best on val)")
    add("--int8", choices=("dynamic", "static"),
        help="also write an int8 ONNX file; static measures ranges on train images")  # fmt: skip
    add("--images", type=int, default=50, metavar="N",
        help="val images to compare on (default: %(default)s)")  # fmt: skip
    add("--no-check", action="store_true", help="do not run the file; needs no dataset")
    add("--set", action="append", default=[], dest="settings", metavar="data.a=value",
        help="override a value of the dataset, such as data.root=DIR")  # fmt: skip
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
