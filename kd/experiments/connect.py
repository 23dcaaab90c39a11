"""Between a student and its teachers: terms, the layers they tap, adapters, losses with weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kd.config.recipes import Adapter, Term
from kd.distillation.adapters import ADAPTERS
from kd.distillation.student import AdaptedStudent
from kd.distillation.targets import MEAN, SoftTargetSource
from kd.distillation.terms import ROWS, TEACHER_OUTPUTS, build_term, draw_modules, modules_of
from kd.distillation.terms import Term as BuiltTerm
from kd.errors import UserError
from kd.nn.freeze import evaluating
from kd.problems.base import Batch, Task
from kd.problems.detection.task import Detection
from kd.registry import check_options, look_up


def build_terms(terms: Sequence[Term]) -> list[BuiltTerm]:
    """Distillation terms, checked."""
    return [
        build_term(
            term.name, weight=term.weight, label=term.label, student=term.student,
            teacher=term.teacher, options=term.options, ramp=term.schedule.name,
            until=term.schedule.until, start=term.schedule.start,
            until_step=term.schedule.until_step,
        )
        for term in terms
    ]  # fmt: skip


def outputs_by_teacher(
    terms: Sequence[BuiltTerm], teachers: Collection[str]
) -> dict[str, list[str]]:
    """What terms read of each teacher; the name of the recipe's `teacher` is empty.

    Args:
        terms: `NAME.output` is an output or a layer of a further teacher.
        teachers: Names of the further ones.
    """
    outputs: dict[str, list[str]] = {name: [] for name in ("", *teachers)}
    for term in terms:
        first, _, rest = term.teacher.partition(".")
        if first == MEAN and rest not in ("posterior", "logits"):
            raise UserError(
                f"losses: {term.name}: teachers are averaged in {MEAN}.posterior and {MEAN}.logits "
                f"alone, not in {term.teacher!r}"
            )
        whose, output = (first, rest) if first in teachers else ("", term.teacher)
        readers = outputs if first == MEAN else [whose]
        for reader in readers:
            wanted = rest if first == MEAN else output
            if wanted not in outputs[reader]:
                outputs[reader].append(wanted)
    return outputs


def layers_among(outputs: Sequence[str]) -> list[str]:
    """Those that have to be tapped: a teacher gives the others by itself."""
    return [output for output in outputs if output not in TEACHER_OUTPUTS]


def tapped_layers(terms: Sequence[BuiltTerm]) -> list[str]:
    """The student's layers that terms read."""
    return [term.student for term in terms if term.kind.maps and term.student not in ROWS]


def task_of(task: Task, terms: Sequence[BuiltTerm]) -> Task:
    """The task of a student with these terms: with the answers and masks that they want."""
    if not isinstance(task, Detection):
        return task
    psis = {term.kind.psi for term in terms if term.kind.psi is not None}
    return replace(task.asking(term.student for term in terms), psis=tuple(sorted(psis)))


def adapt_student(
    student: nn.Module,
    terms: Sequence[BuiltTerm],
    adapters: Mapping[str, Adapter],
    source: SoftTargetSource | None,
    task: Task,
    batch: Batch,
) -> tuple[AdaptedStudent, list[BuiltTerm]]:
    """Wrap a student with all that its terms need, shapes found on one batch.

    Student, teachers and batch are on one device.

    Returns:
        The student with taps, adapters and the losses that have weights; the terms with new
        weights where they have some.
    """
    layers = tapped_layers(terms)
    if source is None or not (layers or any(term.kind.draws for term in terms)):
        return AdaptedStudent(student), list(terms)
    ours, theirs = _features(student, layers, source, task, batch)
    built: dict[str, nn.Module] = {}
    for layer, adapter in adapters.items():
        if adapter.to not in theirs:
            raise UserError(f"adapters.{layer}.to: no term reads teacher layer {adapter.to!r}")
        build_adapter = look_up(ADAPTERS, adapter.kind, what="adapter")
        given = dict(adapter.options)
        if adapter.kind == "resize":
            given.setdefault("size", tuple(theirs[adapter.to].shape[2:]))
        check_options(build_adapter, given, what=f"adapters.{layer}")
        channels = ours[layer].shape[1], theirs[adapter.to].shape[1]
        built[layer] = build_adapter(*channels, **given)
    drawn = draw_modules(terms, theirs)
    return AdaptedStudent(student, layers, built, modules_of(drawn, images=False)), drawn


def _features(
    student: nn.Module, layers: Sequence[str], source: SoftTargetSource, task: Task, batch: Batch
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """What the student's layers and the teachers give on a batch, nothing of them changed."""
    probe = AdaptedStudent(student, layers)
    try:
        with torch.no_grad(), evaluating(probe):
            _, ours = probe(*task.inputs(batch))
            theirs = source(batch)
    finally:
        probe.taps_off()
    return ours, theirs
