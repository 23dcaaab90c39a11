"""Compare finished runs: distillations against their plain twins, teachers side by side.

    python -m kd.compare runs/distill/resnet18
    python -m kd.compare runs/teacher/unet runs/teacher/cnn --figure curves.png
    python -m kd.compare runs/distill/espnet_c runs/teacher/pspnet --cost cost.png

A distillation's folder gives the table of its variants; single runs share one, after the first.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kd.cli import add_list, run_command
from kd.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kd.report.tables import Table
    from kd.runs.read import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 where all runs could be compared."""
    return _run(_parser().parse_args(argv))


def _run(options: argparse.Namespace) -> int:
    # Torch takes seconds to import: not before the arguments are checked.
    from kd.evaluation.cost import measured
    from kd.evaluation.cost_figure import cost_figure, cost_table
    from kd.report.style import save_figure
    from kd.report.tables import distill_table, print_table, write_markdown
    from kd.runs.read import check_same_objects, is_distill, read_distill, read_run

    folders = list(dict.fromkeys(Path(os.path.normpath(run)) for run in options.runs))
    distillations = [
        read_distill(folder, options.variants) for folder in folders if is_distill(folder)
    ]
    tables = [
        distill_table(
            runs.results,
            runs.records(),
            runs.seeds,
            metrics=options.metrics,
            title=str(runs.folder),
        )
        for runs in distillations
    ]
    singles = [read_run(folder) for folder in folders if not is_distill(folder)]
    if singles:
        check_same_objects(singles)
        tables.append(_side_by_side(singles, options.metrics))
    if options.figure and len(tables) > 1:
        raise UserError("--figure draws one table: name one distillation, or single runs only")
    costs = measured(distillations, singles) if options.cost else []
    tables += [cost_table(costs)] if costs else []
    for table in tables:
        print_table(table)
    if options.markdown:
        write_markdown(tables, options.markdown)
    if options.figure:
        save_figure(_drawn(singles, tables[0]), options.figure)
    if options.cost:
        save_figure(cost_figure([cost.point for cost in costs]), options.cost)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kd.compare", description="Compare runs.")
    add, names = parser.add_argument, partial(str.split, sep=",")
    add("runs", nargs="+", metavar="RUN", help="folder of a run or a distillation")
    add("--metrics", metavar="A,B", type=names, help="rows, such as top1,nll or mIoU,iou/car")
    add("--variants", metavar="A,B", type=names, help="of a distillation, beside plain; else all")
    add("--markdown", type=Path, metavar="FILE", help="write the tables here, too")
    add("--figure", type=Path, metavar="FILE", help="draw them here (.png, .pdf)")
    cost = "label maps: draw mIoU against parameters, multiply-adds and latency here"
    add("--cost", type=Path, metavar="FILE", help=cost)
    add_list(parser, "metrics")
    return parser


def _side_by_side(runs: Sequence[Run], metrics: Sequence[str] | None) -> Table:
    from kd.report.tables import runs_table
    from kd.runs.read import ceilings, named_runs

    known = {key: number for run in reversed(runs) for key, number in ceilings(run.summary).items()}
    records = {name: run.records for name, run in named_runs(runs).items()}
    results = runs[0].results
    title = results.about(runs[0].records)
    return runs_table(results, records, ceilings=known, metrics=metrics, title=title)


def _drawn(runs: Sequence[Run], table: Table) -> Figure:
    """The figure of one table: of single runs as their task draws it."""
    from kd.report.comparison import comparison_figure
    from kd.runs.read import named_runs

    if not runs:
        return comparison_figure(table)
    records = {name: run.records for name, run in named_runs(runs).items()}
    return runs[0].results.comparison(records, table)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
