"""`AdaptedStudent`, the module that DDP wraps: a student with its adapters."""

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
    """Run a student and adapt its tapped layers to the shapes of the teacher's layers.

    DDP synchronises only the parameters of the module that it wraps, so this module also holds the
    adapters and the losses with weights. Checkpoints contain them; the exported student does not.
    Teachers are trained in this wrapper as well, without taps.

    Args:
        student: The model; its `forward` returns a tensor (then called `logits`) or a dict.
        layers: Layers to tap, as paths of `student.named_modules()`.
        adapters: Adapters by layer; features of a layer without an adapter are not changed.
        losses: Losses whose weights are trained with the student, by term name.
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
        self.adapters = _module_dict(adapters or {})
        self.losses = _module_dict(losses or {})
        self._taps = FeatureTaps(student, layers, called="student") if layers else None

    def forward(
        self, *inputs: Tensor, where: Mapping[str, Mask] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the student's outputs by name, and the adapted features by layer.

        `where` has, by layer, a mask of the grid cells that the losses read. An adapter may skip
        other cells.
        """
        outputs = named(self.student(*inputs))
        features = self._taps.collect() if self._taps else {}
        for layer, feature in features.items():
            features[layer] = self._adapt(_key(layer), feature, (where or {}).get(layer))
        return outputs, features

    def _adapt(self, name: str, feature: Tensor, where: Mask | None) -> Tensor:
        if name not in self.adapters:
            return feature
        adapter = self.adapters[name]
        # Counting cells would synchronise a GPU, and their number would break a compiled graph.
        counts = feature.is_cpu and not torch.compiler.is_compiling()
        if where is not None and counts and isinstance(adapter, Conv3x3):
            adapted: Tensor = adapter(feature, where((feature.shape[2], feature.shape[3])))
        else:
            adapted = adapter(feature)
        return adapted

    def taps_off(self) -> None:
        """Remove the hooks from the student, so that it can be wrapped again."""
        if self._taps is not None:
            self._taps.remove()


def _key(name: str) -> str:
    return name.replace(".", "/")  # names of modules must not contain dots


def _module_dict(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({_key(name): module for name, module in modules.items()})


def adapt_student(
    student: nn.Module,
    terms: Sequence[Term],
    adapters: Mapping[str, Adapter],
    source: SoftTargetSource | None,
    task: Task,
    batch: Batch,
) -> tuple[AdaptedStudent, list[Term]]:
    """Wrap a student with the taps, adapters and losses that its terms need.

    Student and teachers run once on `batch`, to find the shapes of their outputs. Adapters of
    layers that no term reads are ignored. If `source` (of the teachers' outputs) is None, nothing
    is tapped.

    Returns:
        The wrapped student, and the terms with initialised weights.
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
    probe = AdaptedStudent(student, layers)
    try:
        with torch.no_grad(), evaluating(probe):
            _, ours = probe(*task.inputs(batch))
            theirs = source(batch, task.rows(batch))
    finally:
        probe.taps_off()
    return ours, theirs
