"""Freeze parts of a network while the rest is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from kd.errors import UserError
from kd.nn.trunk_base import Trunk
from kd.registry import suggestion


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm with fixed running statistics, and the same state-dict keys as usual."""

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Stay in evaluation mode, whatever `mode` is."""
        super().train(False)
        return self


# Cache of frozen subclasses, by class of batch norm. They are created on demand, because timm's
# batch norms are subclasses with an activation inside.
_FROZEN: dict[type, type[nn.BatchNorm2d]] = {nn.BatchNorm2d: FrozenBatchNorm}


def freeze_batch_norm(module: nn.Module) -> None:
    """Freeze the statistics, scales and biases of all batch norms in a module, in place."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            if not isinstance(norm, FrozenBatchNorm):
                kind = type(norm)
                frozen = type(f"Frozen{kind.__name__}", (FrozenBatchNorm, kind), {})
                norm.__class__ = _FROZEN.setdefault(kind, frozen)
            norm.requires_grad_(False).train()


def freeze(trunk: Trunk, frozen: str | None, batch_norm_frozen: bool = False) -> None:
    """Freeze a trunk in place.

    Args:
        trunk: The trunk to freeze.
        frozen: "all", or the path of the last step to freeze, such as "layer2"; None freezes no
            step. Batch norms of frozen steps are frozen too.
        batch_norm_frozen: Whether to freeze the batch norms of all steps.
    """
    if batch_norm_frozen:
        freeze_batch_norm(trunk)
    if frozen is None:
        return
    steps = dict(trunk.steps())
    paths = list(steps)
    if frozen != "all" and frozen not in steps:
        raise UserError(f"{trunk.name} has no step {frozen!r} to freeze{suggestion(frozen, paths)}")
    last = len(paths) if frozen == "all" else paths.index(frozen) + 1
    for path in paths[:last]:
        steps[path].requires_grad_(False)
        freeze_batch_norm(steps[path])
    inside = tuple(f"{path}." for path in paths)
    for path, parameter in trunk.named_parameters():
        if not path.startswith(inside):  # parameters outside all steps, such as a class token
            parameter.requires_grad_(False)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode within a `with` block, then restore each module's mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
