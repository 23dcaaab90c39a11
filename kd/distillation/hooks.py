"""Collect a model's intermediate outputs, selected by module path."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kd.errors import UserError
from kd.registry import nearest, suggestion

_LEVELS = (
    "Each of the recipe's `levels` must be an output of both pyramids; check the option `levels` "
    "of student and teacher"
)


class FeatureTaps:
    """Collect the outputs of named layers while a model runs.

    A layer is a path of `model.named_modules()`. If a module returns a dict, as a feature pyramid
    does, `path.key` selects one entry. If a layer runs several times in a forward pass, its last
    output is collected.

    Copying the model does not copy its taps. A deep copy of an object that holds both the model and
    its taps has new taps on the copied model.

    Args:
        model: The model without a wrapper such as DDP, which would change the paths.
        layers: Layers to collect.
        called: Prefix of error messages, such as "student".
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], *, called: str = "") -> None:
        self.model, self.called = model, called
        self._prefix = f"{called}: " if called else ""
        self.layers = tuple(dict.fromkeys(layers))
        modules = dict(model.named_modules())
        self._sources = {layer: _source(layer, modules, self._prefix) for layer in self.layers}
        self._outputs: dict[str, object] = {}
        self._handles = [
            modules[path].register_forward_hook(_Hook(path, self._outputs))
            for path in dict.fromkeys(path for path, _ in self._sources.values())
        ]

    def collect(self) -> dict[str, Tensor]:
        """Return the outputs of the last forward pass by layer, not detached, and clear them."""
        outputs = dict(self._outputs)
        self.clear()
        return {
            layer: _output(layer, path, key, outputs, self._prefix)
            for layer, (path, key) in self._sources.items()
        }

    def clear(self) -> None:
        """Drop the collected outputs."""
        self._outputs.clear()

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureTaps:
        """Copy the model and tap the copy, because copied hooks do nothing (see `_Hook`)."""
        return FeatureTaps(copy.deepcopy(self.model, memo), self.layers, called=self.called)


class _Hook:
    """A forward hook that stores a module's output; a copy of the hook does nothing.

    `copy.deepcopy` of a model copies its hooks. If the copies were active, a copied model, such as
    the moving average of a student, would overwrite the outputs of the original.
    """

    def __init__(self, path: str, outputs: dict[str, object] | None) -> None:
        self._path, self._outputs = path, outputs

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        if self._outputs is not None:
            self._outputs[self._path] = output

    def __reduce__(self) -> tuple[type[_Hook], tuple[str, None]]:
        return _Hook, (self._path, None)  # used by copy and pickle alike


def _source(layer: str, modules: Mapping[str, nn.Module], prefix: str) -> tuple[str, str | None]:
    """Split a layer name into a module path and, for one entry of a dict output, a key."""
    if layer and layer in modules:
        return layer, None
    path = layer.rpartition(".")[0]
    while path and path not in modules:
        path = path.rpartition(".")[0]
    if not path or isinstance(modules[path], nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise _unknown(layer, modules, prefix)
    # Only running a module shows whether it returns a dict. Two mistakes can be found earlier: a
    # module without children returns no dict, and a key like a child's name is a misspelt child.
    key = layer[len(path) + 1 :]
    children = [name for name, _ in modules[path].named_children()]
    if not children or nearest(key.partition(".")[0], children):
        raise _unknown(layer, modules, prefix)
    return path, key


def _unknown(layer: str, modules: Mapping[str, nn.Module], prefix: str) -> UserError:
    return UserError(
        f"{prefix}unknown layer {layer!r}{suggestion(layer, (name for name in modules if name))}"
    )


def _output(
    layer: str, path: str, key: str | None, outputs: Mapping[str, object], prefix: str
) -> Tensor:
    if path not in outputs:
        raise UserError(f"{prefix}layer {path!r} did not run in this forward pass")
    output = outputs[path]
    if key is not None:
        if not isinstance(output, Mapping) or key not in output:
            known = [str(name) for name in output] if isinstance(output, Mapping) else []
            levels = f". {_LEVELS}" if known and (key.isdigit() or key == "pool") else ""
            raise UserError(
                f"{prefix}layer {path!r} has no output {key!r}{suggestion(key, known)}{levels}"
            )
        output = output[key]
    if not isinstance(output, Tensor):
        keys = ", ".join(map(str, output)) if isinstance(output, Mapping) else ""
        hint, kind = f"; select one of {keys}" if keys else "", type(output).__name__
        raise UserError(f"{prefix}layer {layer!r} returns a {kind}, not a tensor{hint}")
    return output
