"""Freeze part of a network while the rest learns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from kd.errors import UserError
from kd.nn.trunk_base import Trunk
from kd.registry import suggestion


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm that always uses its stored statistics; same state-dict keys."""

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Stay in evaluation mode."""
        super().train(False)
        return self


# Frozen subclasses of batch norm by class, created on demand.
_FROZEN: dict[type, type[nn.BatchNorm2d]] = {nn.BatchNorm2d: FrozenBatchNorm}


def freeze_batch_norm(module: nn.Module) -> None:
    """Freeze statistics and scales of all batch norms inside, in place."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            if not isinstance(norm, FrozenBatchNorm):
                kind = type(norm)  # timm's subclasses have an activation inside
                frozen = type(f"Frozen{kind.__name__}", (FrozenBatchNorm, kind), {})
                norm.__class__ = _FROZEN.setdefault(kind, frozen)
            norm.requires_grad_(False).train()


def freeze_parts(trunk: Trunk, frozen: str | None, batch_norm_frozen: bool) -> None:
    """Freeze a trunk in place: "all" or up to the step `frozen`, and its batch norms."""
    if frozen is not None:
        freeze(trunk, None if frozen == "all" else frozen)
    if batch_norm_frozen:
        freeze_batch_norm(trunk)


def freeze(trunk: Trunk, until: str | None = None) -> None:
    """Freeze a trunk's steps up to the path `until`, such as "layer2", or all; batch norms too.

    Raises:
        UserError: The trunk has no such step.
    """
    steps = list(trunk.steps())
    paths = [path for path, _ in steps]
    if until is not None and until not in paths:
        raise UserError(f"{trunk.name} has no step {until!r} to freeze{suggestion(until, paths)}")
    last = len(steps) if until is None else paths.index(until) + 1
    for _, step in steps[:last]:
        step.requires_grad_(False)
        freeze_batch_norm(step)
    inside = tuple(f"{path}." for path in paths)
    for path, parameter in trunk.named_parameters():
        if not path.startswith(inside):  # a transformer's class token
            parameter.requires_grad_(False)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in evaluation mode, after which each module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
