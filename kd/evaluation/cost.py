"""Measure the cost of networks on this device; tabulate and plot it with their accuracy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from kd.config.recipes import Model
from kd.errors import UserError
from kd.nn.cost import latency, multiply_adds
from kd.problems.recipes import section_from
from kd.report.style import COLOURS, GREY, INK, clean, colours
from kd.report.tables import Table, value_of
from kd.runs.build import open_data, without_weights
from kd.runs.read import DistillRuns, Run, check_same_objects, distinct_names
from kd.runs.setup import count_parameters

PLAIN, TEACHER = "plain", "teacher"
KINDS = (PLAIN, "distilled", TEACHER)
_SHAPES = "osD^"  # marker shapes of students; the next shape is used once all colours are used
_PANELS = {
    "parameters": "parameters",
    "multiply_adds": "multiply-adds per image",
    "latency": "latency per image (ms)",
}


@dataclass(frozen=True)
class Cost:
    """Cost of a network, measured on this device, and the accuracy of its runs."""

    name: str  # equal for plain and distilled runs of a student
    variant: str  # `teacher` for a teacher
    mean_iou: float  # 0..1, mean over seeds
    parameters: int
    multiply_adds: int  # per image
    latency: float  # milliseconds per image
    sides: tuple[int, int]  # height and width of the image
    device: str  # where latency was measured, with the number of CPU threads

    @property
    def kind(self) -> str:
        """One of `KINDS`: teacher, plain, or distilled (any other variant)."""
        return self.variant if self.variant in (PLAIN, TEACHER) else "distilled"


def measured(distillations: Sequence[DistillRuns], singles: Sequence[Run]) -> list[Cost]:
    """Measure the networks of finished runs at the image size of their evaluation.

    Accuracy is the mean over seeds for `distillations`. `singles` are teachers or single variants.
    """
    trained: list[tuple[Path, str, Sequence[Run]]] = [
        (one.folder, variant, runs)
        for one in distillations
        for variant, runs in one.variants.items()
    ]
    for run in singles:
        variant = str(run.config.get("variant", TEACHER))
        origin = run.folder if variant == TEACHER else run.folder.parent.parent
        trained.append((origin, variant, [run]))
    everything = [run for _, _, runs in trained for run in runs]
    for run in everything:
        if run.results.cost_metric is None:
            raise UserError(
                f"{run.folder}: predicts {run.results.things}; --cost is for label maps"
            )
    check_same_objects(everything)
    models = [_model(runs[0].config, variant) for _, variant, runs in trained]
    names = _names(models, [origin for origin, _, _ in trained])
    known: dict[str, dict[str, Any]] = {}  # variants of one student cost the same
    costs = []
    for name, model, (_, variant, runs) in zip(names, models, trained, strict=True):
        key = json.dumps([variant == TEACHER, model.model_dump(), runs[0].config["data"]])
        if key not in known:
            known[key] = _measure(runs[0], model, teacher=variant == TEACHER)
        accuracies = [
            value_of(run.results, str(run.results.cost_metric), run.records) for run in runs
        ]
        mean_iou = sum(accuracies) / len(accuracies)
        costs.append(Cost(name, variant, mean_iou, **known[key]))
    return costs


def _model(config: dict[str, Any], variant: str) -> Model:
    """Return name and options of a run's network with random weights, which cost the same."""
    part = config[TEACHER if variant == TEACHER else "student"]
    return without_weights(Model(name=part["name"], options=part["options"]))


def _names(models: Sequence[Model], origins: Sequence[Path]) -> list[str]:
    """Name each network; if several folders have the same network, use the folder names.

    A `trunk` option is part of the name: `pspnet_resnet18`.
    """
    trunks = [model.options.get("trunk") for model in models]
    names = [
        f"{model.name}_{trunk}" if isinstance(trunk, str) else model.name
        for model, trunk in zip(models, trunks, strict=True)
    ]
    different = list(dict.fromkeys(origins))
    folders = dict(zip(different, distinct_names(different), strict=True))
    pairs = list(zip(names, origins, strict=True))
    shared = Counter(name for name, _ in set(pairs))
    return [name if shared[name] == 1 else folders[origin] for name, origin in pairs]


