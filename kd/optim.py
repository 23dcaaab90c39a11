"""Optimisers, learning rates over the steps, and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from kd.errors import UserError


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of weights and statistics; early steps average less."""
    decay = min(decay, (1 + step) / (10 + step))
    ours, theirs = average.state_dict(), model.state_dict()
    for name, tensor in ours.items():
        if tensor.is_floating_point():
            tensor.lerp_(theirs[name], 1 - decay)
        else:
            tensor.copy_(theirs[name])


def make_schedule(
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    name: str = "cosine",
    warmup: float = 0.0,
    final: float = 0.0,
    power: float = 0.9,
) -> torch.optim.lr_scheduler.LambdaLR:
    """A learning rate that is a pure function of the step.

    Args:
        optimizer: Its groups keep their own base rates.
        steps: All steps of training.
        name: constant, cosine, linear or poly.
        warmup: Share of the steps over which the rate rises from 0.
        final: Last rate as a share of the first.
        power: Of poly.
    """
    rising = round(warmup * steps)

    shapes: dict[str, Callable[[float], float]] = {
        "cosine": lambda way: 0.5 + 0.5 * math.cos(math.pi * way),
        "linear": lambda way: 1.0 - way,
        "poly": lambda way: float((1.0 - way) ** power),
    }

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        if name == "constant":
            return 1.0
        way = min((step - rising) / max(steps - rising, 1), 1.0)
        return final + (1.0 - final) * shapes[name](way)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def make_optimizer(
    model: nn.Module,
    *,
    name: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    lr_scale: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """An optimiser; decay for weights of two dimensions or more, rates by name prefix.

    Args:
        model: Its parameters; those at rate 0 are frozen.
        name: adamw, adam or sgd.
        lr: Base rate.
        weight_decay: Decay of weights, not of biases and norms.
        momentum: Of sgd.
        lr_scale: Factor on the rate by prefix of the parameter's name; the longest wins.

    Raises:
        UserError: A prefix that no parameter has.
    """
    scales = dict(lr_scale or {})
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    used: set[str] = set()
    for full_name, parameter in model.named_parameters():
        names = (full_name, full_name.removeprefix("student."))
        fitting = [prefix for prefix in scales if any(n.startswith(prefix) for n in names)]
        used.update(fitting)
        scale = scales[max(fitting, key=len)] if fitting else 1.0
        if scale == 0.0:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((lr * scale, decay), []).append(parameter)
    if unknown := set(scales) - used:
        tops = sorted({name.split(".")[0] for name, _ in model.named_children()})
        raise UserError(f"optimizer.lr_scale: no parameter starts with {unknown}; there are {tops}")
    settings: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    if name == "sgd":
        return torch.optim.SGD(settings, lr=lr, momentum=momentum)
    if name == "adam":
        return torch.optim.Adam(settings, lr=lr)
    return torch.optim.AdamW(settings, lr=lr)
