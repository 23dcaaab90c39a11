"""Cache a teacher's outputs ahead of training: `python -m kd.cache --teacher RUN --data coco`.

`kd.distill` computes missing outputs itself; use this command to do so beforehand or on another
machine. Run it again to resume after an interruption; corrupt shards are rebuilt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kd.cli import add_list, run_command, set_up_logging
from kd.config.datasets import DatasetSection
from kd.errors import UserError, at_least
from kd.problems.recipes import data_config


def main(argv: Sequence[str] | None = None) -> int:
    """Compute and store outputs for every object of a split, or for every whole image."""
    args = _parser().parse_args(argv)
    if args.only_layers and not args.layers:
        raise UserError("--only-layers: name them with --layers")
    at_least("kd.cache", **{"--top-k": (args.top_k, 0), "--size": (args.size, 0)})
    return _run(data_config(args.data, args.settings), args)


def _run(section: DatasetSection, args: argparse.Namespace) -> int:
    from kd.runs.build import make_accelerator, open_data
    from kd.runs.load_teacher import check_classes, load_teacher_of
    from kd.teacher_cache.cache import CacheOptions, open_cache
    from kd.teacher_cache.summary import cache_summary

    accelerator = make_accelerator("fp32" if args.precision == "int8" else args.precision)
    set_up_logging(rank=accelerator.process_index)
    with accelerator.main_process_first():
        data = open_data(section)
    teacher = load_teacher_of(args.teacher, data)
    if not args.only_layers and type(teacher.recipe.data) is type(data.section):
        check_classes(teacher, data.class_names, data.section.name)
    teacher.model.to(accelerator.device)
    own = [] if args.only_layers else [data.problem.teacher_output]
    for split in (args.split,) if args.split else data.problem.cached_splits:
        options = CacheOptions(
            outputs=tuple(dict.fromkeys([*own, *args.layers])), split=split,
            out_of_fold=bool(teacher.recipe.folds) and not args.in_fold and split == "train",
            dtype=args.dtype, top_k=args.top_k, mirrored=args.mirrored, location=args.out,
            int8=args.precision == "int8", size=args.size or None,
        )  # fmt: skip
        cached = open_cache(teacher, data, accelerator, options)
        lines = list(cache_summary(teacher, data, split, cached, accelerator))
        if accelerator.is_main_process:
            sys.stdout.writelines(lines)
    if accelerator.is_main_process:
        sys.stdout.write(f"kd.distill reads it with: {options.settings}\n")
    accelerator.end_training()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kd.cache", description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True, metavar="RUN",
                        help="a teacher's run folder or checkpoint")  # fmt: skip
    parser.add_argument("--data", required=True, metavar="NAME", help="configs/data/NAME.yaml")
    parser.add_argument("--set", action="append", default=[], dest="settings",
                        metavar="data.a=value", help="change a value of the dataset")  # fmt: skip
    parser.add_argument("--split", choices=("train", "val"),
                        help="default: train; for saliency both")  # fmt: skip
    parser.add_argument("--layers", nargs="+", default=[], metavar="LAYER", action="extend",
                        help="also the features of these layers, or logits")  # fmt: skip
    parser.add_argument("--only-layers", action="store_true", help="no posteriors or score maps")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--top-k", type=int, default=0, metavar="K",
                        help="only the K likeliest classes of posteriors and logits")  # fmt: skip
    parser.add_argument("--size", type=int, default=0, metavar="PIXELS",
                        help="long side of whole images; default: as trained")  # fmt: skip
    parser.add_argument("--mirrored", action="store_true",
                        help="also mirrored images: flips are then exact")  # fmt: skip
    parser.add_argument("--in-fold", action="store_true",
                        help="posteriors of the teacher itself, not of its folds")  # fmt: skip
    parser.add_argument("--out", metavar="URL", help="folder or fsspec URL; default: in the run")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32", "int8"), default="auto")
    add_list(parser, "data")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
