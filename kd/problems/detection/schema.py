"""Spec of the detection problem; does not import torch."""

from __future__ import annotations

from kd.problems.objects.schema import ObjectsSection
from kd.problems.spec import ProblemSpec
from kd.registry import Entry

SPEC = ProblemSpec(
    name="detection",
    help="objects with boxes",
    data=ObjectsSection,
    tasks={"detection": Entry("kd.problems.detection.task:Detection", "detect objects with boxes")},
    implementation="kd.problems.detection.problem:PROBLEM",
    abilities=frozenset({"results_files"}),
    pipeline="object-detection",
    example="scenes",
)
