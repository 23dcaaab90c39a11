"""A student together with its adapters: the one module that is wrapped for several processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.distillation.adapters import Conv3x3
from kd.distillation.hooks import FeatureTaps
from kd.problems.base import Mask, named


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
        """Take the hooks off the student, so that it can be wrapped anew."""
        if self._taps is not None:
            self._taps.remove()
