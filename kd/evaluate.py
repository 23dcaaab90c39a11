"""Evaluate a finished run on its val split: `python -m kd.evaluate RUN`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.adapted import AdaptedStudent
from kd.build import OpenData, make_accelerator, make_dataset, make_loader, open_data
from kd.cli import run_command, set_up_logging
from kd.config import Data
from kd.config_reader import data_config, from_plain, read_yaml
from kd.engine import evaluate
from kd.errors import UserError
from kd.metrics.top_n import TopN
from kd.pictures import hidden_scenes
from kd.report.figures import save_figure, share_hidden_figure
from kd.session import ceiling_metrics, curve_figure, new_metric, say_summary
from kd.student_runs import load_student
from kd.tasks.base import Metric
from kd.teacher_runs import load_teacher


def main(argv: Sequence[str] | None = None) -> int:
    """Print the metrics, the per-class table where asked, and draw the curves."""
    parser = argparse.ArgumentParser(prog="python -m kd.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a teacher's or one arm's run folder")
    parser.add_argument("--data", metavar="NAME", help="another data set with the same classes")
    parser.add_argument("--set", action="append", default=[], dest="settings",
                        metavar="data.a=value", help="change a value of the data set")  # fmt: skip
    parser.add_argument("--per-class", action="store_true", help="list every class with support")
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="write PNGs of curves and hidden scenes here"
    )
    args = parser.parse_args(argv)
    set_up_logging()
    run: Path = args.run
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run folder, it has no config.yaml")
    config = read_yaml(run / "config.yaml")
    if not {"data", "train", "task"} <= config.keys():
        raise UserError(f"{run / 'config.yaml'}: not the config of a run")
    data, model, task = _open(run, config, args)
    accelerator = make_accelerator(config["train"]["precision"])
    metric = new_metric(task, data)
    loader = make_loader(
        make_dataset(data, "val", train=False),
        accelerator,
        batch_size=int(config["train"]["batch_size"]),
        workers=data.section.workers,
    )
    model = AdaptedStudent(model).to(accelerator.device)
    evaluate(model, task, loader, metric, accelerator)
    say_summary(
        f"{run} on {data.section.name} val", {**metric.compute(), **ceiling_metrics(data, metric)}
    )
    if args.per_class:
        _say_classes(metric, data)
    if args.figures:
        if not isinstance(metric, TopN):
            raise UserError(f"{run}: --figures draws answers about objects, not about pictures")
        args.figures.mkdir(parents=True, exist_ok=True)
        save_figure(curve_figure(data, metric), args.figures / "top_n.png")
        save_figure(share_hidden_figure({run.name: metric.records()}), args.figures / "share.png")
        scenes = hidden_scenes(model, task, data, count=8, device=accelerator.device)
        for number, figure in enumerate(scenes):
            save_figure(figure, args.figures / f"hidden_scene_{number}.png")
    return 0


def _open(run: Path, config: dict[str, Any], args: argparse.Namespace) -> tuple[OpenData, Any, Any]:
    section = _section(run, config, args)
    if "teacher" in config and "name" in config["teacher"] and "options" in config["teacher"]:
        data = open_data(section)
        teacher = load_teacher(run, data.num_classes)
        return data, teacher.model, teacher.task
    student = load_student(run, config, section)
    return student.data, student.model, student.task


def _section(run: Path, config: dict[str, Any], args: argparse.Namespace) -> Data:
    """The data set to evaluate on, shown as the run's was: the run's own or `--data`."""
    if not args.data:
        return from_plain(Data, config["data"], str(run / "config.yaml"), args.settings)
    kept = {name: config["data"][name] for name in ("size", "shape", "min_share", "max_share")}
    shown = [f"{name}={value}" for name, value in kept.items()]
    return data_config(args.data, [*shown, *args.settings])


def _say_classes(metric: Metric, data: OpenData) -> None:
    for name, support, score in metric.per_class(data.val.class_names):
        sys.stdout.write(f"  {name:<24}{support:>7}{100 * score:>8.1f} %\n")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
