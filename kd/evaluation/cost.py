"""What networks for label maps cost on this device, beside how good their runs are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kd.config.recipes import Model
from kd.errors import UserError
from kd.evaluation.cost_figure import Cost, CostPoint, Kind
from kd.nn.cost import latency, multiply_adds
from kd.problems.recipes import section_from
from kd.problems.records import PICTURES, kind_of
from kd.problems.segmentation.data import SegmentationDataset
from kd.registry import build
from kd.report.tables import value_of
from kd.runs.build import open_data
from kd.runs.load_student import to_be_loaded
from kd.runs.read import DistillRuns, Run, check_same_objects, distinct_names
from kd.runs.setup import parameters
from students import STUDENTS
from teachers import TEACHERS

PLAIN, TEACHER = "plain", "teacher"


@dataclass(frozen=True)
class _Trained:
    """Runs of one network that was trained in one way."""

    runs: list[Run]  # one a seed
    variant: str
    origin: Path  # folder of the distillation, or of the teacher

    @property
    def section(self) -> Model:
        """The network's name and options."""
        part = self.runs[0].config[TEACHER if self.variant == TEACHER else "student"]
        return to_be_loaded(Model(name=part["name"], options=part["options"]))

    @property
    def network(self) -> str:
        """What it is called, with its trunk where that is an option: `pspnet_resnet18`."""
        trunk = self.section.options.get("trunk")
        return f"{self.section.name}_{trunk}" if isinstance(trunk, str) else self.section.name

    @property
    def kind(self) -> Kind:
        """How it was trained; whatever is not plain was taught."""
        return (
            "teacher"
            if self.variant == TEACHER
            else "plain"
            if self.variant == PLAIN
            else "distilled"
        )

    @property
    def mean_iou(self) -> float:
        """Over seeds."""
        return sum(value_of("mIoU", run.records) for run in self.runs) / len(self.runs)


def measured(distillations: Sequence[DistillRuns], singles: Sequence[Run]) -> list[Cost]:
    """Measure the networks of finished runs on pictures of the size that they are evaluated at.

    Args:
        distillations: Every variant counts, by its mean over seeds.
        singles: Teachers, or single variants.

    Raises:
        UserError: A run is about objects, runs answered about different pictures, or a data set
            is not there.
    """
    trained = [
        _Trained(runs, variant, one.folder)
        for one in distillations
        for variant, runs in one.variants.items()
    ]
    trained += [_single(run) for run in singles]
    runs = [run for one in trained for run in one.runs]
    for run in runs:
        if kind_of(run.records) is not PICTURES:
            things = kind_of(run.records).things
            raise UserError(f"{run.folder}: answers about {things}; --cost is for label maps")
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
    """The network's name; where several runs have networks of that name, their folder's."""
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
    """Build the network at random weights, which cost as much as trained ones."""
    num_classes = one.runs[0].records["confusion"].shape[1]
    registry, what = (TEACHERS, "teacher") if one.kind == TEACHER else (STUDENTS, "student")
    section = one.section
    model = build(registry, section.name, section.options, what=what, num_classes=num_classes)
    model = model.to(device)
    sides = _sides(one.runs[0].config["data"], str(one.runs[0].folder / "config.yaml"))
    images = torch.zeros(1, 3, *sides, device=device)
    point = CostPoint(
        name=name,
        parameters=parameters(model),
        multiply_adds=multiply_adds(model, images),
        latency=1000 * latency(model, images),
        mean_iou=one.mean_iou,
        kind=one.kind,
    )
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Cost(point, one.variant, sides, f"{device.type}{threads}")


def _sides(section: dict[str, Any], where: str) -> tuple[int, int]:
    """Height and width at which most val pictures are seen."""
    data = open_data(section_from(section, where))
    assert isinstance(data, SegmentationDataset)
    samples = data.whole("val", size=data.section.size)
    seen = Counter(samples.seen(own) for own in samples.file_sizes())
    return seen.most_common(1)[0][0]