def _measure(run: Run, model: Model, *, teacher: bool) -> dict[str, Any]:
    """Measure a network; returns the fields `parameters` to `device` of `Cost`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    section = section_from(run.config, str(run.folder / "config.yaml"))
    data = open_data(section, run.config["task"]["name"])
    network = (
        data.problem.build_teacher(model, data.num_classes)
        if teacher
        else data.problem.build_student(model, data.num_classes)
    ).to(device)
    sides = run.results.usual_size(data)
    images = torch.zeros(1, 3, *sides, device=device)
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return {
        "parameters": count_parameters(network),
        "multiply_adds": multiply_adds(network, images),
        "latency": 1000 * latency(network, images),
        "sides": sides,
        "device": f"{device.type}{threads}",
    }


def cost_table(costs: Sequence[Cost]) -> Table:
    """Tabulate the values of `cost_figure`, sorted by multiply-adds."""
    lines = []
    for cost in sorted(costs, key=lambda cost: cost.multiply_adds):
        height, width = cost.sides
        lines.append((
            cost.name, cost.variant, f"{width} x {height}", f"{cost.parameters / 1e6:.3g}",
            f"{cost.multiply_adds / 1e9:.3g}", f"{cost.latency:.3g}", f"{100 * cost.mean_iou:.1f}",
        ))  # fmt: skip
    header = ("network", "run", "image", "parameters (M)", "multiply-adds (G)", "latency (ms)",
              "mIoU (%)")  # fmt: skip
    devices = ", ".join(dict.fromkeys(cost.device for cost in costs))
    note = f"latency: median of forward passes of single images on {devices}"
    return Table("Cost of networks", header, (tuple(lines),), (note,))


def cost_figure(costs: Sequence[Cost]) -> Figure:
    """Plot mIoU against parameters, multiply-adds and latency on logarithmic axes.

    Arrows connect each plain student to its distilled variants.
    """
    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    best_first = sorted(costs, key=lambda cost: -cost.mean_iou)
    teachers = {cost.name for cost in costs if cost.kind == TEACHER}
    names = list(dict.fromkeys(cost.name for cost in best_first))
    students = [name for name in names if name not in teachers]
    looks = dict.fromkeys(teachers, (INK, "*"))
    for place, (name, colour) in enumerate(zip(students, colours(len(students)), strict=True)):
        looks[name] = (colour, _SHAPES[place // len(COLOURS) % len(_SHAPES)])
    for axes, (field, label) in zip(panels, _PANELS.items(), strict=True):
        _panel(axes, costs, field, looks)
        axes.set_xlabel(label)
    panels[0].set_ylabel("mIoU (%)")
    kinds = [kind for kind in KINDS if any(cost.kind == kind for cost in costs)]
    handles = [_mark(kind, GREY, "*" if kind == TEACHER else "o") for kind in kinds]
    figure.legend(handles, kinds, loc="outside upper center", ncols=len(kinds), frameon=False)
    handles = [_mark("distilled", *looks[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4),
                  frameon=False, fontsize=8.5)  # fmt: skip
    return figure


def _mark(kind: str, colour: str, shape: str, x: float = 0.0, y: float = 0.0) -> Line2D:
    """Create a network's marker; plain students are hollow."""
    return Line2D(
        [x], [y], linestyle="", zorder=3, marker=shape, markersize=11 if shape == "*" else 6,
        color=colour, markeredgewidth=1.4, markerfacecolor="white" if kind == PLAIN else colour,
    )  # fmt: skip


def _panel(
    axes: Axes, costs: Sequence[Cost], field: str, looks: dict[str, tuple[str, str]]
) -> None:
    """Draw a marker for each model, and arrows from plain to distilled students."""
    clean(axes)
    axes.set_xscale("log")
    at = {cost: (float(getattr(cost, field)), 100 * cost.mean_iou) for cost in costs}
    for cost, place in at.items():
        axes.add_line(_mark(cost.kind, *looks[cost.name], *place))
    axes.autoscale_view()
    for before, after in product(costs, costs):
        if (before.kind, after.kind, before.name) == (PLAIN, "distilled", after.name):
            arrow = {"arrowstyle": "-|>", "color": looks[after.name][0], "lw": 1.1,
                     "shrinkA": 3.5, "shrinkB": 3.5}  # fmt: skip
            axes.annotate("", at[after], at[before], zorder=2, arrowprops=arrow)
    axes.margins(x=0.14, y=0.12)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}" if field == "latency" else EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
