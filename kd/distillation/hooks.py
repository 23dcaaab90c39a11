"""Intermediate outputs by module path, on torchdistill's forward hooks."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.core.forward_hook import ForwardHookManager

from kd.errors import UserError
from kd.registry import nearest, suggestion

# What the outputs of a pyramid are called has to be said in three places.
_LEVELS = (
    "A recipe's `levels` must be outputs of both pyramids: as many as student.options.levels "
    "makes, and the teacher's own options.levels"
)


class FeatureTaps:
    """Collects the outputs of named layers while a model runs.

    A layer is a path of `model.named_modules()`; where its output is a dict (a feature pyramid,
    say), `path.key` takes one entry of it. A layer that runs several times in one forward pass
    gives its last output. A deep copy of the model is not tapped; a deep copy of what holds model
    and taps is tapped anew.

    Args:
        model: The model itself, not a wrapper such as DDP: wrappers change the paths.
        layers: What to collect.
        called: Whose layers they are, for messages: "student".

    Raises:
        UserError: A path that the model does not have; the message lists the nearest.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], *, called: str = "") -> None:
        self.model, self.called = model, called
        self._said = f"{called}: " if called else ""
        self.layers = tuple(dict.fromkeys(layers))
        modules = dict(model.named_modules())
        self._places = {layer: _place(layer, modules, self._said) for layer in self.layers}
        # Outputs are kept where they are: gathering to one device is for nn.DataParallel.
        self._manager: Any = ForwardHookManager(torch.device("cpu"))
        for path in dict.fromkeys(path for path, _ in self._places.values()):
            self._manager.add_hook(model, path, requires_input=False, requires_output=True)
            _, handle = self._manager.hook_list[-1]
            hooks = handle.hooks_dict_ref()
            hooks[handle.id] = _OwnHook(modules[path], hooks[handle.id])

    def collect(self) -> dict[str, Tensor]:
        """The outputs of the last forward pass by layer, with their gradients; then none are held.

        Raises:
            UserError: A layer did not run, or has no such output.
        """
        found = self._manager.pop_io_dict()
        return {
            layer: _output(layer, path, key, found.get(path, {}), self._said)
            for layer, (path, key) in self._places.items()
        }

    def clear(self) -> None:
        """Let go of what was collected."""
        self._manager.pop_io_dict()

    def remove(self) -> None:
        """Take the hooks off the model; nothing is collected any more."""
        self._manager.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureTaps:
        """Taps of the copied model; hooks do not survive a copy, see `_OwnHook`."""
        return FeatureTaps(copy.deepcopy(self.model, memo), self.layers, called=self.called)


class _OwnHook:
    """A hook that works for one module only.

    `copy.deepcopy` copies a module's hooks with it, and the copy would then write over the
    original's features: an averaged copy of a student, for one. Copied, this hook does nothing.
    """

    def __init__(self, owner: nn.Module | None, hook: Callable[..., None] | None) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self._hook = hook

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        if self._hook is not None and self._owner is not None and self._owner() is module:
            self._hook(module, inputs, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OwnHook:
        return _OwnHook(None, None)

    def __reduce__(self) -> tuple[type[_OwnHook], tuple[None, None]]:
        return _OwnHook, (None, None)  # a pickled model is a copy as well


def _place(layer: str, modules: Mapping[str, nn.Module], said: str) -> tuple[str, str | None]:
    """Split a layer into the path of a module and the key of its output, if there is one.

    Args:
        layer: As a recipe has it.
        modules: Of the model, by path.
        said: What a message begins with.
    """
    if layer and layer in modules:
        return layer, None
    path = layer.rpartition(".")[0]
    while path and path not in modules:
        path = path.rpartition(".")[0]
    if not path or isinstance(modules[path], nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise _unknown(layer, modules, said)
    # What a module returns is known when it runs. To tell mistakes before that: a leaf such as a
    # convolution gives no dict, and what looks like the name of a child was meant as one.
    key = layer[len(path) + 1 :]
    children = [name for name, _ in modules[path].named_children()]
    if not children or nearest(key.partition(".")[0], children):
        raise _unknown(layer, modules, said)
    return path, key


def _unknown(layer: str, modules: Mapping[str, nn.Module], said: str) -> UserError:
    return UserError(
        f"{said}unknown layer {layer!r}{suggestion(layer, (name for name in modules if name))}"
    )


def _output(
    layer: str, path: str, key: str | None, kept: Mapping[str, object], said: str
) -> Tensor:
    if "output" not in kept:
        raise UserError(f"{said}layer {path!r} did not run in this forward pass")
    output = kept["output"]
    if key is not None:
        if not isinstance(output, Mapping) or key not in output:
            known = [str(name) for name in output] if isinstance(output, Mapping) else []
            levels = f". {_LEVELS}" if known and (key.isdigit() or key == "pool") else ""
            raise UserError(
                f"{said}layer {path!r} has no output {key!r}{suggestion(key, known)}{levels}"
            )
        output = output[key]
    if not isinstance(output, Tensor):
        hint = (
            f"; name one entry: {', '.join(map(str, output))}"
            if isinstance(output, Mapping)
            else ""
        )
        raise UserError(
            f"{said}layer {layer!r} gives a {type(output).__name__}, not a tensor{hint}"
        )
    return output
