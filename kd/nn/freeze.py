"""Keep a part of a network as it is while the rest learns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from kd.errors import UserError
from kd.nn.teacher_trunk import AnyTrunk
from kd.registry import suggestion


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm that stays in evaluation, whatever its parents are told; same state-dict keys."""

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Stay in evaluation."""
        super().train(False)
        return self


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Use the stored statistics of all batch norms inside, and stop learning their scales.

    For small batches, and for fine-tuning on few images. Works in place.

    Args:
        module: A module with batch norms inside.

    Returns:
        The module; a new one where it is a batch norm itself.
    """
    if isinstance(module, FrozenBatchNorm):
        return module
    if isinstance(module, nn.BatchNorm2d):
        frozen = FrozenBatchNorm(module.num_features, module.eps, module.momentum)
        for name, parameter in module.named_parameters(recurse=False):
            frozen.register_parameter(name, parameter)
            parameter.requires_grad_(False)
        for name, buffer in module.named_buffers(recurse=False):
            frozen.register_buffer(name, buffer)
        return frozen.train()
    for name, child in list(module.named_children()):
        kept = freeze_batch_norm(child)
        if kept is not child:
            setattr(module, name, kept)
    return module


def freeze_parts(trunk: AnyTrunk, frozen: str | None, batch_norm_frozen: bool) -> None:
    """Freeze as much of a trunk as its options ask for.

    Args:
        trunk: Changed in place.
        frozen: "all", the path of the last step that does not learn, or None.
        batch_norm_frozen: Whether all batch norms keep their stored statistics.

    Raises:
        UserError: The trunk has no such step.
    """
    if frozen is not None:
        freeze(trunk, None if frozen == "all" else frozen)
    if batch_norm_frozen:
        freeze_batch_norm(trunk)


def freeze(trunk: AnyTrunk, until: str | None = None) -> None:
    """Stop the learning of a trunk's first steps, batch norms included.

    Args:
        trunk: Changed in place.
        until: Path of the last frozen step, "layer2" or "features.10"; the whole trunk without it.

    Raises:
        UserError: The trunk has no such step.
    """
    steps = list(trunk.steps())
    paths = [path for path, _ in steps]
    if until is not None and until not in paths:
        raise UserError(f"{trunk.name} has no step {until!r} to freeze{suggestion(until, paths)}")
    last = len(steps) if until is None else paths.index(until) + 1
    for path, step in steps[:last]:
        step.requires_grad_(False)
        kept = freeze_batch_norm(step)
        if kept is not step:
            parent, _, child = path.rpartition(".")
            setattr(trunk.get_submodule(parent), child, kept)
    for parameter in trunk.parameters(recurse=False):  # a transformer's class token is read first
        parameter.requires_grad_(False)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's own mode comes back, for one part may be frozen in its."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
