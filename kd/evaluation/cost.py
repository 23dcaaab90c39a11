"""Measured cost of networks on this device, and the accuracy of their runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kd.config.recipes import Model
from kd.errors import UserError
from kd.evaluation.cost_figure import Cost, CostPoint, Kind
from kd.nn.cost import latency, multiply_adds
from kd.problems.recipes import section_from
from kd.report.tables import value_of
from kd.runs.build import open_data, without_weights
from kd.runs.read import DistillRuns, Run, check_same_objects, distinct_names
from kd.runs.setup import count_parameters

PLAIN, TEACHER = "plain", "teacher"


@dataclass(frozen=True)
class _Trained:
    """Runs of one network and variant."""

    runs: list[Run]  # one per seed
    variant: str
    origin: Path  # folder of the distillation, or of the teacher

    @property
    def section(self) -> Model:
        """The network's name and options."""
        part = self.runs[0].config[TEACHER if self.variant == TEACHER else "student"]
        return without_weights(Model(name=part["name"], options=part["options"]))

    @property
    def network(self) -> str:
        """Name, with the trunk if that is an option: `pspnet_resnet18`."""
        trunk = self.section.options.get("trunk")
        return f"{self.section.name}_{trunk}" if isinstance(trunk, str) else self.section.name

    @property
    def kind(self) -> Kind:
        """Teacher, plain, or distilled in any way."""
        if self.variant == TEACHER:
            return "teacher"
        return "plain" if self.variant == PLAIN else "distilled"

    @property
    def mean_iou(self) -> float:
        """Mean over seeds."""
        name = self.runs[0].results.cost_metric
        assert name is not None
        return sum(value_of(run.results, name, run.records) for run in self.runs) / len(self.runs)


def measured(distillations: Sequence[DistillRuns], singles: Sequence[Run]) -> list[Cost]:
    """Measure the networks of finished runs on images of their evaluation's size.

    Args:
        distillations: Each variant has the mean over its seeds.
        singles: Teachers or single variants.

    Raises:
        UserError: A run does not predict label maps, runs have predictions on different images, or
            a dataset is missing.
    """
    trained = [
        _Trained(runs, variant, one.folder)
        for one in distillations
        for variant, runs in one.variants.items()
    ]
    trained += [_single(run) for run in singles]
    runs = [run for one in trained for run in one.runs]
    for run in runs:
        if run.results.cost_metric is None:
            raise UserError(
                f"{run.folder}: predicts {run.results.things}; --cost is for label maps"
            )
    check_same_objects(runs)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known: dict[str, Cost] = {}  # variants of one student cost the same
    costs = []
    for name, one in zip(_names(trained), trained, strict=True):
        config = one.runs[0].config
        key = json.dumps([one.kind == TEACHER, one.section.model_dump(), config["data"]])
        if key not in known:
            known[key] = _measure(one, name, device)
        point = replace(known[key].point, name=name, kind=one.kind, mean_iou=one.mean_iou)
        costs.append(known[key]._replace(point=point, variant=one.variant))
    return costs


def _single(run: Run) -> _Trained:
    if "variant" in run.config:
        return _Trained([run], str(run.config["variant"]), run.folder.parent.parent)
    return _Trained([run], TEACHER, run.folder)


def _names(trained: Sequence[_Trained]) -> list[str]:
    """Name of each network, or of its folder where several folders have that network."""
    names = [one.network for one in trained]
    origins = list(dict.fromkeys(one.origin for one in trained))
    folders = dict(zip(origins, distinct_names(origins), strict=True))
    pairs = {(name, one.origin) for name, one in zip(names, trained, strict=True)}
    shared = Counter(name for name, _ in pairs)
    return [
        name if shared[name] == 1 else folders[one.origin]
        for name, one in zip(names, trained, strict=True)
    ]


def _measure(one: _Trained, name: str, device: torch.device) -> Cost:
    """Measure the network with random weights, which have the same cost."""
    run = one.runs[0]
    section = section_from(run.config, str(run.folder / "config.yaml"))
    data = open_data(section, run.config["task"]["name"])
    model = (
        data.problem.build_teacher(one.section, data.num_classes)
        if one.kind == TEACHER
        else data.problem.build_student(one.section, data)
    ).to(device)
    sides = run.results.usual_size(data)
    images = torch.zeros(1, 3, *sides, device=device)
    point = CostPoint(
        name, count_parameters(model), multiply_adds(model, images),
        latency=1000 * latency(model, images), mean_iou=one.mean_iou, kind=one.kind,
    )  # fmt: skip
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Cost(point, one.variant, sides, f"{device.type}{threads}")
