"""A trunk whose output is kept at a finer grid than the published one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from kd.errors import UserError

if TYPE_CHECKING:
    from kd.nn.trunk import Trunk


def keep_stride(trunk: Trunk, stride: int, *, dilate: bool) -> None:
    """Give stride 1 to the steps that would bring the output beyond `stride` pixels a place.

    Args:
        trunk: Changed in place.
        stride: Pixels a place of the output, one of the trunk's `level_strides`.
        dilate: Whether the convolutions after such a step are spread by as much, so that each still
            sees the places that it was trained on.

    Raises:
        UserError: The trunk has no such stride, or shrinks its maps in a way that cannot be undone.
    """
    if stride not in trunk.level_strides:
        known = ", ".join(map(str, trunk.level_strides))
        raise UserError(f"{trunk.name}: stride must be one of {known}, got {stride}")
    dilation, before = 1, 1
    for (path, _), own in list(zip(trunk.steps(), trunk.step_strides, strict=True)):
        if own > stride:
            _drop_pooling(trunk, path)
            if dilate:
                after = dilation * (own // max(before, stride))
                _dilate(trunk.get_submodule(path), dilation, after)
                dilation = after
        before = own
        for module in trunk.get_submodule(path).modules() if own > stride else ():
            shrinks = isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)
            if not shrinks or module.stride in (1, (1, 1)):
                continue
            padded = isinstance(module, nn.Conv2d) and all(
                2 * pad == spread * (side - 1)
                for pad, spread, side in zip(
                    module.padding, module.dilation, module.kernel_size, strict=True
                )
                if isinstance(pad, int)
            )
            if not padded:
                raise UserError(
                    f"{trunk.name}: cannot keep stride {stride}, because {path} shrinks the map "
                    f"by a {type(module).__name__}; up-sample the input instead"
                )
            module.stride = (1, 1)  # type: ignore[assignment]
    trunk.measure()
    if trunk.stride != stride:
        raise UserError(f"{trunk.name}: cannot keep stride {stride}; up-sample the input instead")


def _dilate(step: nn.Module, dilation: int, last: int) -> None:
    """Spread a step's convolutions as far as the strides before them would have.

    Args:
        step: Of a trunk, its strides still there.
        dilation: Of what comes into the step.
        last: Of what leaves it. Strides side by side, in branches, count once therefore.
    """
    for module in step.modules():
        if not isinstance(module, nn.Conv2d) or max(module.kernel_size) == 1:
            continue
        sides, stride = module.kernel_size, max(module.stride)
        here = min(dilation, last // stride)
        module.dilation = (here, here)
        module.padding = (here * (sides[0] - 1) // 2, here * (sides[1] - 1) // 2)
        dilation = max(dilation, here * stride)


def _drop_pooling(trunk: Trunk, path: str) -> None:
    """Leave out a step's pooling of windows side by side: only the grid is finer without it."""
    for inner, module in list(trunk.get_submodule(path).named_modules(prefix=path)):
        pools = isinstance(module, nn.MaxPool2d | nn.AvgPool2d)
        if pools and module.kernel_size == module.stride and module.padding in (0, (0, 0)):
            parent, _, child = inner.rpartition(".")
            setattr(trunk.get_submodule(parent), child, nn.Identity())
