"""A student with its adapters: the module that DDP wraps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.config.recipes import Adapter
from kd.distillation.adapters import Conv3x3
from kd.distillation.hooks import FeatureTaps
from kd.distillation.registry import ADAPTERS
from kd.distillation.targets import SoftTargetSource
from kd.distillation.terms import Term, draw_modules, modules_of, tapped_layers
from kd.errors import UserError
from kd.nn.freeze import evaluating
from kd.problems.base import Batch, Mask, Task, named
from kd.registry import check_options, resolve


class AdaptedStudent(nn.Module):
    """Runs the student and brings its tapped layers to the teacher's shape.

    Adapters are here because what needs a gradient must come out of the `forward` that DDP wraps.
    They are saved with a checkpoint and left out of the exported student, and so are losses with
    weights: the terms call those, here they are trained. Teachers in training are wrapped too, with
    nothing tapped.

    Args:
        student: The model; its `forward` gives a tensor (then called `logits`) or a dict.
        layers: Layers to tap, as paths of `student.named_modules()`.
        adapters: By layer; a layer without one passes unchanged.
        losses: Losses with weights of their own, which learn with the student, by term.
    """

    def __init__(
        self,
        student: nn.Module,
        layers: Sequence[str] = (),
        adapters: Mapping[str, nn.Module] | None = None,
        losses: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.student: nn.Module = student
        # A module's name may hold no dot.
        self.adapters = nn.ModuleDict(
            {layer.replace(".", "/"): adapter for layer, adapter in (adapters or {}).items()}
        )
        self.losses = nn.ModuleDict(
            {term.replace(".", "/"): loss for term, loss in (losses or {}).items()}
        )
        self._taps = FeatureTaps(student, layers, called="student") if layers else None

    def forward(
        self, *inputs: Tensor, where: Mapping[str, Mask] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs and adapted features by name.

        Args:
            inputs: Of the student.
            where: By layer, the places of its map that will be looked at; an adapter may leave out
                the others. What is not named here is looked at everywhere.
        """
        output = self.student(*inputs)
        outputs = named(output)
        features: dict[str, Tensor] = {}
        for layer, feature in (self._taps.collect() if self._taps else {}).items():
            name = layer.replace(".", "/")
            features[layer] = self._adapt(name, feature, (where or {}).get(layer))
        return outputs, features

    def _adapt(self, name: str, feature: Tensor, where: Mask | None) -> Tensor:
        if name not in self.adapters:
            return feature
        adapter = self.adapters[name]
        # Places are counted: elsewhere than on a CPU that would wait for all that is still to be
        # done, and their number is not known when a step is compiled.
        counts = feature.is_cpu and not torch.compiler.is_compiling()
        if where is not None and counts and isinstance(adapter, Conv3x3):
            adapted: Tensor = adapter(feature, where((feature.shape[2], feature.shape[3])))
        else:
            adapted = adapter(feature)
        return adapted

    def taps_off(self) -> None:
        """Take the hooks off the student, so that it can be wrapped again."""
        if self._taps is not None:
            self._taps.remove()


def adapt_student(
    student: nn.Module,
    terms: Sequence[Term],
    adapters: Mapping[str, Adapter],
    source: SoftTargetSource | None,
    task: Task,
    batch: Batch,
) -> tuple[AdaptedStudent, list[Term]]:
    """Wrap a student with all that its terms need, shapes found on one batch.

    Args:
        student: On the device of teachers and batch.
        terms: What it learns by.
        adapters: By layer of the student; those of layers that no term reads are left out.
        source: The teachers; None without terms.
        task: Its inputs.
        batch: Any.

    Returns:
        The student with taps, adapters and the losses that have weights; the terms with new
        weights where they have some.

    Raises:
        UserError: An adapter that is unknown, or to a layer that no term reads.
    """
    layers = tapped_layers(terms, task)
    if source is None or not (layers or any(term.kind.trained for term in terms)):
        return AdaptedStudent(student), list(terms)
    ours, theirs = _features(student, layers, source, task, batch)
    built: dict[str, nn.Module] = {}
    for layer, adapter in adapters.items():
        if layer not in layers:
            continue
        if adapter.to not in theirs:
            raise UserError(f"adapters.{layer}.to: no term reads teacher layer {adapter.to!r}")
        build_adapter = resolve(ADAPTERS, adapter.kind, what="adapter")
        given = dict(adapter.options)
        if adapter.kind == "resize":
            given.setdefault("size", tuple(theirs[adapter.to].shape[2:]))
        check_options(build_adapter, given, what=f"adapters.{layer}")
        channels = ours[layer].shape[1], theirs[adapter.to].shape[1]
        built[layer] = build_adapter(*channels, **given)
    drawn = draw_modules(terms, theirs)
    return AdaptedStudent(student, layers, built, modules_of(drawn, trained="student")), drawn


def _features(
    student: nn.Module, layers: Sequence[str], source: SoftTargetSource, task: Task, batch: Batch
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Features of the student's layers and outputs of the teachers on a batch."""
    probe = AdaptedStudent(student, layers)
    try:
        with torch.no_grad(), evaluating(probe):
            _, ours = probe(*task.inputs(batch))
            theirs = source(batch, task.rows(batch))
    finally:
        probe.taps_off()
    return ours, theirs
