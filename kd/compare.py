"""Compare finished runs: the variants of distillations, and single runs side by side.

    python -m kd.compare runs/distill/resnet18
    python -m kd.compare runs/teacher/unet runs/teacher/cnn --figure curves.png
    python -m kd.compare runs/distill/espnet_c runs/teacher/pspnet --cost cost.png

Each distillation gets a table; single runs get one together, compared with the first of them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from kd.cli import add_list, run_command
from kd.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Print tables of runs, and write them and their figures where flags name a file."""
    return _run(_parser().parse_args(argv))


def _run(args: argparse.Namespace) -> int:
    # Torch takes seconds to import: not before the arguments are checked.
    from kd.evaluation.cost import cost_figure, cost_table, measured
    from kd.report.comparison import comparison_figure
    from kd.report.style import save_figure
    from kd.report.tables import distill_table, print_table, runs_table, write_markdown
    from kd.runs.read import (
        ceilings,
        check_same_objects,
        is_distill,
        named_runs,
        read_distill,
        read_run,
    )

    folders = list(dict.fromkeys(Path(os.path.normpath(run)) for run in args.runs))
    distills = [read_distill(folder, args.variants) for folder in folders if is_distill(folder)]
    tables = [
        distill_table(
            runs.results, runs.records(), runs.seeds, metrics=args.metrics, title=str(runs.folder)
        )
        for runs in distills
    ]
    draw = comparison_figure
    singles = [read_run(folder) for folder in folders if not is_distill(folder)]
    if singles:
        check_same_objects(singles)
        records = {name: run.records for name, run in named_runs(singles).items()}
        known = {name: n for run in reversed(singles) for name, n in ceilings(run.summary).items()}
        results = singles[0].results
        title = results.about(singles[0].records)
        tables.append(
            runs_table(results, records, ceilings=known, metrics=args.metrics, title=title)
        )
        draw = partial(results.comparison, records)
    if args.figure and len(tables) > 1:
        raise UserError("--figure draws one table: name one distillation, or single runs only")
    costs = measured(distills, singles) if args.cost else []
    tables += [cost_table(costs)] if costs else []
    for table in tables:
        print_table(table)
    if args.markdown:
        write_markdown(tables, args.markdown)
    if args.figure:
        save_figure(draw(tables[0]), args.figure)
    if args.cost:
        save_figure(cost_figure(costs), args.cost)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kd.compare", description="Compare runs.")
    add, names = parser.add_argument, partial(str.split, sep=",")
    add("runs", nargs="+", metavar="RUN", help="folder of a run or a distillation")
    add("--metrics", metavar="A,B", type=names, help="rows, such as top1,nll or mIoU,iou/car")
    add("--variants", metavar="A,B", type=names, help="variants beside plain (default: all)")
    add("--markdown", type=Path, metavar="FILE", help="also write the tables to this file")
    add("--figure", type=Path, metavar="FILE", help="draw the table to this file (.png, .pdf)")
    cost = "label maps: draw mIoU against parameters, multiply-adds and latency to this file"
    add("--cost", type=Path, metavar="FILE", help=cost)
    add_list(parser, "metrics")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
